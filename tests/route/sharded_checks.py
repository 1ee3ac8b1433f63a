"""Losses of DTensors on two processes against plain tensors in one: test_sharded.py runs this."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Generator, Tensor
from torch.distributed.tensor import (
    DTensor,
    Replicate,
    Shard,
    distribute_tensor,
    init_device_mesh,
)
from torch.distributed.tensor.parallel import loss_parallel

import fusedloss
from fusedloss import functional as F  # noqa: N812

WORLD = 2


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
    return distribute_tensor(tensor, MESH, [placement])


def whole(tensor: Tensor | None) -> Tensor | None:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def agree(
    function: Function,
    tensors: tuple[Tensor, ...],
    placements: tuple[Any, ...],
    wanted: tuple[int, ...] = (0,),
    inside: Callable[[], Any] = contextlib.nullcontext,
    **settings: Any,
) -> None:
    """Value and gradients of DTensors (plain where the placement is None) are those of one process."""
    leaves = [t.detach().clone().requires_grad_(k in wanted) for k, t in enumerate(tensors)]
    expected = function(*leaves, **settings)
    incoming = torch.linspace(0.5, 1.5, expected.numel()).reshape(expected.shape).to(expected)
    grads = torch.autograd.grad(expected, [leaves[k] for k in wanted], incoming)
    given = [
        t.detach().clone() if p is None else on_mesh(t, p)
        for t, p in zip(tensors, placements, strict=True)
    ]
    for k in wanted:
        given[k].requires_grad_()
    with inside():
        value = function(*given, **settings)
        (whole(value) * incoming).sum().backward()
    found = [value, *(given[k].grad for k in wanted)]
    for a, b in zip(found, (expected, *grads), strict=True):
        torch.testing.assert_close(whole(a), b, rtol=1e-12, atol=1e-12)


def of_logits(reduction: str) -> Checks:
    found: Checks = {}

    def add(name: str, *arguments: Any, **settings: Any) -> None:
        call = functools.partial(agree, *arguments, reduction=reduction, **settings)
        found[f"{name}, {reduction}"] = call

    for where in (ROWS, CLASSES, ALL):
        placed = (where, ALL if where == CLASSES else where)
        add(f"nll_loss: {where}", F.nll_loss, (X, Y), placed)
        add(f"nll_loss: weight, {where}", F.nll_loss, (X, Y, W), (*placed, ALL))
        add(f"bce: {where}", F.binary_cross_entropy, (P, Q), (where, where), (0, 1))
        for function in (F.cross_entropy, F.nll_loss):
            name = f"plain: {function.__name__}, {where}"
            add(name, function, (X, Y, W), (where, None, None))
        for function in (F.binary_cross_entropy, pos_weighted):
            name = f"plain: {function.__name__}, {where}"
            add(name, function, (P, Q, W), (where, where, None))
        add(f"loss_parallel: {where}", F.cross_entropy, (X, Y), placed, inside=parallel)
    placed, inside = (CLASSES, ALL), {"inside": parallel}
    for settings in ({"label_smoothing": 0.1}, {"ignore_index": 5}):
        add(f"loss_parallel: {settings}", F.cross_entropy, (X, Y), placed, **inside, **settings)
    plain = (CLASSES, None, None)
    add("loss_parallel: weight", F.cross_entropy, (X, Y, W), plain, **inside)
    soft = (X, X.flip(0).softmax(1))
    add("loss_parallel: probabilities", F.cross_entropy, soft, (CLASSES, CLASSES), (0, 1), **inside)
    add("loss_parallel: nll_loss", F.nll_loss, (X, Y), placed, **inside)
    for function in (flat_cross_entropy, flat_nll_loss):
        add(f"sequence: {function.__name__}", function, (H, T), (SEQUENCE, SEQUENCE))
    images = (H, torch.tensor([0, 1, 2, 0, 1, 2, 0] * 2).reshape(2, 7))
    add("images: classes", F.cross_entropy, images, placed)
    add("images: width", F.nll_loss, images, (Shard(2), Shard(1)))
    return found


def of_heads(reduction: str) -> Checks:
    found: Checks = {}

    def add(name: str, function: Function, placements: tuple[Any, ...], **settings: Any) -> None:
        h, t = (H, T) if SEQUENCE in placements else (X, Y)
        found[f"{name}, {reduction}"] = functools.partial(
            agree, function, (h, V, t), placements, (0, 1), reduction=reduction, **settings
        )

    head, placed = F.linear_cross_entropy, (ALL, ROWS, ALL)
    add("sequence: head", head, (SEQUENCE, ALL, SEQUENCE))
    add("loss_parallel: head", head, placed, inside=parallel)
    add("plain: head", head, (ALL, ROWS, None))
    add("loss_parallel: kl_div", distilled, placed, inside=parallel)
    add("statistics", statistics, placed)
    return found


def checks() -> Checks:
    found: Checks = {}
    for reduction in ("mean", "none"):
        found |= of_logits(reduction)
    for reduction in ("sum", "none"):
        found |= of_heads(reduction)
    compiled = torch.compile(F.cross_entropy, backend="aot_eager", fullgraph=True)
    found["compile"] = functools.partial(agree, compiled, (X, Y, W), (CLASSES, None, None))
    for where in (ROWS, CLASSES, ALL):
        found[f"range: {where}"] = functools.partial(out_of_range, where)
        found[f"inference: {where}"] = functools.partial(in_inference_mode, where)
    found["alone"] = functools.partial(agree, F.cross_entropy, (X[0], Y[1], W), (ROWS, None, None))
    found["alone: 0-dim"] = functools.partial(agree, F.mse_loss, (X[0, 0], X[0, 1]), (ALL, ALL))
    nothing = (F.nll_loss, (X[:0], Y[:0]), (ROWS, ROWS))
    found["nothing"] = functools.partial(agree, *nothing, reduction="sum")
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
    each = found.log_prob + 2 * found.lse + 3 * found.entropy + found.correct
    return each.sum() if reduction == "sum" else each


def out_of_range(where: Any) -> None:
    """All processes raise, and name the position in the whole tensor."""
    bad = torch.tensor([0, 99, 2, 3, 6])
    placed = on_mesh(bad, ALL if where == CLASSES else where)
    for target in (bad, placed):
        for function in (F.cross_entropy, F.nll_loss):
            words = "target[1] = 99 is out of range for 7 classes"
            refused(IndexError, words, lambda f=function, t=target: f(on_mesh(X, where), t))
    head = (on_mesh(X, ROWS), on_mesh(V, ROWS))
    words = "target[1] = 99 is out of range for 9 classes"
    refused(IndexError, words, lambda: F.linear_cross_entropy(*head, placed))
    above = torch.where(torch.arange(35).reshape(5, 7) == 30, 1.5, P)
    words = "between 0 and 1, but input[4, 2] = 1.5"
    pair = (on_mesh(above, where), on_mesh(Q, where))
    refused(RuntimeError, words, lambda: F.binary_cross_entropy(*pair))


def in_inference_mode(where: Any) -> None:
    """Where torch's `&` of DTensors gives its first operand."""
    calls = ((F.cross_entropy, (X, Y)), (F.kl_div, (X, P)), (F.binary_cross_entropy, (P, Q)))
    for function, (x, t) in calls:
        expected = function(x, t, reduction="sum")
        placed = ALL if t is Y and where == CLASSES else where
        with torch.inference_mode():
            value = whole(function(on_mesh(x, where), on_mesh(t, placed), reduction="sum"))
        torch.testing.assert_close(value, expected)


def refused(kind: type[Exception], words: str, call: Callable[[], Any]) -> None:
    try:
        call()
    except kind as error:
        assert words in str(error), error
    else:
        raise AssertionError("not refused")


def rank(number: int, folder: Path) -> None:
    global MESH
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), WORLD)
    dist.init_process_group(
        "gloo", store=store, rank=number, world_size=WORLD, timeout=timedelta(seconds=20)
    )
    MESH = init_device_mesh("cpu", (WORLD,))
    wrong = {}
    named = checks()
    for name, check in named.items():
        try:
            check()
        except Exception:
            wrong[name] = traceback.format_exc()
    (folder / f"{number}.json").write_text(json.dumps([list(named), wrong]))


def main() -> None:
    """Prints the names of all checks, and what went wrong in which."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory() as folder:
        children = []
        for number in range(WORLD):
            child = os.fork()
            if not child:
                try:
                    rank(number, Path(folder))
                finally:
                    os._exit(0)
            children.append(child)
        for child in children:
            os.waitpid(child, 0)
        print(
            json.dumps([json.loads((Path(folder) / f"{k}.json").read_text()) for k in range(WORLD)])
        )


if __name__ == "__main__":
    main()
