"""PyTorch's own records of its losses, and samples of ours where those have holes."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator
from copy import copy
from typing import Any

import torch
from torch import Tensor

import fusedloss
from fusedloss.front.definition import REGISTRY

# Came with torch 2.13.
LinearCrossEntropyOptions = getattr(torch.nn, "LinearCrossEntropyOptions", None)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of packages that are missing, and not needed
    from torch.testing._internal import common_nn
    from torch.testing._internal.common_methods_invocations import op_db
    from torch.testing._internal.common_modules import ErrorModuleInput, ModuleInput, module_db
    from torch.testing._internal.opinfo.core import ErrorInput, OpInfo, SampleInput

# Each loss function and its module; torch has the linear one since 2.13.
LOSSES = {
    loss.name: loss.module for loss in REGISTRY.values() if hasattr(torch.nn, loss.module or "-")
}
if LinearCrossEntropyOptions:
    LOSSES["linear_cross_entropy"] = "LinearCrossEntropyLoss"
LOSSES = dict(sorted(LOSSES.items()))
REDUCTIONS = ("none", "mean", "sum")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

MANY = 500

SINGULAR = "singular"  # the name of samples where finite differences fail


def operator(name: str) -> OpInfo:
    """PyTorch's record of the function, with ours in its place (`.op`)."""
    mine = copy(next(op for op in op_db if op.name == f"nn.functional.{name}"))
    mine.op = getattr(fusedloss.functional, name)
    return mine


def op_dtypes(name: str) -> list[torch.dtype]:
    return sorted(operator(name).supported_dtypes("cpu"), key=str)


def op_samples(name: str, dtype: torch.dtype) -> list[SampleInput]:
    torch.manual_seed(0)
    grad = dtype.is_floating_point or dtype.is_complex
    # By default the reference inputs are the samples; an operator that has more lists them all.
    return list(operator(name).reference_inputs("cpu", dtype, requires_grad=grad))


def op_errors(name: str) -> list[ErrorInput]:
    record = operator(name)
    return list(record.error_inputs("cpu")) if record.error_inputs_func else []


def module(name: str) -> Any:
    """PyTorch's record of the module, with ours in its place, or None."""
    theirs = getattr(torch.nn, LOSSES[name])
    mine = copy(next((m for m in module_db if m.module_cls is theirs), None))
    if mine:
        mine.module_cls = getattr(fusedloss.nn, LOSSES[name])
    return mine


def module_dtypes(name: str) -> list[torch.dtype]:
    return sorted(module(name).supported_dtypes("cpu"), key=str) if module(name) else []


def module_samples(name: str, dtype: torch.dtype) -> list[ModuleInput]:
    torch.manual_seed(0)
    record = module(name)
    samples = record.module_inputs_func(
        record, device="cpu", dtype=dtype, requires_grad=True, training=True
    )
    # Of the hundreds of one loss, half types take every eighth.
    return samples[::8] if len(samples) > MANY and dtype.itemsize == 2 else samples


def module_errors(name: str, dtype: torch.dtype) -> list[ErrorModuleInput]:
    torch.manual_seed(0)
    record = module(name)
    if not (record and record.module_error_inputs_func):
        return []
    return record.module_error_inputs_func(
        record, device="cpu", dtype=dtype, requires_grad=False, training=True
    )


def nn_samples(name: str) -> list[dict[str, Any]]:
    """What PyTorch's test_nn.py adds: functional calls, and criteria without a batch."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        everything = [*common_nn.get_new_module_tests(), *common_nn.criterion_tests]
    found = []
    for record in everything:
        title = record.get("fullname", record.get("module_name", ""))
        if title.split("_")[0].removesuffix("2d").removesuffix("Nd") == LOSSES[name]:
            found.append(record)
    return found


def own_samples(name: str, dtype: torch.dtype) -> list[SampleInput]:
    """What PyTorch's records leave out; of a loss without a list here, every row, option and reduction."""
    if (
        name == "ctc_loss" and dtype.itemsize == 2
    ):  # PyTorch has none, and log_softmax rounds before it
        return []
    torch.manual_seed(0)
    return list(OWN[name](Draw(dtype)) if name in OWN else _of_registry(name, dtype))


def _of_registry(name: str, dtype: torch.dtype) -> Iterator[SampleInput]:
    generator = torch.Generator().manual_seed(0)
    for loss in REGISTRY.values():
        if loss.name != name:
            continue
        for option, reduction in itertools.product(loss.options.values(), loss.reductions):
            drawn = loss.example((4, 3), dtype, generator)
            first, *others = (
                t.requires_grad_() if k in loss.differentiable else t for k, t in enumerate(drawn)
            )
            settings = {**option(drawn, generator), "reduction": reduction}
            yield SampleInput(first, args=tuple(others), kwargs=settings)


