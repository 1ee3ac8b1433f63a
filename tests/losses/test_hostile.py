"""Whatever a caller passes: PyTorch's value within bounds, or an exception of PyTorch's type, nothing else."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import deviations_of_rows  # noqa: F401
import deviations_of_sequences  # noqa: F401
import pytest
import sequences
import torch
from conftest import Outcome, run, same_bits
from deviations import deviations
from drawn import (
    DRAWN,
    INF,
    INTEGERS,
    MARGINS,
    POINTWISE,
    ROWS,
    TRIPLETS,
    Call,
    calls,
    show,
)
from hypothesis import HealthCheck, Phase, given, settings
from torch import Generator, Tensor

import fusedloss
from fusedloss.front.definition import REGISTRY

pytestmark = pytest.mark.filterwarnings("ignore")
TOLERANCE = {torch.float32: 3e-5, torch.float64: 1e-10, torch.bfloat16: 1e-2, torch.float16: 2e-3}


# What must come of it


def outcome(face: Any, call: Call, dtype: torch.dtype | None = None) -> Outcome | Exception:
    def typed(value: Any) -> Any:
        if dtype is None or not isinstance(value, Tensor):
            return value
        if value.is_complex():
            return value.to(dtype.to_complex())
        number = call.name in POINTWISE and value.dtype is not torch.bool  # and no index
        return value.to(dtype) if number or value.is_floating_point() else value

    tensors = tuple(map(typed, call.tensors))
    options = {k: typed(v) for k, v in call.options.items()}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return run(sequences.function_of(face, call.name), tensors, options, call.wanted)
    except AssertionError:
        raise
    except Exception as error:
        return error


def magnitude(tensor: Tensor) -> Tensor:
    return tensor.abs() if tensor.is_complex() else tensor.double().abs()


def most(tensor: Tensor) -> Tensor:
    return magnitude(tensor).nan_to_num(math.inf).max()


def weight(call: Call, name: str = "weight") -> list[Tensor]:
    return [call.options[name]] if name in call.options else []


def some_zero(call: Call) -> bool:
    target, log = call.tensors[1], call.options.get("log_target")
    return bool((target == (-INF if log else 0)).any())


# The deviations that a drawn call can meet, by their titles in docs/compatibility.md: whether this call
# may differ so.
MET: dict[str, Callable[[Call], bool]] = {
    "`kl_div`: an element whose target probability is 0 counts for nothing, in the value and in "
    "both gradients, whatever its input but NaN": lambda c: c.name == "kl_div" and some_zero(c),
    "`binary_cross_entropy`: the gradient by the target is clamped like the value, to 100": lambda c: (
        c.name == "binary_cross_entropy" and 1 in c.wanted
    ),
    "`cross_entropy` with probabilities: a class of probability or weight 0 counts for nothing, "
    "even where its logit is -inf": lambda c: (
        c.name == "cross_entropy" and bool((c.tensors[0] == -INF).any())
    ),
    "`cross_entropy` with an infinite probability: the gradient is the limit, and the loss inf or "
    "NaN": lambda c: c.name == "cross_entropy" and bool(magnitude(c.tensors[1]).isinf().any()),
    "`cross_entropy`: an ignored row has the gradient 0, whatever it holds": lambda c: (
        c.name == "cross_entropy" and not c.tensors[0].isfinite().all()
    ),
    "`cross_entropy`, `nll_loss`: class indices may be of any integer type": lambda c: (
        c.name in ROWS and c.tensors[1].dtype in INTEGERS[1:]
    ),
    "`cross_entropy`: a `label_smoothing` below 0 or NaN is refused": lambda c: (
        not c.options.get("label_smoothing", 0) >= 0
    ),
    "`triplet_margin_loss`: `p` must be above 0, and neither `p` nor `margin` NaN": lambda c: (
        not c.options.get("p", 2) > 0 or math.isnan(c.options.get("margin", 1))
    ),
    "`triplet_margin_loss` of unsigned integers: differences do not wrap around": lambda c: (
        c.name in TRIPLETS and wraps(c)
    ),
    "`binary_cross_entropy_with_logits` with a `pos_weight` of uint8: 0 - 1 does "
    "not wrap around": lambda c: c.name not in TRIPLETS and wraps(c),
    "`triplet_margin_loss`: a distance does not overflow where its powers would": lambda c: (
        c.name in TRIPLETS and any((magnitude(t) > 1e100).any() for t in c.tensors)
    ),
    "`triplet_margin_loss` with infinite coordinates: a loss of 0 has the gradient 0, and a NaN one no "
    "gradient that hides it": lambda c: (
        c.name in TRIPLETS and not all(t.isfinite().all() for t in c.tensors)
    ),
    "`mse_loss` refuses complex tensors, with a weight too": lambda c: (
        c.name == "mse_loss"
        and any(isinstance(t, Tensor) and t.is_complex() for t in (*c.tensors, *c.options.values()))
    ),
    "`soft_margin_loss`: value and gradient are finite for any finite score": lambda c: (
        c.name == "soft_margin_loss"
        and all(t.numel() for t in c.tensors)
        and bool((most(c.tensors[0]) * most(c.tensors[1]) > 10).any())
    ),
    "`soft_margin_loss`, `gaussian_nll_loss`, `binary_cross_entropy_with_logits`: no complex "
    "tensors": lambda c: (
        c.name in ("soft_margin_loss", "gaussian_nll_loss", "binary_cross_entropy_with_logits")
        and any(t.is_complex() for t in c.tensors)
    ),
    "`hinge_embedding_loss`, `margin_ranking_loss`, `soft_margin_loss` of integers: nothing wraps around, "
    "and the margin keeps its fraction": lambda c: (
        c.name in ("hinge_embedding_loss", "margin_ranking_loss", "soft_margin_loss")
        and any(t.dtype in INTEGERS for t in c.tensors)
    ),
    "`gaussian_nll_loss`: no square overflows that the variance makes small again": lambda c: (
        c.name == "gaussian_nll_loss" and any((magnitude(t) > 1e15).any() for t in c.tensors)
    ),
    "`gaussian_nll_loss` of no elements: the gradient by a variance that broadcasts is 0": lambda c: (
        c.name == "gaussian_nll_loss" and not all(t.numel() for t in c.tensors)
    ),
    "`l1_loss` and `huber_loss` refuse a complex `weight`": lambda c: (
        c.name in ("l1_loss", "huber_loss") and any(w.is_complex() for w in weight(c))
    ),
    "`poisson_nll_loss` with `full`: the gradient by a target that is infinite or not above 0 is the "
    "formula's": lambda c: (
        c.name == "poisson_nll_loss"
        and c.options["full"]
        and 1 in c.wanted
        and not c.tensors[1].is_complex()
        and not bool(((c.tensors[1] > 0) & c.tensors[1].isfinite()).all())
    ),
    "`binary_cross_entropy_with_logits`: the loss is 0 where the logit is infinite and right, and inf where "
    "it is partly right": lambda c: (
        c.name == "binary_cross_entropy_with_logits" and bool(magnitude(c.tensors[0]).isinf().any())
    ),
    "`binary_cross_entropy_with_logits` with an infinite target or `pos_weight`: the gradient is the "
    "formula's limit": lambda c: (
        c.name == "binary_cross_entropy_with_logits"
        and any((magnitude(t) > 1e38).any() for t in (c.tensors[1], *weight(c, "pos_weight")))
    ),
    "`nll_loss`: images of any layout have a gradient": lambda c: (
        c.name == "nll_loss" and c.tensors[0].dim() > 2 and bool(c.wanted)
    ),
    "`cross_entropy`, `nll_loss` of images without classes: any index is out of range": lambda c: (
        c.name in ROWS and c.tensors[0].dim() > 2 and c.tensors[0].shape[1] == 0
    ),
    "Types are checked of empty tensors too": lambda c: (
        any(t.numel() == 0 for t in c.tensors) and not all(t.is_floating_point() for t in c.tensors)
    ),
    "`kl_div` with a target that is infinite or subnormal: the gradient by it is the formula's": (
        lambda c: c.name == "kl_div" and 1 in c.wanted
    ),
    "`ctc_loss` takes half types on the CPU, and is differentiable twice and in forward mode": lambda c: (
        c.name == "ctc_loss" and c.tensors[0].dtype.itemsize == 2
    ),
    "`ctc_loss` without an alignment has the gradient 0, and so has a class of log-probability "
    "-inf": lambda c: c.name == "ctc_loss" and lacks_alignment(c),
    "`cosine_embedding_loss`: squares do not overflow, and products of integers do not wrap around": (
        lambda c: (
            c.name == "cosine_embedding_loss"
            and any(t.dtype.itemsize == 1 or (magnitude(t) > 200).any() for t in c.tensors[:2])
        )
    ),
    "`cosine_embedding_loss`: 1 - cos keeps its digits where the vectors are nearly parallel": (
        lambda c: c.name == "cosine_embedding_loss"
    ),
    "`multi_margin_loss`, `multilabel_margin_loss`: NaN passes on": lambda c: (
        c.name in MARGINS
        and not (c.tensors[0].isfinite().all() and math.isfinite(c.options.get("margin", 1)))
    ),
    "`multi_margin_loss`, `multilabel_margin_loss`: labels may be of any integer type, the input of half "
    "types on the CPU, and there is forward mode": lambda c: (
        c.name in MARGINS
        and (c.tensors[0].dtype.itemsize == 2 or c.tensors[1].dtype is not torch.int64)
    ),
    "`multi_margin_loss`, `multilabel_margin_loss`: over no row 'mean' is NaN and 'sum' 0": lambda c: (
        c.name in MARGINS and c.tensors[0].numel() == 0
    ),
    "`multilabel_soft_margin_loss`: the loss is 0 where the logit is infinite and right, and the gradient "
    "keeps its digits where a logit is right and sure": lambda c: (
        c.name == "multilabel_soft_margin_loss"
    ),
    "A bool tensor counts as 0 and 1": lambda c: any(
        isinstance(t, Tensor) and t.dtype is torch.bool for t in (*c.tensors, *c.options.values())
    ),
}


def lacks_alignment(call: Call) -> bool:
    options = {**call.options, "reduction": "none", "zero_infinity": False}
    found = outcome(fusedloss.functional, replace(call, options=options, wanted=()))
    every = (call.tensors[0], found.value) if isinstance(found, Outcome) else ()
    return not all(t.isfinite().all() for t in every)


def deviates(call: Call) -> bool:
    return any(may(call) for may in MET.values())


def related(ours: object, theirs: Exception) -> bool:
    """NotImplementedError is a RuntimeError."""
    return isinstance(ours, type(theirs)) or isinstance(theirs, type(ours))


def faults(call: Call, theirs: Exception) -> Iterator[Exception]:
    """What PyTorch raises for the call, and where arguments are mended: of several faults, any may be
    found first."""
    yield theirs
    mended = [
        replace(call, options={k: v for k, v in call.options.items() if k not in names})
        for count in (1, 2)
        for names in itertools.combinations(call.options, count)
    ]
    for k, t in enumerate(call.tensors):
        for dtype in (torch.float32, torch.int64):
            tensors = (*call.tensors[:k], t.real.to(dtype), *call.tensors[k + 1 :])
            mended.append(replace(call, tensors=tensors, wanted=()))
    if call.name in POINTWISE:  # of one shape
        shape = call.tensors[0].shape
        tensors = tuple(torch.zeros(shape, dtype=t.dtype) for t in call.tensors)
        mended.append(replace(call, tensors=tensors, wanted=()))
    for other in mended:
        found = outcome(torch.nn.functional, other)
        if isinstance(found, Exception):
            yield found


def wraps(call: Call) -> bool:
    """Whether PyTorch subtracts in an unsigned type."""
    subtracted = call.tensors if call.name in TRIPLETS else weight(call, "pos_weight")
    return any(t.dtype is torch.uint8 for t in subtracted)


def has_kink(call: Call) -> bool:
    """Whether rounding decides which side's derivative counts: a hinge or a difference of distances near 0."""
    if call.name not in TRIPLETS:
        return False
    wide = [t if t.is_complex() else t.double() for t in call.tensors]
    p, eps = call.options.get("p", 2.0), call.options.get("eps", 1e-6)
    pairs = ((0, 1), (0, 2), (1, 2))
    near, far, other = (torch.linalg.vector_norm(wide[i] - wide[j] + eps, p, -1) for i, j in pairs)
    hinges = [call.options["margin"] + near - d for d in (far, other)] + [far - other]
    size = 1 + near + far + other
    return any(bool((h.abs() <= 1e-3 * size).any()) for h in hinges)


