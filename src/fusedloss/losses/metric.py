"""Metric learning: triplet losses over p-norms, and over any distance."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from ..core import errors, torch_state, trace
from ..core.reduce import promoted, resolve, result_dtype, total
from ..front.definition import BenchCase, Loss, normal, plain, register
from ..kinds import torch_m as m
from ..kinds.formula import Pointwise
from ..kinds.pointwise import PointwiseCall
from ..kinds.triplet import TripletCall
from ..route.dispatch import dispatch
from ..route.memo import repeat

Distance = Callable[[Tensor, Tensor], Tensor]

# As they are at import: what has been put in their place is called.
PAIRWISE = torch.pairwise_distance
OWN = {
    name: getattr(torch.nn.PairwiseDistance, name)
    for name in ("forward", "__call__", "_call_impl", "_wrapped_call_impl")
}
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def triplet_hinge(near, far, *, margin):
    return m.maximum(margin + near - far, 0.0)


def triplet_hinge_grad(near, far, *, margin):
    slope = m.where(margin + near - far < 0.0, 0.0, 1.0)
    return slope, -slope


HINGE = Pointwise(triplet_hinge, triplet_hinge_grad)


def triplet_margin_loss(
    anchor: Tensor,
    positive: Tensor,
    negative: Tensor,
    margin: float = 1.0,
    p: float = 2,
    eps: float = 1e-6,
    swap: bool = False,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
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
        size_average: deprecated, overrides `reduction`.
        reduce: deprecated, overrides `reduction`.
        reduction: 'none', 'mean' (over the triplets) or 'sum'.

    Returns:
        A scalar, or the losses of all triplets with 'none', in the type that the inputs promote to
        (float32 under autocast).

    Raises:
        ValueError: unknown `reduction`; `margin` or `p` not above 0.
        RuntimeError: numbers of dimensions that differ; shapes that do not broadcast; devices that
            differ; the inf norm of no coordinates.
        TypeError: an argument that is no tensor; a `margin`, `p` or `eps` that is no number, a `swap` that is
            no bool.
    """
    if has_torch_function_variadic(anchor, positive, negative):
        return handle_torch_function(
            triplet_margin_loss,
            (anchor, positive, negative),
            anchor,
            positive,
            negative,
            margin=margin,
            p=p,
            eps=eps,
            swap=swap,
            size_average=size_average,
            reduce=reduce,
            reduction=reduction,
        )
    name = "triplet_margin_loss"
    plain = size_average is reduce is None and (swap is False or swap is True)
    settings = (reduction, margin, p, eps, swap) if plain else None
    if settings and (known := repeat(name, (anchor, positive, negative), settings)) is not None:
        return known
    reduction = resolve(name, reduction, size_average, reduce)
    margin = errors.number(name, "margin", margin)
    p, eps = errors.number(name, "p", p), errors.number(name, "eps", eps)
    errors.boolean(name, "swap", swap)
    _check(name, anchor, positive, negative, margin)
    if not p > 0:
        errors.fail(ValueError, name, f"p must be greater than 0, got {p}")
    return _triplet(name, anchor, positive, negative, margin, p, eps, swap, reduction, settings)


