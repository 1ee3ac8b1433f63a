"""Metric learning: triplet losses over p-norms, and over any distance; the cosine of pairs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..core import errors, torch_state, trace
from ..core.reduce import promoted, resolve, result_dtype, total
from ..front import vectors
from ..front.composed import Composed
from ..front.definition import BenchCase, Bounds, normal, options, plain, row
from ..front.loss import loss
from ..front.settings import divisor, number, positive
from ..front.strict import target_is_sign
from ..kinds import torch_m as m
from ..kinds.formula import Pointwise
from ..kinds.pointwise import PointwiseCall
from ..kinds.reduction import Distances, Reduction, Sums
from ..route.entry import dispatch
from ..route.memo import Asked, repeat_over

Distance = Callable[[Tensor, Tensor], Tensor]

# As they are at import: what has been put in their place is called.
PAIRWISE = torch.pairwise_distance
OWN = {
    name: getattr(torch.nn.PairwiseDistance, name)
    for name in ("forward", "__call__", "_call_impl", "_wrapped_call_impl")
}


def triplet_hinge(near, far, *, margin):
    return m.maximum(margin + near - far, 0.0)


def triplet_hinge_grad(near, far, *, margin):
    slope = m.where(margin + near - far < 0.0, 0.0, 1.0)
    return slope, -slope


def swapped_hinge(near, far, other, *, margin):
    least = m.where((other < far) | (other != other), other, far)
    return m.maximum(margin + near - least, 0.0)


def swapped_hinge_grad(near, far, other, *, margin):
    """As torch.minimum: NaN passes on, a tie shares the derivative."""
    least = m.where((other < far) | (other != other), other, far)
    slope = m.where(margin + near - least < 0.0, 0.0, 1.0)
    by_far = m.where(far < other, 1.0, m.where(other < far, 0.0, 0.5))
    return slope, -slope * by_far, -slope * (1.0 - by_far)


HINGE = Pointwise(triplet_hinge, triplet_hinge_grad)
TRIPLET = Reduction(
    "triplet", "triplet_margin_loss", Distances(("anchor", "positive", "negative"), 2), HINGE
)
TRIPLET_SWAP = Reduction(
    "triplet_swap",
    "triplet_margin_loss",
    Distances(("anchor", "positive", "negative"), 3),
    Pointwise(swapped_hinge, swapped_hinge_grad),
)


def _example(shape, dtype, generator):
    return tuple(normal(shape, dtype, generator) for _ in range(3))


def _manhattan(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).abs().sum(-1)


@loss(
    "TripletMarginLoss",
    vectors.Triplets(),
    row(
        _example,
        {
            "plain": plain,
            "swap": lambda t, g: {"swap": True},
            "p = 1": lambda t, g: {"p": 1.0, "margin": 2.0},
            "p = 3": lambda t, g: {"p": 3.0, "swap": True},
            "p = 0.7": lambda t, g: {"p": 0.7, "margin": 5.0},
            "p = inf": lambda t, g: {"p": float("inf")},
            "eps": lambda t, g: {"eps": 0.1, "margin": 0.5},
        },
        differentiable=(0, 1, 2),
        bench=(
            BenchCase(
                *("triplet 16384x256", (16384, 256)),
                compiled=True,
                at_most={"compile": 0.8, "eager": 0.2},
            ),
            BenchCase("triplet 65536x512", (65536, 512), group="gpu", compiled=True),
            BenchCase("triplet 65536x512 bf16", (65536, 512), "bfloat16", group="gpu"),
        ),
    ),
    margin=positive,
    p=positive,
)
def triplet_margin_loss(margin, p, eps, swap):
    r"""Triplet margin loss: :math:`\ell = \max(d(a, x^+) - d(a, x^-) + \text{margin}, 0)`.

    The distance is :math:`d(a, b) = \lVert a - b + \epsilon \rVert_p` over the last dimension, with
    eps inside the difference as in :func:`torch.nn.functional.pairwise_distance`; its gradient is 0 at
    distance 0. With `swap`, the negative distance is the lesser of d(a, x-) and d(x+, x-). As
    :func:`torch.nn.functional.triplet_margin_loss`
    (https://docs.pytorch.org/docs/stable/generated/torch.nn.TripletMarginLoss.html;
    https://bmva-archive.org.uk/bmvc/2016/papers/paper119/index.html).

    Args:
        anchor: (..., D).
        positive: of the same shape; other shapes of as many dimensions broadcast.
        negative: likewise.
        margin: above 0, in units of the distance.
        p: the norm's degree, above 0; inf is the largest coordinate.
        eps: added to each coordinate of the differences.
        swap: whether to take the lesser negative distance.
        reduction: 'none', 'mean' (over the triplets) or 'sum'.
    """
    return vectors.Norms(TRIPLET_SWAP if swap else TRIPLET, p, eps, margin)


@loss(
    "TripletMarginWithDistanceLoss",
    Composed("in the type of the distances (float32 under autocast)", vectors.RAISES),
    row(
        _example,
        {
            "plain": plain,
            "swap": lambda t, g: {"swap": True, "margin": 2.0},
            "lambda": lambda t, g: {"distance_function": _manhattan, "margin": 3.0},
            "lambda, swap": lambda t, g: {"distance_function": _manhattan, "swap": True},
            "module": lambda t, g: {"distance_function": torch.nn.PairwiseDistance(p=1)},
        },
        differentiable=(0, 1, 2),
        kind="triplet",
        bench=(BenchCase("triplet, own distance 16384x256", (16384, 256), group="options"),),
    ),
)
def triplet_margin_with_distance_loss(
    anchor: Tensor,
    positive: Tensor,
    negative: Tensor,
    *,
    distance_function: Distance | None,
    margin: Tensor | float,
    swap: bool,
    reduction: str,
    denominator: Tensor | float | None = None,
) -> Tensor:
    r"""Triplet margin loss over any distance: :math:`\ell = \max(d(a, x^+) - d(a, x^-) + \text{margin}, 0)`.

    As :func:`torch.nn.functional.triplet_margin_with_distance_loss`
    (https://docs.pytorch.org/docs/stable/generated/torch.nn.TripletMarginWithDistanceLoss.html).

    Args:
        anchor: (N, ...), as the distance takes them.
        positive: likewise.
        negative: likewise.
        distance_function: a function of two tensors, or a module. The default is the pairwise
            Euclidean distance; it and any :class:`torch.nn.PairwiseDistance` run fused.
        margin: above 0, in units of the distance; a tensor is differentiated by.
        swap: whether to take the lesser of d(a, x-) and d(x+, x-).
        reduction: 'none', 'mean' (over the triplets) or 'sum'.

    Raises:
        ValueError: `margin` not above 0.
        TypeError: a `margin` that is no number, a distance that is no function.
    """
    name = "triplet_margin_with_distance_loss"
    reduction, swap = resolve(name, reduction), errors.truth(name, "swap", swap)
    given = margin
    if not isinstance(margin, Tensor) or margin.is_complex():
        margin = errors.number(name, "margin", margin)
    elif margin.numel() != 1:
        words = f"margin must be one number, got shape {list(margin.shape)}: Boolean value of Tensor with more "
        errors.fail(RuntimeError, name, words + "than one value is ambiguous")
    distance = distance_function
    if distance is None:
        distance = torch.pairwise_distance
    errors.function(name, "distance_function", distance)
    if not margin > 0:
        errors.fail(ValueError, name, f"margin must be greater than 0, got {margin}")
    by = divisor(name, denominator, reduction, anchor=anchor)
    vectors.check(name, anchor, positive, negative)
    norm = _norm(distance)
    if not (isinstance(margin, Tensor) or norm is None):
        settings, tensors = (*norm, margin, swap, reduction), (anchor, positive, negative)
        if (known := repeat_over(name, settings, tensors, by)) is not None:
            return known
        norms = vectors.Norms(TRIPLET_SWAP if swap else TRIPLET, *norm, margin)
        return vectors.run(name, tensors, norms, reduction, Asked(settings, tensors), by)
    near, far = distance(anchor, positive), distance(anchor, negative)
    if swap:
        far = torch.minimum(far, distance(positive, negative))
    if isinstance(margin, Tensor) or not near.is_floating_point():
        # It may learn, and the hinge has numbers alone; or it makes the type of the sum.
        near, margin = near + given, 0.0
    apart = margin, reduction
    if (known := repeat_over(name, apart, (near, far), by)) is not None:
        return known
    errors.broadcast(name, positive_distance=near, negative_distance=far)
    dtype = promoted(near, far)
    if not dtype.is_floating_point:
        return _of_integers(name, near, far, reduction, by)
    dtype = result_dtype(dtype, near)
    call = PointwiseCall(HINGE, (margin,), reduction, None, dtype, loss=name)
    return dispatch(name, call, (near, far, None), None, Asked(apart, (near, far)), by)


def _of_integers(
    name: str, near: Tensor, far: Tensor, reduction: str, by: Tensor | float | None
) -> Tensor:
    """Losses of integer distances and an integer margin, which no kernel holds."""
    if reduction == "mean" and by is None:
        words = "mean(): could not infer output dtype of integer distances: pass a float margin"
        errors.fail(RuntimeError, name, words)
    trace.note(name, None, f"the distances are of {near.dtype}")
    return total(torch.clamp_min(near - far, 0), reduction, by)


def _norm(distance: Distance) -> tuple[float, float] | None:
    """Degree and eps of a distance that the kernel knows, or None."""
    if distance is PAIRWISE:
        return 2.0, 1e-6
    if type(distance) is not torch.nn.PairwiseDistance or not _does_only_its_forward(distance):
        return None
    degree, eps, keepdim = distance.norm, distance.eps, distance.keepdim
    if type(degree) in (int, float) and type(eps) in (int, float) and not keepdim and degree > 0:
        return degree, eps
    return None


def _does_only_its_forward(module: torch.nn.Module) -> bool:
    """Whether to call this PairwiseDistance is to take torch's distance, and nothing else."""
    return (
        not torch_state.hooked(module)
        and module._compiled_call_impl is None
        and "_call_impl" not in module.__dict__
        and module.forward == OWN["forward"].__get__(module)
        and all(getattr(torch.nn.PairwiseDistance, name) is own for name, own in OWN.items())
        and torch.nn.functional.pairwise_distance is PAIRWISE
    )


def products(input1, input2):
    return input1 * input2, input1 * input1, input2 * input2


def products_slope(input1, input2, by_dot, by_first, by_second):
    return by_dot * input2 + 2.0 * by_first * input1, by_dot * input1 + 2.0 * by_second * input2


def cosine_hinge(dot, first, second, target, *, margin):
    cosine = dot / (m.sqrt(first + 1e-12) * m.sqrt(second + 1e-12))
    apart = m.where(target == -1.0, m.maximum(cosine - margin, 0.0), 0.0)
    return m.where(target == 1.0, 1.0 - cosine, apart)


def cosine_hinge_grad(dot, first, second, target, *, margin):
    size = m.sqrt(first + 1e-12) * m.sqrt(second + 1e-12)
    cosine = dot / size
    apart = m.where((target == -1.0) & ((cosine >= margin) | (cosine != cosine)), 1.0, 0.0)
    by = m.where(target == 1.0, -1.0, apart)
    slope = m.where(by == 0.0, 0.0, by * cosine * -0.5)
    return (
        m.where(by == 0.0, 0.0, by / size),
        m.where(by == 0.0, 0.0, slope / (first + 1e-12)),
        m.where(by == 0.0, 0.0, slope / (second + 1e-12)),
    )


COSINE = Reduction(
    "cosine",
    "cosine_embedding_loss",
    Sums(products, products_slope),
    Pointwise(cosine_hinge, cosine_hinge_grad),
)


def _pairs(shape, dtype, generator):
    x, y = normal(shape, dtype, generator), normal(shape, dtype, generator)
    similar = torch.randint(2, shape[:-1], generator=generator)
    return x, y, (2 * similar - 1).to(dtype)


@loss(
    "CosineEmbeddingLoss",
    vectors.Pairs(COSINE),
    row(
        _pairs,
        options(margin=0.2),
        dims=2,
        bench=(
            BenchCase(
                *("cosine 16384x256", (16384, 256)),
                compiled=True,
                at_most={"eager": 0.25},
            ),
            BenchCase("cosine 65536x512", (65536, 512), group="gpu", compiled=True),
        ),
        # 1 - cos of a float64 that is near 1 has few digits of what remains.
        bounds=Bounds(float64=(1e5, 4), formula=(1e5, 4)),
    ),
    rules=(target_is_sign,),
    margin=number,
)
def cosine_embedding_loss(margin):
    r"""Similar pairs (y = 1) are drawn together, others (y = -1) apart, by the cosine between them.

    .. math::
        \ell = \begin{cases} 1 - \cos(a, b) & \text{if } y = 1 \\
        \max(\cos(a, b) - \text{margin}, 0) & \text{if } y = -1 \end{cases}

    With :math:`\cos(a, b) = a \cdot b / \sqrt{(a \cdot a + \epsilon)(b \cdot b + \epsilon)}` and
    :math:`\epsilon = 10^{-12}`, as PyTorch has it: where a is 0 the cosine is 0, and its gradient by a is
    :math:`10^6\, b / \lVert b \rVert`. A pair with another y has the loss 0.

    Args:
        input1: a, (N, D) or (D).
        input2: b, of the same shape; other sizes broadcast.
        target: y, (N) or (); 1 or -1, of any type.
        margin: a cosine.
        reduction: 'none', 'mean' (over all pairs) or 'sum'.
    """
    return (margin,)
