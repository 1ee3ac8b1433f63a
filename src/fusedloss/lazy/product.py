"""What lazy logits know of themselves: the product that they are, and the tensor that they would be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

LOGITS, LOG_PROBS, PROBS = "logits", "log-probabilities", "probabilities"
P_LOG_P, P_X = "p log p", "p x"  # what is summed over the classes
Step = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Product:
    """Rows x = s (h W^T + b), or c tanh(x) of them."""

    hidden: Tensor  # (..., D)
    weight: Tensor  # (C, D)
    bias: Tensor | None  # (C)
    scale: float = 1.0
    cap: float = 0.0  # c; 0: no tanh

    _detached: list[Product] = field(default_factory=list, init=False, repr=False)

    @property
    def detached(self) -> Product:
        """One for all that is made of it: the same rows are the same product."""
        if self._detached:
            return self._detached[0]
        hidden, weight, bias = (t if t is None else t.detach() for t in self.tensors)
        assert hidden is not None and weight is not None
        found = Product(hidden, weight, bias, self.scale, self.cap)
        if (
            not torch.compiler.is_dynamo_compiling()
        ):  # which gives no object back that holds a new one
            self._detached.append(found)
        return found

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.hidden, self.weight, self.bias

    @property
    def classes(self) -> int:
        return self.weight.shape[0]

    @property
    def rows(self) -> torch.Size:
        return self.hidden.shape[:-1]

    def logits(self) -> Tensor:
        """Of all rows; the classes are the last dimension."""
        x = F.linear(*self.tensors)
        if self.scale != 1.0:
            x = x * self.scale
        return torch.tanh(x) * self.cap if self.cap else x


@dataclass(frozen=True)
class Like:
    """What the tensor would be if it were computed."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    at: int  # where the classes stand among the dimensions
    kind: str = LOGITS
    factor: float = 1.0  # of the whole, after its kind

    @property
    def meta(self) -> Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device="meta")


class Lazy:
    """What the rules know of lazy logits."""

    product: Product
    like: Like

    def made(self, like: Like, step: Step, product: Product | None = None, *others: Any) -> Any:
        """What `step` makes of it and of `others`, lazy too."""
        raise NotImplementedError


def of_kind(x: Tensor, like: Like) -> Tensor:
    """From logits whose classes are the last dimension."""
    if like.kind is not LOGITS:
        log_p = torch.log_softmax(x, -1)
        p = log_p.exp()
        x = {LOG_PROBS: log_p, PROBS: p, P_LOG_P: p * log_p, P_X: p * x}[like.kind] * like.factor
    return x.movedim(-1, like.at)


def described(lazy: Lazy) -> str:
    like = lazy.like
    return f"LazyLogits({like.kind} of shape {list(like.shape)}, {like.dtype}, not computed)"
