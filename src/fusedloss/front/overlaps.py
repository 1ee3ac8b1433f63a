"""The checks of a loss of overlaps: scores of classes, and class indices or masks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..core import errors
from ..core.reduce import result_dtype
from ..kinds.dice import DiceCall
from ..route.entry import dispatch
from ..route.memo import Asked
from . import docs
from .classes import INDICES, check_indices, check_weight
from .loss import Definition
from .signature import Memo

# What an overlap is made of: alpha and beta, and what its smooth terms are multiplied by.
KNOWN = {"dice": (0.5, 0.5, 0.5), "jaccard": (1.0, 1.0, 1.0)}


class Parts(NamedTuple):
    """What a loss of overlaps adds up, and what each part weighs."""

    overlap: float = 1.0
    rows: float = 0.0  # cross entropy, or with a gamma the focal loss
    gamma: float = 0.0


AS_IN_DICE_LOSS = {
    "overlap": "as in :func:`dice_loss`, as all that follow.",
    "alpha": "of the Tversky index.",
    "beta": "of the Tversky index.",
    "generalized": "one fraction of all classes.",
    "include_background": "whether class 0 counts in the overlap; in the other part it does.",
    "batch": "sums are over all images.",
    "smooth_nr": "in the numerator.",
    "smooth_dr": "in the denominator.",
    "skip_absent": "a class without a mask has no loss of overlap.",
    "ignore_index": "places with this class index count in neither.",
    "reduction": "'mean' or 'sum' of each of both.",
}


@dataclass(repr=False, eq=False)
class Overlaps:
    """The input is (N, C, ...); the target holds class indices (N, ...), or masks of the input's shape.

    The definition's function gives the `Parts`; with rows there are indices alone, and 'mean' or 'sum'.
    """

    kind: ClassVar[str] = "dice"
    computes: ClassVar[bool] = False

    indices: bool = False  # alone
    reductions: tuple[str, ...] = ("none", "mean", "sum")

    @property
    def divides(self) -> bool:
        """Not beside rows: both means have a count of their own."""
        return not self.indices

    def memo(self, loss: Definition) -> Memo:
        return loss.memo()

    def run(self, loss: Definition, asked: Asked | None, given: dict[str, Any]) -> Tensor:
        name = loss.name
        operands, more = loss.tensors(given, TypeError), loss.more_tensors(given, TypeError)
        input, target = operands.values()
        weight = more.get("weight")
        settings = loss.checked(given)
        parts = loss.chosen(given, settings)
        reduction = loss.reduction(given, self.reductions)
        if more or target.device != input.device:
            errors.same_device(name, **operands, **more)
        if not input.is_floating_point():
            errors.not_floating(name, NotImplementedError, "softmax", input=input)
        errors.not_narrow(name, "softmax", input=input)
        if input.dim() < 2:
            errors.fail(
                ValueError,
                name,
                f"input must be (N, C, ...), got shape {list(input.shape)}: of one image pass "
                "input.unsqueeze(0)",
            )
        dtype = result_dtype(input.dtype, input)
        masks = not self.indices and target.shape == input.shape
        if masks:
            check_masks(name, target)
            if weight is not None:
                check_weight(name, input, weight)
        else:
            check_indices(name, input, target, weight, dtype)
        if weight is not None and not weight.is_floating_point():
            errors.not_floating(name, RuntimeError, "mul", weight=weight)
        first = 0 if settings.get("include_background", True) else 1
        if input.shape[1] <= first:
            words = f"input has {input.shape[1]} classes, and include_background={not first}"
            errors.fail(ValueError, name, f"{words} leaves none: one of them must change")
        alpha, beta, smooth = KNOWN.get(
            settings["overlap"], (settings["alpha"], settings["beta"], 1.0)
        )
        activation = settings.get("activation", "softmax")
        loss.refuse_what_users_rue(
            operands, given, **{**settings, "reduction": reduction, "activation": activation}
        )
        call = DiceCall(
            loss=name,
            activation=activation,
            masks=masks,
            batch=settings["batch"],
            background=not first,
            weighting=settings["generalized"],
            skip_absent=settings["skip_absent"],
            ignore_index=settings["ignore_index"],
            alpha=alpha,
            beta=beta,
            smooth_nr=smooth * settings["smooth_nr"],
            smooth_dr=smooth * settings["smooth_dr"],
            by_overlap=parts.overlap,
            by_rows=parts.rows,
            gamma=parts.gamma,
            reduction=reduction,
            dtype=dtype,
        )
        by = loss.divisor(given, reduction)
        return dispatch(name, call, (input, target, weight), None, asked, by)

    def words(self, loss: Definition) -> docs.Words:
        unreduced = ", or the losses by image and class with 'none'"
        returns = f"A scalar{unreduced if 'none' in self.reductions else ''}, in the input's type"
        raises = (
            "IndexError: a class index out of range; its position is named",
            "ValueError: unknown `reduction`; no class that counts; batch sizes that differ; an input of "
            "fewer than two dimensions",
            "RuntimeError: other shapes that do not fit; a weight not of shape (C) or of another type; "
            "devices that differ; class indices that are no integers",
            "NotImplementedError: integer or complex input",
            "TypeError: an argument that is no tensor",
        )
        return docs.Words(f"{returns}; float32 under autocast.", raises, AS_IN_DICE_LOSS)


def check_masks(name: str, target: Tensor) -> None:
    floating = target.is_floating_point()
    if not (floating or target.dtype is torch.bool or target.dtype in INDICES):
        errors.fail(
            RuntimeError, name, f"target holds masks of {target.dtype}: pass target.float()"
        )
    if floating:
        errors.not_narrow(name, "mul", target=target)
