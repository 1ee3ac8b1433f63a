"""DTensors like earlier ones take the short way; test_again.py runs these."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import zlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Generator, Tensor
from torch.distributed.tensor import DTensor, Shard

from distributed import matrix
from distributed.faults import refused
from distributed.uses import ROWS, P, X, Y, on_mesh
from fusedloss import functional as F  # noqa: N812
from fusedloss.core import torch_state
from fusedloss.front.definition import REGISTRY, Loss
from fusedloss.route import memo, shards

# Which send more than numbers, or convert what they are given.
LONG = ("ctc_loss", "dice_cross_entropy", "dice_focal")


@contextlib.contextmanager
def counted() -> Iterator[list[str]]:
    """The collectives inside, on the short way and on the long one; the latter is refused."""
    seen: list[str] = []
    gather = torch_state.all_gather

    def noted(group: Any, found: Tensor, part: Tensor) -> None:
        seen.append(f"gather of {part.numel()}")
        gather(group, found, part)

    def long(*_: Any) -> Any:
        raise AssertionError("the long way")

    with (
        mock.patch.object(torch_state, "all_gather", noted),
        mock.patch.object(shards, "run", long),
        mock.patch.object(dist, "all_gather_into_tensor", long),
        mock.patch.object(dist, "all_reduce", long),
    ):
        yield seen


def placed(loss: Loss, reduction: str) -> tuple[list[Any], dict[str, Any]]:
    generator = Generator().manual_seed(zlib.crc32(loss.key.encode()))
    drawn = loss.example(matrix.shape_of(loss, 6), torch.float32, generator)
    options = dict(loss.options[next(iter(loss.options))](drawn, generator))
    tensors = [t.detach().requires_grad_(k in loss.differentiable) for k, t in enumerate(drawn)]
    if loss.reductions:
        options["reduction"] = reduction
    return matrix.given(loss, tensors, options, "rows", matrix.mesh_of("rows"), True)


def every(rank: int) -> dict[str, list[str]]:
    """The collectives of the third call of each loss of rows, forward and backward."""
    found = {}
    for key, loss in REGISTRY.items():
        if key.startswith(("linear_", *LONG)) or loss.kind == "dice":
            continue
        divides = "denominator" in inspect.signature(loss.function).parameters
        divides &= loss.name != "multilabel_soft_margin_loss"  # which multiplies it by its classes
        for reduction in (*(loss.reductions or ("none",)), *["over"] * divides):
            tensors, options = placed(loss, "mean" if reduction == "over" else reduction)
            numbers = itertools.cycle((3.0, torch.tensor(7.0)) if reduction == "over" else (None,))

            def step(function: Callable[..., Any] = loss.function) -> Any:
                if (number := next(numbers)) is not None:  # noqa: B023
                    options["denominator"] = number  # noqa: B023
                value = function(*tensors, **options)  # noqa: B023
                arrives = matrix.placed(
                    torch.ones(value.shape), value.device_mesh, value.placements
                )
                learned = [t for t in tensors if t.requires_grad]  # noqa: B023
                return value, torch.autograd.grad(value, learned, arrives)

            memo.known.clear()
            step(), step()
            with counted() as seen:
                try:
                    step()
                except AssertionError as error:
                    seen.append(str(error))
            found[f"{key}, {reduction}"] = seen
    return found


def square(tensors: list[Any]) -> list[Tensor]:
    """The derivative of a gradient's square, which is computed without a further gather."""
    x, t = tensors
    value = F.cross_entropy(x, t)
    with mock.patch.object(dist, "all_gather_into_tensor", None):
        (grad,) = torch.autograd.grad(value, x, create_graph=True)
    return list(torch.autograd.grad(grad.square().sum(), x))


def derivatives(rank: int) -> None:
    """Of derivatives, of a graph that is kept, by other incoming gradients, in transforms and hooks."""
    labels = Y.clone()
    labels[1] = -100
    tensors = [on_mesh(X, ROWS).requires_grad_(), on_mesh(labels, ROWS)]
    (first,) = square(tensors)
    for _ in range(3):
        (again,) = square(tensors)
        torch.testing.assert_close(again.full_tensor(), first.full_tensor())
    one = X.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(F.cross_entropy(one, labels), one)
    for factor in (1.0, 1.0, -3.0):
        value = F.cross_entropy(*tensors)
        for _ in range(2):
            (grad,) = torch.autograd.grad(value * factor, tensors[0], retain_graph=True)
            torch.testing.assert_close(grad.full_tensor(), factor * wanted)
        (grad,) = torch.autograd.grad(F.cross_entropy(*tensors) * factor, tensors[0])
        torch.testing.assert_close(grad.full_tensor(), factor * wanted)
    kept: list[Any] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t) or len(kept) - 1, lambda k: kept[k]
    ):
        (grad,) = torch.autograd.grad(F.cross_entropy(*tensors), tensors[0])
    assert kept
    torch.testing.assert_close(grad.full_tensor(), wanted)