def underflows(call: Call) -> bool:
    """Whether a weight becomes 0 where it is divided by the number of elements."""
    least = 1e4 * torch.finfo(torch.float64).tiny
    return any(bool(((magnitude(w) < least) & (w != 0)).any()) for w in weight(call))


def judge(call: Call) -> str | None:
    """What is wrong with our outcome, or None."""
    ours, theirs = outcome(fusedloss.functional, call), outcome(torch.nn.functional, call)
    if isinstance(theirs, Exception):
        if deviates(call) or any(related(ours, e) for e in faults(call, theirs)):
            return None
        shown = repr(ours) if isinstance(ours, Exception) else show(ours.value)
        return f"{shown}, but PyTorch raises {theirs!r}"
    if isinstance(ours, Exception):
        return None if deviates(call) else f"{ours!r}, but PyTorch gives {show(theirs.value)}"
    exact = outcome(torch.nn.functional, call, torch.float64)
    if isinstance(exact, Exception):
        exact = theirs
    for (name, a), (_, b), (_, e) in zip(ours.named(), theirs.named(), exact.named(), strict=True):
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            return f"{name} is {show(a)}, but PyTorch's {show(b)}"
        bad = ~close(a, b, e, call, name)
        if bad.any() and deviates(call):
            # On purpose, but only where PyTorch's is NaN, inf or cut off.
            bad &= b.isfinite() & e.isfinite() & (b != 0) & (not wraps(call))
            x = call.tensors[0]
            bad &= call.name not in MARGINS or bool(x.numel() and x.isfinite().all())
            bad &= not (call.name == "kl_div" and bool((magnitude(call.tensors[1]) < 1e-30).any()))
        if name != "value" and underflows(call) and not a.is_complex():
            bad &= ~(a.isinf() & b.isnan())  # 0 times an infinite slope
        if bad.any() and not (name != "value" and has_kink(call)):
            at = tuple(bad.nonzero()[0].tolist())[: a.dim()]  # complex ones have one more
            return f"{name}{list(at)} = {a[at]}, but PyTorch's {b[at]}, in float64 {e[at]}"
    return None