def triplet_margin_with_distance_loss(
    anchor: Tensor,
    positive: Tensor,
    negative: Tensor,
    *,
    distance_function: Distance | None = None,
    margin: Tensor | float = 1.0,
    swap: bool = False,
    reduction: str = "mean",
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

    Returns:
        A scalar, or the losses of all triplets with 'none', in the type of the distances (float32
        under autocast).

    Raises:
        ValueError: unknown `reduction`; `margin` not above 0.
        RuntimeError: numbers of dimensions that differ; shapes that do not broadcast; devices that
            differ.
        TypeError: an argument that is no tensor; a `margin` that is no number, a distance that is no function.
    """
    if has_torch_function_variadic(anchor, positive, negative):
        return handle_torch_function(
            triplet_margin_with_distance_loss,
            (anchor, positive, negative),
            anchor,
            positive,
            negative,
            distance_function=distance_function,
            margin=margin,
            swap=swap,
            reduction=reduction,
        )
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
    _check(name, anchor, positive, negative, margin)
    norm = _norm(distance)
    if not (isinstance(margin, Tensor) or norm is None):
        return _triplet(name, anchor, positive, negative, margin, *norm, swap, reduction)
    near, far = distance(anchor, positive), distance(anchor, negative)
    if swap:
        far = torch.minimum(far, distance(positive, negative))
    if isinstance(margin, Tensor) or not near.is_floating_point():
        # It may learn, and the hinge has numbers alone; or it makes the type of the sum.
        near, margin = near + given, 0.0
    errors.broadcast(name, positive_distance=near, negative_distance=far)
    dtype = promoted(near, far)
    if not dtype.is_floating_point:
        return _of_integers(name, near, far, reduction)
    call = PointwiseCall(HINGE, (margin,), reduction, None, result_dtype(dtype, near))
    return dispatch(name, call, (near, far, None))


def _of_integers(name: str, near: Tensor, far: Tensor, reduction: str) -> Tensor:
    """Losses of integer distances and an integer margin, which no kernel holds."""
    if reduction == "mean":
        words = "mean(): could not infer output dtype of integer distances: pass a float margin"
        errors.fail(RuntimeError, name, words)
    trace.note(name, None, f"the distances are of {near.dtype}")
    return total(torch.clamp_min(near - far, 0), reduction)


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
        not any(getattr(module, hooks) for hooks in HOOKS)
        and not torch_state.any_module_hook()
        and module._compiled_call_impl is None
        and "_call_impl" not in module.__dict__
        and module.forward == OWN["forward"].__get__(module)
        and all(getattr(torch.nn.PairwiseDistance, name) is own for name, own in OWN.items())
        and torch.nn.functional.pairwise_distance is PAIRWISE
    )


def _check(
    name: str, anchor: Tensor, positive: Tensor, negative: Tensor, margin: Tensor | float
) -> None:
    for tensor in (anchor, positive, negative):
        if not isinstance(tensor, Tensor):
            errors.not_tensors(name, TypeError, anchor=anchor, positive=positive, negative=negative)
    if not margin > 0:
        errors.fail(ValueError, name, f"margin must be greater than 0, got {margin}")
    if not anchor.device == positive.device == negative.device:
        errors.same_device(name, anchor=anchor, positive=positive, negative=negative)
    if not anchor.dim() == positive.dim() == negative.dim():
        errors.fail(
            RuntimeError,
            name,
            "The anchor, positive, and negative tensors are expected to have the same number of "
            f"dimensions, but got: anchor {anchor.dim()}D, positive {positive.dim()}D, and negative "
            f"{negative.dim()}D inputs",
        )


def _triplet(
    name: str,
    anchor: Tensor,
    positive: Tensor,
    negative: Tensor,
    margin: float,
    p: float,
    eps: float,
    swap: bool,
    reduction: str,
    settings: tuple[object, ...] | None = None,
) -> Tensor:
    tensors = (anchor, positive, negative)
    errors.not_narrow(name, "add_stub", anchor=anchor, positive=positive, negative=negative)
    dtype = anchor.dtype
    if not anchor.shape == positive.shape == negative.shape:
        errors.broadcast(name, anchor=anchor, positive=positive, negative=negative)
    for other in tensors[1:]:
        if other.dtype != dtype:
            dtype = torch.promote_types(dtype, other.dtype)
    if dtype != anchor.dtype or dtype != positive.dtype or dtype != negative.dtype:
        # The distance of two integer tensors has the default type, whatever the third is.
        pairs = ((anchor, positive), (anchor, negative), (positive, negative))[: 2 + swap]
        for pair in pairs:
            if not any(t.is_floating_point() or t.is_complex() for t in pair):
                dtype = torch.promote_types(dtype, torch.get_default_dtype())
    if dtype.is_complex:
        dtype = dtype.to_real()
    elif not dtype.is_floating_point:
        dtype = torch.get_default_dtype()
    if p == math.inf and anchor.dim() and 0 in {t.shape[-1] for t in tensors}:
        errors.fail(
            RuntimeError,
            name,
            "linalg.vector_norm cannot compute the inf norm on the last dimension because it is empty",
        )
    why = None if anchor.dim() else "the inputs are 0-dim"
    if anchor.dim() and not anchor.shape[-1] == positive.shape[-1] == negative.shape[-1]:
        why = "the features broadcast"  # each distance is taken over those of its own two tensors
    dtype = result_dtype(dtype, anchor)
    call = TripletCall(margin, float(p), float(eps), swap, reduction, dtype)
    return dispatch(name, call, tensors, why, settings)


def _example(shape, dtype, generator):
    return tuple(normal(shape, dtype, generator) for _ in range(3))


def _manhattan(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).abs().sum(-1)


register(
    Loss(
        triplet_margin_loss,
        "TripletMarginLoss",
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
        kind="triplet",
        bench=(
            BenchCase(
                *("triplet 16384x256", (16384, 256)),
                compiled=True,
                at_most={"compile": 0.8, "eager": 0.2},
            ),
            BenchCase("triplet 65536x512", (65536, 512), group="gpu", compiled=True),
            BenchCase("triplet 65536x512 bf16", (65536, 512), "bfloat16", group="gpu"),
        ),
    )
)
register(
    Loss(
        triplet_margin_with_distance_loss,
        "TripletMarginWithDistanceLoss",
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
    )
)