def over(rank: int) -> None:
    """Means over other numbers each time, and what was scaled, kept or differentiated again in between.

    The gradient of float64 is computed in forward, that of float16 in backward.
    """
    numbers = (3.0, 5, torch.tensor(7.0), 0.25, torch.tensor(2))
    factors = ((1.0, False), (-3.0, False), (2.0, True))
    target = on_mesh(Y, ROWS)
    for dtype, number in itertools.product((torch.float64, torch.float16), numbers):
        one = X.to(dtype, copy=True).requires_grad_()
        far = on_mesh(X.to(dtype), ROWS).requires_grad_()
        alone = F.cross_entropy(one, Y, denominator=number)
        many = F.cross_entropy(far, target, denominator=number)
        torch.testing.assert_close(many.full_tensor(), alone)
        for factor, create_graph in factors:
            more = {"retain_graph": True, "create_graph": create_graph}
            (a,) = torch.autograd.grad(alone * factor, one, **more)
            (b,) = torch.autograd.grad(many * factor, far, **more)
            torch.testing.assert_close(b.full_tensor(), a)
        a, b = (torch.autograd.grad(g.square().sum(), x)[0] for g, x in ((a, one), (b, far)))
        torch.testing.assert_close(b.full_tensor(), a)


def changed(rank: int) -> list[str]:
    """What is said of shards that are changed before backward: of DTensors, and of their own memory."""
    found = []
    for how in (lambda x: x.mul_(2), lambda x: x.to_local().mul_(2)):
        for reduction in ("none", "mean"):
            for _ in range(3):
                leaf = on_mesh(X, ROWS).requires_grad_()
                x = leaf * 1.0
                value = F.cross_entropy(x, on_mesh(Y, ROWS), reduction=reduction).sum()
            with torch.no_grad():
                how(x)
            if reduction == "none":
                found.append(refused(lambda: torch.autograd.grad(value, leaf)))  # noqa: B023
                continue
            (grad,) = torch.autograd.grad(value, leaf, retain_graph=True)
            one = X.clone().requires_grad_()
            torch.testing.assert_close(
                grad.full_tensor(), torch.autograd.grad(F.cross_entropy(one, Y), one)[0]
            )
            found.append(
                refused(lambda: torch.autograd.grad(value, leaf, create_graph=True))  # noqa: B023
            )
    return found


def wrong(rank: int) -> list[tuple[str, str]]:
    """What is said the first time and after calls without a fault; one process has no rows at all."""
    found = []
    bad = Y.clone()
    bad[-1] = 77
    outside = torch.where(torch.arange(35).reshape(5, 7) == 30, 1.5, P)
    for rows in (5, 1):
        for function, good, other in (
            (F.cross_entropy, (X, Y), (X, bad)),
            (F.nll_loss, (X, Y), (X, bad)),
            (F.binary_cross_entropy, (P, P), (outside, P)),
        ):
            for reduction in ("none", "mean", "sum"):
                pairs = [[on_mesh(t[-rows:], ROWS) for t in each] for each in (good, other)]
                pairs[0][0].requires_grad_(), pairs[1][0].requires_grad_()
                memo.known.clear()
                first = refused(lambda: function(*pairs[1], reduction=reduction))  # noqa: B023
                for _ in range(3):
                    function(*pairs[0], reduction=reduction)
                later = refused(lambda: function(*pairs[1], reduction=reduction))  # noqa: B023
                found.append((first, later))
                function(*pairs[0], reduction=reduction)  # nobody is out of step
    return found


def others(rank: int) -> None:
    """Of the same shapes, but with other placements, meshes and types of DTensors, in turn."""
    world = dist.get_world_size()
    x, q = X[:4].repeat(1, 2)[:, :4], P[:4, :4]
    meshes = [matrix.mesh_of("rows"), dist.init_device_mesh("cpu", (1, world))]
    for _ in range(3):
        for where in (Shard(0), Shard(1), matrix.Replicate()):
            for mesh in meshes:
                places = [where] if mesh.ndim == 1 else [matrix.Replicate(), where]
                one = x.clone().requires_grad_()
                many = matrix.placed(x.detach(), mesh, places).requires_grad_()
                target = matrix.placed(q, mesh, places)
                matrix.agree(F.mse_loss, ((one, q), {}), ((many, target), {}))

    class Own(DTensor):
        pass

    leaf = on_mesh(X, ROWS)
    leaf.__class__ = Own
    for _ in range(3):
        value = F.mse_loss(leaf, on_mesh(P, ROWS))
        torch.testing.assert_close(value.full_tensor(), F.mse_loss(X, P))


def kept(rank: int) -> int:
    """How many tensors of calls are alive after them."""
    import gc
    import weakref

    alive = []
    for _ in range(4):
        x, t = on_mesh(X, ROWS).requires_grad_(), on_mesh(Y, ROWS)
        value = F.cross_entropy(x, t)
        value.backward()
        alive += [weakref.ref(each) for each in (x.to_local(), t.to_local(), x, t, value)]
        del x, t, value
    gc.collect()
    return sum(each() is not None for each in alive)