def close(a: Tensor, b: Tensor, e: Tensor, call: Call, name: str) -> Tensor:
    """Near the result in float64, or no further from it than twice PyTorch's, or the same special.

    A gradient may also overflow before it is divided by the number of elements.
    """
    tolerance = TOLERANCE.get(a.dtype, 1e-5)
    if a.is_complex():
        a, b, e = (torch.view_as_real(t) for t in (a, b, e))
    same = (a == b) | (a.isnan() & (b.isnan() | e.isnan())) | (a.double() == e.to(a.dtype).double())
    most = torch.finfo(torch.promote_types(a.dtype, torch.float32)).max
    a, b, e = a.double(), b.double(), e.double()
    finite = e[e.isfinite()].abs()
    scale = e.abs() + (finite.max() if finite.numel() else 0)
    count = max(call.tensors[0].numel(), 1)
    if name != "value":  # slopes of 1 may cancel
        scale = scale + (1 / count if "mean" in call.options.get("reduction", "mean") else 1)
    error, theirs = (a - e).abs(), (b - e).abs()
    near = (error <= tolerance * scale + 1e-30) | (error <= 2 * theirs)
    overflow = a.isinf() & (a.sign() == e.sign()) & (e.abs() * count > most)
    return same | overflow | (near & a.isfinite() & e.isfinite())


