"""Calls of losses whose classes several processes share; class_groups.py runs them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from problems import SETTINGS, Distillation, Problem
from torch import Generator, Tensor

import fusedloss

N, D, C = 11, 6, 9
SIZES = {
    2: ((5, 4), (7, 2), (9, 0)),
    3: ((3, 3, 3), (0, 8, 1), (9, 0, 0)),
    4: ((3, 3, 3, 0), (1, 6, 0, 2), (0, 0, 9, 0)),
}
BUDGET = 4000  # bytes: chunks of a few rows
TIGHT, LOOSE = {"rtol": 1e-12, "atol": 1e-12}, {"rtol": 2e-5, "atol": 2e-6}
Tensors = dict[str, Tensor]
Own = Callable[[Tensor, int], Tensor]  # of a tensor with the classes in a dimension


class Case:
    """A call of one process; `classes` says in which dimension a tensor has them."""

    def __init__(
        self,
        name: str,
        function: Callable[..., Any],
        tensors: Tensors,
        classes: dict[str, int],
        learned: tuple[str, ...],
        **settings: Any,
    ) -> None:
        self.name, self.function, self.tensors = name, function, tensors
        self.classes, self.learned, self.settings = classes, learned, settings

    def run(self, own: Own, **more: Any) -> list[Tensor]:
        """Results and gradients, of what `own` leaves of the tensors."""
        given = {}
        for name, tensor in self.tensors.items():
            dim = self.classes.get(name)
            found = tensor if dim is None else own(tensor, dim)
            given[name] = found.detach().clone().requires_grad_(name in self.learned)
        results = self.function(**given, **self.settings, **more)
        results = [results] if isinstance(results, Tensor) else list(results)
        learned = [given[name] for name in self.learned]
        outputs = [r for r in results if r.requires_grad]
        draw = Generator().manual_seed(1)
        incoming = [torch.randn(r.shape, generator=draw, dtype=torch.float64) for r in outputs]
        incoming = [g.to(r.dtype) for g, r in zip(incoming, outputs, strict=True)]
        grads = torch.autograd.grad(outputs, learned, incoming)
        return [*(r.detach() for r in results), *grads]

    def check(self, rank: int, sizes: tuple[int, ...], group: Any, **tolerance: float) -> None:
        own = of_shard(rank, sizes)
        expected = self.run(lambda tensor, dim: tensor)
        found = self.run(own, class_group=group)
        results = len(expected) - len(self.learned)
        dims: list[int | None] = [None] * results
        dims += [self.classes.get(name) for name in self.learned]
        for whole, part, dim in zip(expected, found, dims, strict=True):
            torch.testing.assert_close(part, whole if dim is None else own(whole, dim), **tolerance)
            if dim is None:
                same_on_all(part)


def same_on_all(tensor: Tensor) -> None:
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, tensor.double().numpy().tobytes())
    assert len(set(every)) == 1, "the bits differ between processes"


OF_HEADS = {
    "linear_weight": 0,
    "linear_bias": 0,
    "teacher_weight": 0,
    "teacher_bias": 0,
    "teacher_logits": -1,
}
HEAD = ("input", "linear_weight", "linear_bias")


def drawn(dtype: torch.dtype, **more: Any) -> Problem:
    return Problem(Generator().manual_seed(2), dtype, shape=(N, D, C), **more)


def heads(dtype: torch.dtype) -> Iterator[Case]:
    for setting, out, reduction in itertools.product(SETTINGS, ((), (2,)), ("mean", "none")):
        if out and setting not in ("plain", "all"):
            continue
        problem = drawn(dtype, out=out)
        options = {**problem.settings(setting), "reduction": reduction, "memory_budget": BUDGET}
        given = (fusedloss.linear_cross_entropy, problem.tensors)
        yield Case(f"{setting} {out} {reduction}", *given, OF_HEADS, HEAD, **options)
        problem = drawn(dtype, out=out, probabilities=True)
        given = (fusedloss.linear_cross_entropy, problem.tensors)
        for whole in (True, False):
            classes = OF_HEADS if whole else {**OF_HEADS, "target": 1}
            name = f"probabilities {setting} {out} {reduction} {whole}"
            yield Case(name, *given, classes, (*HEAD, "target"), **options)
    problem = drawn(dtype)
    given = (fusedloss.linear_cross_entropy, problem.tensors, OF_HEADS, HEAD)
    yield Case("denominator", *given, denominator=7.0, reduction="mean")
    threes = {**problem.tensors, "target": torch.where(problem.tensors["target"] < 0, 3, 1)}
    given = (fusedloss.linear_cross_entropy, threes, OF_HEADS, HEAD)
    yield Case("sum", *given, reduction="sum", ignore_index=3)
    ignored = {**problem.tensors, "target": torch.full((N,), -100)}
    yield Case("all ignored", *given[:1], ignored, OF_HEADS, HEAD, reduction="sum")
    nothing = {k: t[:0] if k in ("input", "target") else t for k, t in problem.tensors.items()}
    yield Case("no rows", *given[:1], nothing, OF_HEADS, HEAD, reduction="sum")


def log_probs(dtype: torch.dtype) -> Iterator[Case]:
    for statistics, softcap in itertools.product((False, True), (None, 2.0)):
        options = {"statistics": statistics, "softcap": softcap, "temperature": 0.7}
        given = (fusedloss.linear_log_prob, drawn(dtype).tensors, OF_HEADS, HEAD)
        yield Case(f"log_prob {statistics} {softcap}", *given, **options, memory_budget=BUDGET)


def divergences(dtype: torch.dtype) -> Iterator[Case]:
    problem = Distillation(Generator().manual_seed(2), dtype, shape=(N, D, C))
    far = torch.ones(N, 1, dtype=dtype)
    far[::2] = 1 + 1e-3  # the divergence of these rows is small
    names = zip(problem.teacher, HEAD, strict=True)
    near = {name: problem.tensors[own] for name, own in names}
    near["teacher_input"] = near["teacher_input"] * torch.where(far == 1, 3, far)
    function, kinds = fusedloss.linear_kl_div, ("forward", "reverse", "js")
    for kind, reduction, teacher in itertools.product(
        kinds, ("mean", "none"), (problem.teacher, near)
    ):
        options = {"divergence": kind, "reduction": reduction, "memory_budget": BUDGET}
        both = {**problem.tensors, **teacher}
        words = f"{kind} {reduction} {'near' if teacher is near else ''}"
        given = (function, both, OF_HEADS, HEAD)
        yield Case(words, *given, **options, hard_weight=0.5, temperature=2.0)
        soft = {name: t for name, t in both.items() if name != "target"}
        options |= {"softcap": 3.0, "teacher_softcap": 4.0, "beta": 0.2, "temperature": 0.3}
        yield Case(f"{words} alone", function, soft, OF_HEADS, HEAD, **options)
    tensors = {**problem.tensors, "teacher_logits": problem.logits()}
    yield Case("teacher's logits", function, tensors, OF_HEADS, HEAD)


def logits(dtype: torch.dtype) -> Iterator[Case]:
    draw = Generator().manual_seed(3)
    weight = (torch.rand(C, generator=draw, dtype=torch.float64) + 0.1).to(dtype)
    function, alone = fusedloss.functional.cross_entropy, ("input",)
    for shape, reduction in itertools.product(((C,), (N, C), (3, C, 4)), ("mean", "sum", "none")):
        dim = min(len(shape) - 1, 1)
        x = torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype)
        y = torch.randint(C, (*shape[:dim], *shape[dim + 1 :]), generator=draw)
        q = torch.randn(shape, generator=draw, dtype=torch.float64).softmax(dim).to(dtype)
        for more in ({}, {"weight": weight, "label_smoothing": 0.2}):
            name, more = f"{shape} {reduction} {len(more)}", {**more, "reduction": reduction}
            yield Case(name, function, {"input": x, "target": y}, {"input": dim}, alone, **more)
            both = {"input": dim, "target": dim}
            given = (function, {"input": x, "target": q})
            for classes in (both, {"input": dim}):
                words = f"probabilities {name} {len(classes)}"
                yield Case(words, *given, classes, ("input", "target"), **more)
        if len(shape) > 1:
            more = {"ignore_index": int(y.flatten()[0]), "reduction": reduction}
            given = (function, {"input": x, "target": y}, {"input": dim}, alone)
            yield Case(f"ignored {shape} {reduction}", *given, **more)


def likelihoods(dtype: torch.dtype) -> Iterator[Case]:
    draw = Generator().manual_seed(4)
    weight = (torch.rand(C, generator=draw, dtype=torch.float64) + 0.1).to(dtype)
    function, alone = fusedloss.functional.nll_loss, ("input",)
    for shape, reduction in itertools.product(((C,), (N, C), (3, C, 4)), ("mean", "sum", "none")):
        dim = min(len(shape) - 1, 1)
        x = torch.randn(shape, generator=draw, dtype=torch.float64).log_softmax(dim).to(dtype)
        y = torch.randint(C, (*shape[:dim], *shape[dim + 1 :]), generator=draw)
        given = (function, {"input": x, "target": y}, {"input": dim}, alone)
        ignored = {"ignore_index": int(y.flatten()[0])} if len(shape) > 1 else {}
        for more in ({}, {"weight": weight}, {"weight": weight, **ignored}):
            yield Case(
                f"likelihood {shape} {reduction} {len(more)}", *given, **more, reduction=reduction
            )
        if reduction == "mean":
            for number in (7, torch.tensor(7)):
                yield Case(f"likelihood over {number!r}", *given, denominator=number)


def cases(dtype: torch.dtype) -> Iterator[Case]:
    yield from heads(dtype)
    yield from log_probs(dtype)
    yield from divergences(dtype)
    yield from logits(dtype)
    yield from likelihoods(dtype)


def of_shard(rank: int, sizes: tuple[int, ...]) -> Own:
    return lambda tensor, dim: tensor.narrow(dim, sum(sizes[:rank]), sizes[rank])
