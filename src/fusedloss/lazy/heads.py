"""`lazy_head` and `lazy_heads`: a head whose output is `LazyLogits` while it is trained."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.overrides import TorchFunctionMode

from ..core import errors, plain, torch_state, trace
from ..core.plain import PLAIN
from .product import Product
from .tensor import NAME, lazy

MARK = "_fusedloss"  # a head's settings, among its attributes
MIN_BYTES = 4 << 20


WIDE = 7  # classes a feature: more than any layer has that is no head
_in_full: WeakSet[nn.Module] = WeakSet()  # what `patch` took for a head, and its logits were needed


@dataclass(frozen=True)
class Settings:
    always: bool
    min_bytes: int


class Handle:
    """The heads that a call made lazy, which `remove` undoes; as a context manager, its end does."""

    def __init__(self, heads: dict[str, nn.Module]) -> None:
        self._heads = heads

    @property
    def heads(self) -> tuple[str, ...]:
        """Their names in the model."""
        return tuple(self._heads)

    def remove(self) -> None:
        for head in self._heads.values():
            vars(head).pop(MARK, None)
            if "original" in vars(type(head)):  # not of a class that a parametrization made of ours
                head.__class__ = type(head).original  # type: ignore[attr-defined]
        self._heads = {}

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        return f"<fusedloss.lazy_heads of {', '.join(map(repr, self._heads)) or 'nothing'}>"


class Lazily(nn.Module):
    """Mixed into the class of a head."""

    original: ClassVar[type[Any]]
    weight: Tensor
    bias: Tensor | None

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        settings = self.__dict__.get(MARK)
        if args or kwargs or settings is None or not _serves(self, input, settings):
            return super().forward(input, *args, **kwargs)
        if type(self).original.forward is nn.Linear.forward:
            return _product(input, self.weight, self.bias)
        with _Catching(self.weight):
            return super().forward(input)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A copy, and what is saved, is the head that it was."""
        state = {key: value for key, value in vars(self).items() if key != MARK}
        return _new, (type(self).original,), state

    def __prepare_scriptable__(self) -> Any:
        """Of torch.jit.script, which compiles no laziness: the head is what it was, in the model itself."""
        Handle({"": self}).remove()
        return self


def _new(original: type[nn.Module]) -> nn.Module:
    return original.__new__(original)


@functools.cache
def _lazy_class(original: type[nn.Module]) -> type[Any]:
    words = {"original": original, "__module__": original.__module__, "__doc__": original.__doc__}
    return type(original.__name__, (Lazily, original), words)