def hostile(count: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    checks = (HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example)
    return settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=checks,
        phases=(Phase.generate, Phase.shrink),
    )


def check(call: Call) -> None:
    wrong = judge(call)
    assert wrong is None, f"{call}\n{wrong}"


@pytest.mark.slow
@hostile(2_000)
@given(calls())
def test_any_call(call: Call) -> None:
    check(call)


@pytest.mark.nightly
@hostile(20_000)
@given(calls())
def test_any_call_of_many(call: Call) -> None:
    check(call)


def test_every_loss_is_drawn() -> None:
    """But those that PyTorch lacks, and of heads, of which it has one: tests/heads draws for them."""
    wanted = {row.name for row in REGISTRY.values() if row.kind != "heads"}
    wanted &= set(dir(torch.nn.functional))
    assert wanted == DRAWN.keys()


def test_met_deviations_are_on_the_page() -> None:
    assert MET.keys() <= deviations.keys()


# What the drawn calls found, or cannot reach


def test_rows_without_features_that_are_expanded() -> None:
    """They have no memory at all, not even that of one element."""
    x = torch.ones(5, 1).expand(5, 3)[:, :0]
    assert x.stride(1) == 0 and x.data_ptr() == 0
    assert fusedloss.triplet_margin_loss(x, x, x).item() == 1


