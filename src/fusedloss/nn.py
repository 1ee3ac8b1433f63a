"""The loss modules under the names of `torch.nn`, and beside them everything else in it.

`from fusedloss import nn` stands in for `from torch import nn`. Each module is a subclass of its
namesake: constructor, buffers, repr, pickling and state_dict are PyTorch's; `forward` is ours.
Submodules are PyTorch's own objects, whatever the form of the import; `functional` alone is ours.
"""

from __future__ import annotations

import sys
from typing import Any

import torch.nn
from torch import Tensor
from torch.nn import modules

from . import aliases, functional

__path__: list[str] = []  # the finder of `aliases` needs none, and nothing else shall find a copy
sys.modules[f"{__name__}.functional"] = functional
aliases.install()

OWN = [
    "BCELoss",
    "BCEWithLogitsLoss",
    "CrossEntropyLoss",
    "KLDivLoss",
    "MSELoss",
    "NLLLoss",
    "TripletMarginLoss",
    "TripletMarginWithDistanceLoss",
    "functional",
]


class MSELoss(modules.MSELoss):
    """See :func:`fusedloss.functional.mse_loss`; constructor as :class:`torch.nn.MSELoss`."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return functional.mse_loss(input, target, reduction=self.reduction)


class BCELoss(modules.BCELoss):
    """See :func:`fusedloss.functional.binary_cross_entropy`; constructor as :class:`torch.nn.BCELoss`,
    and `exact_grad`."""

    __constants__ = [*modules.BCELoss.__constants__, "exact_grad"]  # noqa: RUF012
    exact_grad = False

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        reduce: bool | None = None,
        reduction: str = "mean",
        *,
        exact_grad: bool = False,
    ) -> None:
        super().__init__(weight, size_average, reduce, reduction)
        if exact_grad:
            self.exact_grad = True

    def extra_repr(self) -> str:
        return "exact_grad=True" if self.exact_grad else ""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        if self.exact_grad:  # TorchScript, which has PyTorch's own function, drops the branch
            return functional.binary_cross_entropy(
                input, target, weight=self.weight, reduction=self.reduction, exact_grad=True
            )
        return functional.binary_cross_entropy(
            input, target, weight=self.weight, reduction=self.reduction
        )


class BCEWithLogitsLoss(modules.BCEWithLogitsLoss):
    """See :func:`fusedloss.functional.binary_cross_entropy_with_logits`; constructor as
    :class:`torch.nn.BCEWithLogitsLoss`."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return functional.binary_cross_entropy_with_logits(
            input, target, self.weight, pos_weight=self.pos_weight, reduction=self.reduction
        )


class KLDivLoss(modules.KLDivLoss):
    """See :func:`fusedloss.functional.kl_div`; constructor as :class:`torch.nn.KLDivLoss`."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return functional.kl_div(
            input, target, reduction=self.reduction, log_target=self.log_target
        )


class CrossEntropyLoss(modules.CrossEntropyLoss):
    """See :func:`fusedloss.functional.cross_entropy`; constructor as
    :class:`torch.nn.CrossEntropyLoss`."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return functional.cross_entropy(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )


class NLLLoss(modules.NLLLoss):
    """See :func:`fusedloss.functional.nll_loss`; constructor as :class:`torch.nn.NLLLoss`."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return functional.nll_loss(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
        )


if hasattr(modules, "LinearCrossEntropyLoss"):  # since torch 2.13
    OWN += ["LinearCrossEntropyLoss"]

    class LinearCrossEntropyLoss(modules.LinearCrossEntropyLoss):
        """See :func:`fusedloss.functional.linear_cross_entropy`; constructor as
        :class:`torch.nn.LinearCrossEntropyLoss`, and the function's own settings after it."""

        def __init__(
            self,
            in_features: int,
            num_classes: int,
            *,
            z_loss: float = 0.0,
            softcap: Tensor | float | None = None,
            logit_scale: Tensor | float = 1.0,
            memory_budget: int | None = None,
            **settings: Any,
        ) -> None:
            super().__init__(in_features, num_classes, **settings)
            self.z_loss, self.softcap = z_loss, softcap
            self.logit_scale, self.memory_budget = logit_scale, memory_budget

        def forward(
            self,
            input: Tensor,
            target: Tensor,
            *,
            sample_weight: Tensor | None = None,
            denominator: Tensor | float | None = None,
        ) -> Tensor:
            shape, bias = (self.num_classes, *self.out_features), self.linear.bias
            return functional.linear_cross_entropy(
                input,
                self.linear.weight.reshape(*shape, self.linear.in_features),
                target,
                linear_bias=None if bias is None else bias.reshape(shape),
                weight=self.weight,
                reduction=self.reduction,
                ignore_index=self.ignore_index,
                label_smoothing=self.label_smoothing,
                options=self.options,
                sample_weight=sample_weight,
                z_loss=self.z_loss,
                softcap=self.softcap,
                logit_scale=self.logit_scale,
                denominator=denominator,
                memory_budget=self.memory_budget,
            )


class TripletMarginLoss(modules.TripletMarginLoss):
    """See :func:`fusedloss.functional.triplet_margin_loss`; constructor as
    :class:`torch.nn.TripletMarginLoss`."""

    def forward(self, anchor: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        return functional.triplet_margin_loss(
            anchor,
            positive,
            negative,
            margin=self.margin,
            p=self.p,
            eps=self.eps,
            swap=self.swap,
            reduction=self.reduction,
        )


class TripletMarginWithDistanceLoss(modules.TripletMarginWithDistanceLoss):
    """See :func:`fusedloss.functional.triplet_margin_with_distance_loss`; constructor as
    :class:`torch.nn.TripletMarginWithDistanceLoss`."""

    def forward(self, anchor: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        return functional.triplet_margin_with_distance_loss(
            anchor,
            positive,
            negative,
            distance_function=self.distance_function,
            margin=self.margin,
            swap=self.swap,
            reduction=self.reduction,
        )


def __getattr__(name: str) -> Any:
    if name == "__all__":
        return aliases.public(torch.nn, OWN)
    try:
        return getattr(torch.nn, name)
    except AttributeError:
        raise AttributeError(f"module 'fusedloss.nn' has no attribute {name!r}") from None


def __dir__() -> list[str]:
    return sorted({*globals(), *dir(torch.nn)})
