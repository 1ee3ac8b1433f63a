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
from .front.modules import MODULES
from .losses import heads

__path__: list[str] = []  # the finder of `aliases` needs none, and nothing else shall find a copy
sys.modules[f"{__name__}.functional"] = functional
aliases.install()

if hasattr(modules, "LinearCrossEntropyLoss"):  # since torch 2.13

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
            exact_logits: bool = False,
            class_group: Any = None,
            **settings: Any,
        ) -> None:
            super().__init__(in_features, num_classes, **settings)
            self.z_loss, self.softcap = z_loss, softcap
            self.logit_scale, self.memory_budget = logit_scale, memory_budget
            self.exact_logits, self.class_group = exact_logits, class_group

        def forward(
            self,
            input: Tensor,
            target: Tensor,
            *,
            sample_weight: Tensor | None = None,
            denominator: Tensor | float | None = None,
        ) -> Tensor:
            shape, bias = (self.num_classes, *self.out_features), self.linear.bias
            return heads.linear_cross_entropy(
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
                exact_logits=self.exact_logits,
                class_group=self.class_group,
            )

    MODULES["LinearCrossEntropyLoss"] = LinearCrossEntropyLoss

globals().update(MODULES)

OWN = [*MODULES, "functional"]


def __getattr__(name: str) -> Any:
    if name == "__all__":
        return aliases.public(torch.nn, OWN)
    try:
        return getattr(torch.nn, name)
    except AttributeError:
        raise AttributeError(f"module 'fusedloss.nn' has no attribute {name!r}") from None


def __dir__() -> list[str]:
    return sorted({*globals(), *dir(torch.nn)})