class Draw:
    """Leaves of one type."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64).to(self.dtype).requires_grad_()

    def unit(self, *shape: int) -> Tensor:
        drawn = torch.rand(shape, dtype=torch.float64).mul(0.98).add(0.01)
        return drawn.to(self.dtype).requires_grad_()

    def positive(self, *shape: int) -> Tensor:
        return self.unit(*shape).detach()

    def tensor(self, values: Any) -> Tensor:
        return torch.tensor(values, dtype=self.dtype, requires_grad=True)


def _mse_loss(d: Draw) -> Iterator[SampleInput]:
    for reduction in REDUCTIONS:
        yield SampleInput(
            d.normal(4, 3), d.normal(4, 3), reduction=reduction, weight=d.positive(4, 3)
        )
    yield SampleInput(d.normal(0, 3), d.normal(0, 3), reduction="sum")
    yield SampleInput(d.normal(4, 3), d.normal(4, 3), size_average=False)


def _binary_cross_entropy(d: Draw) -> Iterator[SampleInput]:
    # The clamps at x = 0 and 1. PyTorch's gradient by the target has none: left out.
    x, t = d.tensor([0.0, 1.0, 0.0, 1.0, 0.5]), d.tensor([0.0, 1.0, 1.0, 0.0, 0.3]).detach()
    for reduction in REDUCTIONS:
        yield SampleInput(x, args=(t,), kwargs={"reduction": reduction}, name=SINGULAR)
        yield SampleInput(d.unit(4, 3), d.unit(4, 3), weight=d.positive(3), reduction=reduction)
        yield SampleInput(d.unit(4, 3), d.unit(4, 3), weight=d.positive(4, 1), reduction=reduction)
    yield SampleInput(d.unit(2), d.unit(2), reduce=False)


def _binary_cross_entropy_with_logits(d: Draw) -> Iterator[SampleInput]:
    big = d.tensor([80.0, -80.0, 1000.0, -1000.0])
    for reduction in REDUCTIONS:
        yield SampleInput(big, d.unit(4), reduction=reduction)
        yield SampleInput(
            d.normal(2, 4, 3),
            d.unit(2, 4, 3),
            weight=d.positive(4, 1),
            pos_weight=d.positive(4, 3),
            reduction=reduction,
        )
    yield SampleInput(d.normal(4), d.normal(4))  # targets outside [0, 1]


def _kl_div(d: Draw) -> Iterator[SampleInput]:
    for reduction in ("none", "mean", "batchmean", "sum"):
        x, t = d.normal(4, 3).log_softmax(-1), d.normal(4, 3)
        yield SampleInput(_leaf(x), _leaf(t.softmax(-1)), reduction=reduction)
        yield SampleInput(_leaf(x), _leaf(t.log_softmax(-1)), reduction=reduction, log_target=True)
        yield SampleInput(_leaf(x), _leaf(t[:1].softmax(-1)), reduction=reduction)
    yield SampleInput(_leaf(x[0, 0]), _leaf(t.softmax(-1)[0, 0]), reduction="batchmean")


def _cross_entropy(d: Draw) -> Iterator[SampleInput]:
    index = torch.tensor([2, 0, 4, 2, 1, 2])
    for reduction in REDUCTIONS:
        for smoothing in (0.0, 0.3, 1.0):
            yield SampleInput(
                d.normal(6, 5),
                index,
                weight=d.positive(5),
                ignore_index=2,
                label_smoothing=smoothing,
                reduction=reduction,
            )
            yield SampleInput(
                d.normal(2, 5, 3),
                index.reshape(2, 3),
                weight=d.positive(5),
                ignore_index=2,
                label_smoothing=smoothing,
                reduction=reduction,
            )
            yield SampleInput(
                d.normal(2, 5, 3),
                _leaf(d.normal(2, 5, 3).softmax(1)),
                weight=d.positive(5),
                label_smoothing=smoothing,
                reduction=reduction,
            )
        yield SampleInput(d.normal(5), torch.tensor(3), weight=d.positive(5), reduction=reduction)
        yield SampleInput(d.normal(5), _leaf(d.normal(5).softmax(0)), reduction=reduction)
    yield SampleInput(d.tensor([[80.0, -80.0], [-1000.0, 1000.0]]), torch.tensor([0, 1]))
    yield SampleInput(d.tensor([[80.0, -80.0], [-1000.0, 1000.0]]), torch.tensor([1, 0]))
    yield SampleInput(d.normal(6, 5), index.to(torch.uint8))


def _linear_cross_entropy(d: Draw) -> Iterator[SampleInput]:
    index = torch.tensor([2, 0, 4, 2, 1, 2])
    for reduction in REDUCTIONS:
        for smoothing in (0.0, 0.3, 1.0):
            for bias in (None, d.normal(5)):
                yield SampleInput(
                    d.normal(6, 3),
                    args=(d.normal(5, 3), index),
                    kwargs={
                        "linear_bias": bias,
                        "weight": d.positive(5),
                        "ignore_index": 2,
                        "label_smoothing": smoothing,
                        "reduction": reduction,
                    },
                )
            yield SampleInput(
                d.normal(4, 3),
                args=(d.normal(5, 2, 3), _leaf(d.normal(4, 5, 2).softmax(1))),
                kwargs={
                    "linear_bias": d.normal(5, 2),
                    "weight": d.positive(5),
                    "label_smoothing": smoothing,
                    "reduction": reduction,
                },
            )
        if LinearCrossEntropyOptions:
            yield SampleInput(
                d.normal(6, 3),
                args=(d.normal(5, 3), index),
                kwargs={
                    "linear_bias": d.normal(5),
                    "options": LinearCrossEntropyOptions(
                        batch_chunk_size=2, allow_retain_graph=True
                    ),
                    "reduction": reduction,
                },
            )


def _nll_loss(d: Draw) -> Iterator[SampleInput]:
    index = torch.tensor([2, 0, 4, 2, 1, 2])
    for reduction in REDUCTIONS:
        yield SampleInput(
            d.normal(6, 5), index, weight=d.positive(5), ignore_index=2, reduction=reduction
        )
        yield SampleInput(
            d.normal(2, 5, 3), index.reshape(2, 3), weight=d.positive(5), reduction=reduction
        )
    yield SampleInput(d.normal(6, 5), index.to(torch.uint8))
    yield SampleInput(d.normal(0, 5), index[:0], reduction="sum")


def _triplets(d: Draw, settings: list[dict[str, Any]]) -> Iterator[SampleInput]:
    for kwargs in [{"margin": 2.0, "swap": True}, *settings]:
        for reduction in REDUCTIONS:
            yield SampleInput(
                d.normal(3, 4),
                args=(d.normal(3, 4), d.normal(3, 4)),
                kwargs={**kwargs, "reduction": reduction},
            )
    yield SampleInput(d.normal(4), args=(d.normal(4), d.normal(4)))
    yield SampleInput(d.normal(3, 1, 4), args=(d.normal(1, 2, 4), d.normal(3, 2, 4)))


def _triplet_margin_loss(d: Draw) -> Iterator[SampleInput]:
    settings: list[dict[str, Any]] = [
        {"p": p, "margin": 3.0, "swap": swap}
        for p in (1.0, 1.5, 3.0, float("inf"))
        for swap in (False, True)
    ]
    return _triplets(d, [*settings, {"eps": 0.1}])


def _triplet_margin_with_distance_loss(d: Draw) -> Iterator[SampleInput]:
    distances = (torch.nn.PairwiseDistance(p=1), _manhattan, torch.nn.CosineSimilarity())
    return _triplets(d, [{"distance_function": f, "margin": 2.5} for f in distances])


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_()


def _manhattan(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).abs().sum(-1)


OWN: dict[str, Callable[[Draw], Iterator[SampleInput]]] = {
    "mse_loss": _mse_loss,
    "binary_cross_entropy": _binary_cross_entropy,
    "binary_cross_entropy_with_logits": _binary_cross_entropy_with_logits,
    "kl_div": _kl_div,
    "cross_entropy": _cross_entropy,
    "linear_cross_entropy": _linear_cross_entropy,
    "nll_loss": _nll_loss,
    "triplet_margin_loss": _triplet_margin_loss,
    "triplet_margin_with_distance_loss": _triplet_margin_with_distance_loss,
}


def counts() -> dict[str, dict[str, int]]:
    """The number of records of each loss by kind, without running them."""
    return {
        name: {
            "op_db": sum(len(op_samples(name, dtype)) for dtype in op_dtypes(name)),
            "op_db errors": len(op_errors(name)),
            "module_db": sum(len(module_samples(name, dtype)) for dtype in module_dtypes(name)),
            "module_db errors": sum(len(module_errors(name, d)) for d in module_dtypes(name)),
            "common_nn": len(nn_samples(name)),
            "own": sum(len(own_samples(name, dtype)) for dtype in DTYPES),
        }
        for name in LOSSES
    }
