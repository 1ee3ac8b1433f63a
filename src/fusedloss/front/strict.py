"""What `fusedloss.checks("strict")` refuses: what PyTorch lets pass and users rue.

A rule looks at one call and says what is wrong with it, or None; its docstring is its line in
docs/compatibility.md. All refusals are ValueError. The rules read values, which waits for a GPU, so
they are skipped where there are none to read: under torch.compile, torch.func transforms, tracing,
dispatch modes, and for tensor subclasses and meta tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core import errors, plain, torch_state

FEWEST_PROBABILITIES = 16  # so many logits are hardly all in [0, 1] by chance


class Seen(NamedTuple):
    """A call whose arguments have passed the usual checks."""

    loss: str
    input: Tensor
    target: Tensor
    reduction: str = "none"
    ignore_index: int | None = -100
    log_target: bool = False
    activation: str = "softmax"

    @property
    def holds_indices(self) -> bool:
        return not self.target.is_floating_point()

    @property
    def counted(self) -> Tensor:
        """The rows whose class index is not ignored."""
        assert self.ignore_index is not None  # by the losses of classes
        return self.target.to(torch.int64) != self.ignore_index

    @property
    def by_class(self) -> bool:
        """Whether one dimension is known to be that of the classes."""
        return self.loss in ("cross_entropy", "nll_loss", "softmax_focal_loss")

    @property
    def class_dim(self) -> int:
        return min(self.input.dim() - 1, 1)


Rule = Callable[[Seen], str | None]


def same_shape(seen: Seen) -> str | None:
    """input and target of different shapes, which would broadcast"""
    x, t = seen.input, seen.target
    if x.shape == t.shape:
        return None
    common = list(errors.broadcast(seen.loss, input=x, target=t))
    fix = "target.reshape(input.shape)" if x.numel() == t.numel() else "expand the smaller one"
    return (
        f"input {list(x.shape)} and target {list(t.shape)} would broadcast to {common}; if that is "
        f"not meant: {fix}"
    )


def no_mean_of_kl(seen: Seen) -> str | None:
    """`reduction='mean'` of `kl_div`, which divides by the classes too"""
    if seen.reduction != "mean":
        return None
    return (
        f"reduction='mean' divides by all {seen.target.numel()} elements, classes included, and is no "
        "KL divergence: use reduction='batchmean'"
    )


def batch_is_all_rows(seen: Seen) -> str | None:
    """`reduction='batchmean'` of `kl_div` where more than one dimension follows the batch, such as
    (B, T, V), which divides by B alone"""
    shape = errors.broadcast(seen.loss, input=seen.input, target=seen.target)
    if seen.reduction != "batchmean" or 0 in shape or sum(n > 1 for n in shape[1:]) < 2:
        return None
    return (
        f"reduction='batchmean' divides by {shape[0]}, dimension 0 of {list(shape)}, alone: the loss grows "
        "with the number of rows in the others. Make them one, input.flatten(0, -2) and target.flatten(0, -2) "
        "where the classes are last, or divide reduction='sum' by the number of rows"
    )


def target_is_number(seen: Seen) -> str | None:
    """NaN in the target"""
    if seen.holds_indices:
        return None
    return _first(seen.target, seen.target.isnan(), "target", "leave such elements out")


def target_is_probability(seen: Seen) -> str | None:
    """a target outside [0, 1] of `binary_cross_entropy_with_logits`"""
    t = seen.target
    fix = "targets are probabilities in [0, 1] (for labels -1 and 1: (target + 1) / 2)"
    bad = ~((t >= 0) & (t <= 1))
    if seen.ignore_index is not None:
        bad &= t != seen.ignore_index
    return _first(t, bad, "target", fix)


def target_is_sign(seen: Seen) -> str | None:
    """a target other than -1 and 1 where these are the labels"""
    t = seen.target
    fix = "labels are -1 and 1 (for 0 and 1: 2 * target - 1)"
    return _first(t, (t != 1) & (t != -1), "target", fix)


def target_is_distribution(seen: Seen) -> str | None:
    """probabilities as the target that are negative or do not sum to 1: over the classes in
    `cross_entropy`, over no dimension at all in `kl_div`"""
    t = seen.target
    if seen.holds_indices or not t.dim():
        return None
    if seen.log_target:
        fix = "log-probabilities are at most 0 (log_target=False takes probabilities)"
        bad = _first(t, t > _tolerance(t), "target", fix)
    else:
        bad = _first(t, t < 0, "target", "probabilities are not negative")
    if bad:
        return bad
    p = t.double().exp() if seen.log_target else t.double()
    dims = [seen.class_dim] if seen.by_class else range(t.dim())
    offs = [(p.sum(dim) - 1).abs() > _tolerance(t) for dim in dims]
    if not all(off.any() for off in offs):
        return None
    dim, off = dims[-1], offs[-1]
    at = int(off.flatten().nonzero()[0])
    total = (p.sum(dim).flatten()[at]).item()
    where = errors.position(at, off.shape)
    return (
        f"target sums to {total:g} over dimension {dim}{' at ' + where if where else ''}, not to 1: "
        "normalise it, target / target.sum(dim, keepdim=True), or drop the row"
    )


def input_is_log_probability(seen: Seen) -> str | None:
    """an input above 0 where log-probabilities are expected: probabilities, or logits"""
    x = seen.input
    likely = bool(((x >= 0) & (x <= 1)).all())
    fix = (
        "these look like probabilities, pass their log" if likely else "pass log_softmax of logits"
    )
    bad = x > _tolerance(x)
    if seen.holds_indices:  # what an ignored row holds does not matter
        rows = x.shape[: seen.class_dim] + x.shape[seen.class_dim + 1 :]
        bad = bad & seen.counted.reshape(rows).unsqueeze(seen.class_dim)
    return _first(x, bad, "input", f"log-probabilities are at most 0: {fix}")


def input_is_no_softmax(seen: Seen) -> str | None:
    """softmax outputs as the input of `cross_entropy`: every row in [0, 1] with the sum 1"""
    x, dim = seen.input, seen.class_dim
    if seen.activation != "softmax":
        return input_is_no_sigmoid(seen) if seen.activation == "sigmoid" else None
    if not x.numel() or x.shape[dim] < 2 or not ((x >= 0) & (x <= 1)).all():
        return None
    sums = x.double().sum(dim)
    if ((sums - 1).abs() > _tolerance(x)).any():
        return None
    return (
        f"input looks like softmax outputs: all {sums.numel()} rows lie in [0, 1] and sum to 1 (input"
        f"{errors.position(0, x.shape)} = {x.flatten()[0].item():g}). Pass the logits: {seen.loss} takes "
        "their softmax itself"
    )


def input_is_no_sigmoid(seen: Seen) -> str | None:
    """sigmoid outputs as the input of `binary_cross_entropy_with_logits`: 16 elements or more, not all
    alike, all in [0, 1]"""
    x = seen.input
    if x.numel() < FEWEST_PROBABILITIES or not ((x >= 0) & (x <= 1)).all():
        return None
    low, high = x.min().item(), x.max().item()
    if low == high:
        return None  # such as the zeros of a fresh layer
    other = ", or use binary_cross_entropy" if "cross_entropy" in seen.loss else ""
    return (
        f"input looks like probabilities: all {x.numel()} elements lie in [{low:g}, {high:g}]. Pass the "
        f"logits{other}"
    )


def some_row_counts(seen: Seen) -> str | None:
    """a batch whose rows are all ignored, with the reduction 'mean', which is NaN"""
    t = seen.target
    if not seen.holds_indices or seen.reduction != "mean" or not t.numel():
        return None
    if seen.counted.any():
        return None
    return (
        f"all {t.numel()} targets are ignore_index = {seen.ignore_index}, and the mean over no row is NaN: "
        "skip the batch, or divide reduction='sum' by the number of counted rows yourself"
    )


RULES: dict[str, tuple[Rule, ...]] = {}  # by loss; @loss writes them


def table() -> list[tuple[str, list[str]]]:
    """Each rule in its own words, and the losses that it is of."""
    rules = dict.fromkeys(rule for rules in RULES.values() for rule in rules)
    return [
        (" ".join((rule.__doc__ or "").split()), [n for n, own in RULES.items() if rule in own])
        for rule in rules
    ]


def check(loss: str, input: Tensor, target: Tensor, **settings: Any) -> None:
    """Applies the rules of a loss.

    Raises:
        ValueError: one of them is broken.
    """
    if not _readable(input, target):
        return
    plain.check(loss, input=input, target=target)
    with torch.no_grad():
        seen = Seen(loss, input, target, **settings)
        for rule in RULES[loss]:
            if message := rule(seen):
                errors.fail(ValueError, loss, f"{message} (checks = 'strict')")


def _readable(*tensors: Tensor) -> bool:
    return not (
        torch_state.is_compiling()
        or torch_state.transforms_active()
        or torch_state.dispatch_modes()
        or torch_state.is_tracing()
    ) and all(type(t) in plain.PLAIN and not t.is_meta for t in tensors)


def _tolerance(tensor: Tensor) -> float:
    """What rounding, or probabilities written with three digits, may be off by."""
    return max(1e-3, 4 * torch.finfo(tensor.dtype).eps)


def _first(tensor: Tensor, bad: Tensor, name: str, fix: str) -> str | None:
    """The first bad element, or None."""
    if not bad.any():
        return None
    at = int(bad.flatten().nonzero()[0])
    value = tensor.flatten()[at].item()
    return f"{name}{errors.position(at, tensor.shape)} = {value:g}: {fix}"
