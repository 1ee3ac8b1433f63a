"""How losses of DTensors are called: options, transforms and modes around them; test_uses.py runs these."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Generator, Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.parallel import loss_parallel

import fusedloss
from distributed.matrix import agree, mesh_of, placed, whole
from fusedloss import functional as F  # noqa: N812


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=Generator().manual_seed(shape[0]))


# No size is divisible by the number of processes.
X, W = drawn(5, 7), drawn(7).abs() + 0.1
Y = torch.tensor([0, 5, 2, 3, 6])
P, Q = X.sigmoid(), X.flip(0).sigmoid()
H, T = drawn(2, 3, 7), torch.tensor([[0, 1, 2], [3, 6, 5]])  # a batch of sequences
V = drawn(9, 7)  # a head of 9 classes
ROWS, CLASSES, ALL = Shard(0), Shard(1), Replicate()
SEQUENCE = Shard(1)

Function = Callable[..., Tensor]
Checks = dict[str, Callable[[], None]]


@contextlib.contextmanager
def parallel() -> Iterator[None]:
    """`loss_parallel()`, which is left on for good where an exception leaves it."""
    error = None
    with loss_parallel():
        try:
            yield
        except Exception as caught:
            error = caught
    if error:
        raise error


def on_mesh(tensor: Tensor, placement: Any) -> DTensor:
    return placed(tensor.detach(), mesh_of("rows"), [placement])


def same(
    function: Function,
    tensors: tuple[Tensor, ...],
    placements: tuple[Any, ...],
    wanted: tuple[int, ...] = (0,),
    inside: Callable[[], Any] = contextlib.nullcontext,
    **settings: Any,
) -> None:
    """Value and gradients of DTensors (plain where the placement is None) are those of one process."""
    one = [t.detach().clone().requires_grad_(k in wanted) for k, t in enumerate(tensors)]
    many = [
        (t.detach().clone() if p is None else on_mesh(t, p)).requires_grad_(k in wanted)
        for k, (t, p) in enumerate(zip(tensors, placements, strict=True))
    ]
    with inside():
        agree(function, (one, settings), (many, settings))


def of_logits(reduction: str) -> Checks:
    found: Checks = {}

    def add(name: str, *arguments: Any, **settings: Any) -> None:
        found[f"{name}, {reduction}"] = functools.partial(
            same, *arguments, reduction=reduction, **settings
        )

    for where in (ROWS, CLASSES, ALL):
        labels = ALL if where == CLASSES else where
        for function in (F.cross_entropy, F.nll_loss):
            add(f"plain: {function.__name__}, {where}", function, (X, Y, W), (where, None, None))
        for function in (F.binary_cross_entropy, pos_weighted):
            add(f"plain: {function.__name__}, {where}", function, (P, Q, W), (where, where, None))
        add(f"learns: {where}", F.cross_entropy, (X, Y, W), (where, labels, None), (0, 2))
        add(f"learns, alike: {where}", F.cross_entropy, (X, Y, W), (where, labels, ALL), (0, 2))
        add(f"loss_parallel: {where}", F.cross_entropy, (X, Y), (where, labels), inside=parallel)
    placements, inside = (CLASSES, ALL), {"inside": parallel}
    for settings in ({"label_smoothing": 0.1}, {"ignore_index": 5}):
        add(f"loss_parallel: {settings}", F.cross_entropy, (X, Y), placements, **inside, **settings)
    add("loss_parallel: weight", F.cross_entropy, (X, Y, W), (CLASSES, None, None), **inside)
    soft = (X, X.flip(0).softmax(1))
    add("loss_parallel: probabilities", F.cross_entropy, soft, (CLASSES, CLASSES), (0, 1), **inside)
    add("loss_parallel: nll_loss", F.nll_loss, (X, Y), placements, **inside)
    for function in (flat_cross_entropy, flat_nll_loss):
        add(f"sequence: {function.__name__}", function, (H, T), (SEQUENCE, SEQUENCE))
    add("target of other rows", F.mse_loss, (X, Q), (ROWS, CLASSES), (0, 1))
    add("target broadcasts", F.huber_loss, (X, Q[:1]), (ROWS, ALL), (0, 1))
    images = (H, torch.tensor([0, 1, 2, 0, 1, 2, 0] * 2).reshape(2, 7))
    add("images: classes", F.cross_entropy, images, placements)
    add("images: width", F.nll_loss, images, (Shard(2), Shard(1)))
    return found


def of_heads(reduction: str) -> Checks:
    found: Checks = {}

    def add(name: str, function: Function, placements: tuple[Any, ...], **settings: Any) -> None:
        h, t = (H, T) if SEQUENCE in placements else (X, Y)
        found[f"{name}, {reduction}"] = functools.partial(
            same, function, (h, V, t), placements, (0, 1), reduction=reduction, **settings
        )

    head, placements = F.linear_cross_entropy, (ALL, ROWS, ALL)
    add("sequence: head", head, (SEQUENCE, ALL, SEQUENCE))
    add("sequence: head, whole labels", head, (SEQUENCE, ALL, ALL))
    add("sequence: head, plain labels", head, (SEQUENCE, ALL, None))
    add("sequence: head of classes", head, (SEQUENCE, ROWS, SEQUENCE))
    add("loss_parallel: head", head, placements, inside=parallel)
    add("plain: head", head, (ALL, ROWS, None))
    add("loss_parallel: kl_div", distilled, placements, inside=parallel)
    add("statistics", statistics, placements)
    add("statistics of rows", statistics, (ROWS, ALL, ROWS))
    return found


def pos_weighted(x: Tensor, t: Tensor, weight: Tensor, reduction: str) -> Tensor:
    return F.binary_cross_entropy_with_logits(x, t, weight, pos_weight=weight, reduction=reduction)


def flat_cross_entropy(h: Tensor, t: Tensor, reduction: str) -> Tensor:
    return F.cross_entropy(h.flatten(0, 1), t.flatten(), reduction=reduction)


def flat_nll_loss(h: Tensor, t: Tensor, reduction: str) -> Tensor:
    return F.nll_loss(h.flatten(0, 1), t.flatten(), reduction=reduction)


def distilled(h: Tensor, w: Tensor, t: Tensor, reduction: str) -> Tensor:
    teacher = (h.detach() + 1, w.detach())
    return fusedloss.linear_kl_div(h, w, *teacher, target=t, hard_weight=0.5, reduction=reduction)


def statistics(h: Tensor, w: Tensor, t: Tensor, reduction: str) -> Tensor:
    found = fusedloss.linear_log_prob(h, w, t, statistics=True)
    assert found.valid.item() == 5
    each = found.log_prob + 2 * found.lse + 3 * found.entropy + found.correct
    if reduction == "none":
        return each
    total = each.sum()
    return total.redistribute(placements=[ALL]) if isinstance(total, DTensor) else total


def alone() -> None:
    same(F.cross_entropy, (X[0], Y[1], W), (ROWS, None, None))
    same(F.mse_loss, (X[0, 0], X[0, 1]), (ALL, ALL))


def nothing() -> None:
    same(F.nll_loss, (X[:0], Y[:0]), (ROWS, ROWS), reduction="sum")
    same(F.nll_loss, (X[:0], Y[:0]), (ROWS, ROWS))


def in_inference_mode() -> None:
    calls = ((F.cross_entropy, (X, Y)), (F.kl_div, (X, P)), (F.binary_cross_entropy, (P, Q)))
    for where in (ROWS, CLASSES, ALL):
        for function, (x, t) in calls:
            expected = function(x, t, reduction="sum")
            other = ALL if t is Y and where == CLASSES else where
            with torch.inference_mode():
                value = function(on_mesh(x, where), on_mesh(t, other), reduction="sum")
                torch.testing.assert_close(whole(value), expected)


def after_an_interrupt() -> None:
    """`loss_parallel()` stays on for good where an exception leaves it: it is nothing to ours."""
    with contextlib.suppress(KeyboardInterrupt), loss_parallel():
        raise KeyboardInterrupt
    same(F.cross_entropy, (X, Y), (ROWS, ROWS))
    same(F.cross_entropy, (X, Y), (CLASSES, ALL))


def compiled(backend: str, every: bool) -> None:
    """With both reductions, or one of them each."""
    soft = X.flip(0).softmax(1)
    calls: tuple[tuple[Any, ...], ...] = (
        (F.cross_entropy, (X, Y, W), (ROWS, ROWS, None), (0,)),
        (F.cross_entropy, (X, Y, W), (CLASSES, None, None), (0,)),
        (F.cross_entropy, (X, soft), (ROWS, ROWS), (0, 1)),
        (F.mse_loss, (X, Q), (ROWS, ROWS), (0, 1)),
        (F.triplet_margin_loss, (X, P, Q), (ROWS, ROWS, ROWS), (0, 1, 2)),
        (F.linear_cross_entropy, (X, V, Y), (ROWS, ROWS, ROWS), (0, 1)),
        (F.linear_cross_entropy, (X, V, Y), (ALL, ROWS, ALL), (0, 1)),
        (F.nll_loss, (X, Y), (CLASSES, ALL), (0,)),
    )
    for k, (function, tensors, placements, wanted) in enumerate(calls):
        for reduction in ("mean", "none") if every else (("mean", "none")[k % 2],):
            torch.compiler.reset()
            call = torch.compile(
                functools.partial(function, reduction=reduction), backend=backend, fullgraph=True
            )
            same(lambda *t, f=call: f(*t), tensors, placements, wanted)


def twice(function: Function, tensors: tuple[Tensor, ...], placements: tuple[Any, ...]) -> None:
    """The derivative of the gradient's square."""

    def second(x: Tensor, *others: Tensor) -> Tensor:
        value = function(x, *others, reduction="mean")
        (grad,) = torch.autograd.grad(value, x, create_graph=True)
        total = (grad * grad).sum()
        return total.redistribute(placements=[ALL]) if isinstance(total, DTensor) else total

    same(second, tensors, placements)