@pytest.mark.parametrize("swap", [False, True])
def test_features_that_broadcast(swap: bool, generator: Generator) -> None:
    """Each distance is that of its own two tensors, expanded to each other and no further."""
    for shapes_of_call in itertools.product([(3, 1), (3, 8), (1, 1), (1, 8)], repeat=3):
        tensors = [torch.randn(s, dtype=torch.float64, generator=generator) for s in shapes_of_call]
        check(Call("triplet_margin_loss", tuple(tensors), {"swap": swap, "margin": 9.0}, (0, 1, 2)))


HUGE = 2**40
ONE, INDEX = torch.ones(1), torch.zeros(1, dtype=torch.long)
HUGE_CALLS = {
    "mse_loss": (ONE.expand(HUGE), torch.ones(3)),
    "kl_div": (ONE.expand(HUGE, 2), torch.ones(3, 2)),
    "binary_cross_entropy": (ONE.expand(HUGE), ONE.expand(HUGE - 1)),
    "cross_entropy": (ONE.expand(HUGE, 3), INDEX.expand(HUGE, 1)),
    "nll_loss": (ONE.expand(HUGE, 3), INDEX.expand(HUGE - 1)),
    "triplet_margin_loss": (ONE.expand(HUGE, 3), ONE.expand(HUGE, 2), ONE.expand(HUGE, 3)),
}


@pytest.mark.parametrize("name", HUGE_CALLS)
def test_huge_tensors_are_refused_at_once(name: str) -> None:
    tensors = HUGE_CALLS[name]
    kinds = []
    for face in (torch.nn.functional, fusedloss.functional):
        with pytest.raises(Exception) as caught:
            getattr(face, name)(*tensors)
        kinds.append(caught.type)
    assert kinds[0] is kinds[1]


def test_huge_and_empty() -> None:
    x = torch.empty(HUGE, 0)
    for reduction in ("none", "mean", "sum"):
        ours = fusedloss.mse_loss(x, x, reduction=reduction)
        theirs = torch.nn.functional.mse_loss(x, x, reduction=reduction)
        assert ours.shape == theirs.shape and same_bits(ours, theirs)