class _Catching(TorchFunctionMode):
    """Within a head that does more than its product: the product is lazy, and the rest meets that."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            given = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
            if given.get("weight") is self.weight:
                return _product(given["input"], self.weight, given.get("bias"))
        return func(*args, **kwargs)


def of_patch(layer: nn.Linear, input: Tensor) -> Tensor:
    """The output of a linear layer while `patch(heads=True)` is in force.

    A wide layer is taken for a head until its logits are computed in full.
    """
    wide = layer.out_features >= WIDE * layer.in_features
    if not wide or layer in _in_full or not _serves(layer, input, Settings(False, MIN_BYTES)):
        return F.linear(input, layer.weight, layer.bias)
    of = weakref.ref(layer)

    def told() -> bool:
        if (found := of()) is not None:
            _in_full.add(found)
        return True

    return _product(input, layer.weight, layer.bias, told)


def _product(
    input: Tensor, weight: Tensor, bias: Tensor | None, told: Callable[[], bool] = lambda: True
) -> Any:
    device = input.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        parts = (
            t if t is None or t.dtype is torch.float64 else t.to(dtype)
            for t in (input, weight, bias)
        )
        input, weight, bias = parts  # type: ignore[assignment]
    return lazy(Product(input, weight, bias), told)


def _serves(head: Any, input: Any, settings: Settings) -> bool:
    if not settings.always and not (head.training and torch.is_grad_enabled()):
        return False
    if not isinstance(input, Tensor) or not input.dim():
        return False
    rows = input.numel() // max(input.shape[-1], 1)
    if rows * head.out_features * input.element_size() < settings.min_bytes:
        return False
    weight, bias = head.weight, head.bias
    tensors = [t for t in (input, weight, bias) if t is not None]
    traced = torch.compiler.is_dynamo_compiling()
    if torch_state.is_exporting() or (not traced and _watched(tensors)):
        return False
    if input.shape[-1] != weight.shape[-1] or not input.is_floating_point():
        return False
    if not torch.is_autocast_enabled(input.device.type) and any(
        t.dtype != input.dtype for t in tensors
    ):
        return False
    if any(t.device != input.device for t in tensors):
        return False
    if not settings.always and not any(t.requires_grad for t in tensors):
        return False
    return traced or not torch_state.freed_after_forward(head)


def _watched(tensors: list[Any]) -> bool:
    """Whether somebody sees operations of torch, or tensors that are more than numbers."""
    return bool(
        trace.force
        or torch_state.is_tracing()
        or torch_state.forward_mode()
        or torch_state.transforms_active()
        or torch_state.dispatch_modes()
        or not all(type(t) in PLAIN and plain.gap(t) is None for t in tensors)
    )


def lazy_head(head: nn.Module, *, always: bool = False, min_bytes: int = MIN_BYTES) -> Handle:
    """Makes the output of a linear head `LazyLogits` while it is trained: see :func:`lazy_heads`.

    Args:
        head: an :class:`torch.nn.Linear`, or a subclass of it.
        always: also in evaluation, and without gradients.
        min_bytes: smaller logits are computed as ever.

    Returns:
        A handle whose `remove()` undoes it, and which is a context manager.

    Raises:
        TypeError: the module is no linear map with a weight of floating-point numbers. It stays as it is.
    """
    parts = {str(k or ""): part for k, part in enumerate(_parts(head))}
    return _made_lazy(parts, Settings(always, errors.integer(NAME, "min_bytes", min_bytes)))


def lazy_heads(
    model: nn.Module, *heads: str | nn.Module, always: bool = False, min_bytes: int = MIN_BYTES
) -> Handle:
    """Makes the output of a model's head `LazyLogits` while it is trained: its losses need no logits then.

    Lazy logits are a tensor that knows which hidden states, weight and bias it is the product of. Choosing
    and shaping rows, casts, scales, soft caps and biases of classes leave it so. Cross entropy,
    log-probabilities, entropies, log-sum-exps, divergences and the best classes are computed without
    logits. Whatever else meets it computes the logits once, warns, and goes on with them.
    In evaluation, and without gradients, the head is what it was.

    Args:
        model: any module; DistributedDataParallel, PEFT models, Lightning modules.
        heads: names of modules in it, or the modules; without any, the output embeddings that a model of
            transformers names, or the linear layer that shares its weight with an embedding or is called
            'lm_head'.
        always: also in evaluation, and without gradients.
        min_bytes: smaller logits are computed as ever.

    Returns:
        A handle whose `remove()` undoes it, and which is a context manager. Of a head that is lazy already
        it knows nothing.

    Raises:
        ValueError: there is no head to be found.
        TypeError: a head is no linear map with a weight of floating-point numbers. All stay as they are.
    """
    settings = Settings(always, errors.integer("lazy_heads", "min_bytes", min_bytes))
    return _made_lazy(_named(model, heads) if heads else _found(model), settings)


def _made_lazy(heads: dict[str, nn.Module], settings: Settings) -> Handle:
    new = {name: head for name, head in heads.items() if MARK not in vars(head)}
    for name, head in new.items():
        _check(name, head)
    for head in new.values():
        vars(head)[MARK] = settings
        if not isinstance(head, Lazily):
            head.__class__ = _lazy_class(type(head))  # type: ignore[arg-type]
    return Handle(new)


def _check(name: str, head: Any) -> None:
    where = f"the module {name!r} ({type(head).__name__})" if name else type(head).__name__
    fault = None
    if not isinstance(head, nn.Linear):
        fault = "is no torch.nn.Linear"
    elif not (head.weight.is_floating_point() and head.weight.dim() == 2):
        fault = f"has a weight of {head.weight.dtype}, shape {list(head.weight.shape)}"
    elif head.weight.shape != (head.out_features, head.in_features):
        fault = f"has a packed weight of shape {list(head.weight.shape)}"
    if fault:
        errors.fail(
            TypeError,
            "lazy_heads",
            f"{where} {fault}: a lazy head is a linear map of floating-point numbers. It stays as it is; name "
            "another module, or go on with its logits in full",
        )


def _named(model: nn.Module, heads: tuple[str | nn.Module, ...]) -> dict[str, nn.Module]:
    modules = dict(model.named_modules())
    names = {id(m): n for n, m in modules.items()}
    found: dict[str, nn.Module] = {}
    for head in heads:
        module = head if isinstance(head, nn.Module) else modules.get(head)
        if module is not None:
            found |= {names.get(id(part), ""): part for part in _parts(module)}
        else:
            close = [n for n, m in modules.items() if isinstance(m, nn.Linear)][-3:]
            errors.fail(
                ValueError,
                "lazy_heads",
                f"the model has no module {head!r}; its last linear layers: {close}",
            )
    return found


def _found(model: nn.Module) -> dict[str, nn.Module]:
    """The heads that a model is known to have."""
    names = {id(m): n for n, m in model.named_modules()}
    found: dict[int, nn.Module] = {}
    for module in model.modules():
        ask = getattr(module, "get_output_embeddings", None)
        if ask is None:
            continue
        try:
            head = ask()
        except (AttributeError, NotImplementedError):
            continue
        if isinstance(head, nn.Module) and id(head) in names:
            for part in _parts(head):
                found[id(part)] = part
    if not found:
        tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        found = {
            id(m): m
            for n, m in model.named_modules()
            if isinstance(m, nn.Linear)
            and (id(m.weight) in tables or n.split(".")[-1] == "lm_head")
        }
    if not found:
        linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)][-3:]
        errors.fail(
            ValueError,
            "lazy_heads",
            f"{type(model).__name__} names no output embeddings, and no linear layer shares its weight with an "
            f"embedding: say which it is, as lazy_heads(model, 'name'); its last linear layers: {linear}",
        )
    return {names[key]: module for key, module in found.items()}


def _parts(head: nn.Module) -> list[nn.Module]:
    """PEFT's wrappers: copies of a head that is trained beside adapters, or a head and its adapters."""
    copies = getattr(head, "modules_to_save", None)
    if isinstance(copies, nn.ModuleDict):
        return list(copies.values())
    adapters, base = getattr(head, "lora_B", None), getattr(head, "base_layer", None)
    if isinstance(adapters, nn.ModuleDict) and isinstance(base, nn.Module):
        return [base, *adapters.values()]
    return [head]