def double_backward() -> None:
    for where in (ROWS, CLASSES, ALL):
        labels = ALL if where == CLASSES else where
        twice(F.cross_entropy, (X, Y), (where, labels))
        twice(F.binary_cross_entropy, (P, Q), (where, where))
        twice(F.mse_loss, (X, Q), (where, where))
    twice(F.linear_cross_entropy, (X, V, Y), (ROWS, ALL, ROWS))


def of_partial() -> None:
    """What is still to be added up by torch: its gradient is whole on every process."""
    x = placed(X, mesh_of("rows"), [Partial()]).requires_grad_()
    value = F.cross_entropy(x, on_mesh(Y, ALL))
    value.backward()
    one = X.clone().requires_grad_()
    F.cross_entropy(one, Y).backward()
    torch.testing.assert_close(x.grad.full_tensor(), one.grad)


def patched() -> None:
    """PyTorch's names: neither a gradient times the processes, nor a mean of their means."""
    with fusedloss.patched():
        same(torch.nn.functional.mse_loss, (X, Q), (ROWS, ROWS), (0, 1))
        ignored = torch.tensor([0, -100, -100, 3, -100])
        same(torch.nn.functional.cross_entropy, (X, ignored), (ROWS, ROWS))
        criterion = torch.nn.CrossEntropyLoss(weight=W)
        same(criterion, (X, Y), (CLASSES, ALL))
        with loss_parallel():
            same(torch.nn.functional.cross_entropy, (X, Y), (CLASSES, None))


def checks() -> Checks:
    found: Checks = {}
    for reduction in ("mean", "none"):
        found |= of_logits(reduction)
    for reduction in ("sum", "none"):
        found |= of_heads(reduction)
    for check in (alone, nothing, in_inference_mode, double_backward, of_partial, patched):
        found[check.__name__] = check
    found["after an interrupt"] = after_an_interrupt  # the last: it leaves torch changed
    return found
