"""The record of the formula of a pointwise loss, and the loss by torch operations."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any, NamedTuple, NoReturn, Protocol

import torch
from torch import Tensor

from ..core import torch_state
from .names import NUMBERS, OPERANDS
from .torch_m import NAMESPACES, OutsideDomain

FORMULAS: dict[str, Pointwise] = {}
NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
LOSSES = "fusedloss.losses."  # the modules whose formulas the build prints


class Functions(NamedTuple):
    """Those of a formula over one namespace `m`."""

    value: Callable[..., Any]
    grad: Callable[..., Any]
    domain: Callable[..., Any] | None


@dataclass(frozen=True)
class Pointwise:
    """A loss of one element: `value` and `grad`, written over the namespace `m` (see `names.py`).

    The positional parameters of `value` are the operands, its keyword-only ones are numbers.
    `grad` takes the same and gives a tuple: the derivatives by the first operands. Those after have none.
    `domain`, where there is one, says whether operands lie where the loss is defined; `refuse` raises
    for a position and what the two operands hold there that `told` numbers. With `linear`, the derivative
    by the first operand does not depend on it.
    `engines/cpu/printer.py` finds the calls of this class by name and prints the functions as C++.

    Raises:
        TypeError: the functions do not fit together, or not the limits; with file and line.
    """

    value: Callable[..., Any]
    grad: Callable[..., Any]
    domain: Callable[..., Any] | None = None
    refuse: Callable[[str, float, float], NoReturn] | None = None
    linear: bool = False
    told: tuple[int, int] = (0, 1)
    name: str = field(init=False)
    operands: tuple[str, ...] = field(init=False)
    params: tuple[str, ...] = field(init=False)
    derivatives: int = field(init=False)  # how many `grad` gives
    built: bool = field(init=False)  # whether the build prints it for the CPU
    by_torch: Mapping[torch.dtype, Functions] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        operands, params = _parameters(self.value)
        for what, found, least, most in (
            ("operands (positional parameters)", operands, 2, OPERANDS),
            ("numbers (keyword-only parameters)", params, 0, NUMBERS),
        ):
            if not least <= len(found) <= most:
                _refuse(self.value, f"takes {len(found)} {what}, not {least} to {most}")
        for other in (self.grad, self.domain):
            if other is not None and _parameters(other) != (operands, params):
                signature = inspect.signature(self.value)
                _refuse(other, f"needs the parameters of {self.value.__name__}: {signature}")
        by_torch = {dtype: self.over(m) for dtype, m in NAMESPACES.items()}
        made: dict[str, Any] = {
            "name": self.value.__name__,
            "operands": operands,
            "params": params,
            "built": str(self.value.__module__).startswith(LOSSES),
            "derivatives": _derivatives(by_torch[torch.float64], len(operands), params),
            "by_torch": by_torch,
        }
        for name, what in made.items():
            object.__setattr__(self, name, what)
        FORMULAS.setdefault(self.name, self)

    def over(self, m: Any) -> Functions:
        """The functions with this namespace in place of their own."""
        domain = self.domain and rebound(self.domain, m)
        return Functions(rebound(self.value, m), rebound(self.grad, m), domain)


def rebound(function: Any, m: Any) -> Any:
    """The function with this namespace in place of its own."""
    code, name = function.__code__, function.__name__
    scope = {"m": m, "__builtins__": __builtins__}  # torch.compile asks for these
    found = FunctionType(code, scope, name, None, function.__closure__)
    found.__doc__ = function.__doc__
    return found


def _parameters(function: Callable[..., Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The operands and the numbers."""
    code = function.__code__  # which says it sooner than a signature
    if code.co_posonlyargcount or code.co_flags & (inspect.CO_VARARGS | inspect.CO_VARKEYWORDS):
        for name, parameter in inspect.signature(function).parameters.items():
            if parameter.kind not in NAMED:
                kind = parameter.kind.description
                _refuse(function, f"takes {name} as {kind}: name each parameter")
    most = code.co_argcount + code.co_kwonlyargcount
    return code.co_varnames[: code.co_argcount], code.co_varnames[code.co_argcount : most]


def _refuse(function: Any, why: str) -> NoReturn:
    code = function.__code__
    raise TypeError(f"{code.co_filename}:{code.co_firstlineno}: {function.__name__} {why}")


def _derivatives(functions: Functions, operands: int, params: Sequence[str]) -> int:
    """How many there are, as a trial shows: of one element, which also finds names that `m` lacks."""
    given = [torch.full((1,), 0.5, dtype=torch.float64, device="cpu")] * operands
    found: list[Any] = []
    for function in filter(None, functions):
        try:
            found.append(function(*given, **dict.fromkeys(params, 1.0)))
        except Exception as error:
            _refuse(function, f"cannot run: {error}; kinds/names.py says what formulas are made of")
    value, slopes, *inside = found
    if not isinstance(value, Tensor):
        _refuse(functions.value, f"gives {value!r}: no tensor, as it depends on no operand")
    if not (isinstance(slopes, tuple) and all(isinstance(s, Tensor | float) for s in slopes)):
        _refuse(functions.grad, "gives no tuple of derivatives")
    if not 1 <= len(slopes) <= operands:
        _refuse(functions.grad, f"gives {len(slopes)} derivatives by {operands} operands")
    if inside and not (isinstance(inside[0], Tensor) and inside[0].dtype is torch.bool):
        _refuse(functions.domain, "gives no condition")
    return len(slopes)


class ByTorch(Protocol):
    """What `apply` takes of a formula."""

    @property
    def by_torch(self) -> Mapping[torch.dtype, Functions]: ...


def _functions(formula: ByTorch, operands: Sequence[Tensor]) -> Functions:
    return formula.by_torch[operands[0].dtype]


class _Traced(torch.autograd.Function):
    """`value` with `grad` as its derivative; this much of it torch.compile can trace."""

    @staticmethod
    def forward(formula: ByTorch, params: dict[str, float], *operands: Tensor) -> Tensor:
        return _functions(formula, operands).value(*operands, **params)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.formula, ctx.params = inputs[:2]
        ctx.save_for_backward(*inputs[2:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        slopes = _functions(ctx.formula, ctx.saved_tensors).grad(*ctx.saved_tensors, **ctx.params)
        needed = ctx.needs_input_grad[2:]
        rest = (None,) * (len(needed) - len(slopes))
        return (
            None,
            None,
            *(grads[0] * s if need else None for s, need in zip(slopes, needed, strict=False)),
            *rest,
        )


class _Formula(_Traced):
    """The same, mappable and with forward mode: differentiable to any order."""

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _Traced.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[2:])

    @staticmethod
    def jvp(ctx: Any, _formula: None, _params: None, *tangents: Tensor | None) -> Tensor:
        slopes = _functions(ctx.formula, ctx.saved_tensors).grad(*ctx.saved_tensors, **ctx.params)
        terms = [s * t for s, t in zip(slopes, tangents, strict=False) if t is not None]
        return sum(terms[1:], terms[0])


def apply(formula: ByTorch, operands: tuple[Tensor, ...], params: dict[str, float]) -> Tensor:
    """The losses of all elements, by torch operations; operands broadcast."""
    operands = torch.broadcast_tensors(*operands)
    check_domain(formula, operands, params)
    value = _functions(formula, operands).value
    if torch_state.is_compiling():
        # It traces an autograd function where autograd runs, and maps none.
        if not torch_state.transforms_active() and _differentiated(operands):
            # Clones, which compilers drop: of what is changed later in the graph torch.compile would hand
            # backward the later values, and say nothing.
            return _Traced.apply(formula, params, *(o.clone() for o in operands))
        return value(*operands, **params)
    if torch_state.is_tracing() or torch_state.functionalizes():
        return value(*operands, **params)  # a saved trace holds no autograd function
    return _Formula.apply(formula, params, *operands)


def _differentiated(tensors: tuple[Tensor, ...]) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def check_domain(formula: ByTorch, operands: tuple[Tensor, ...], params: dict[str, float]) -> None:
    """RuntimeError where the formula is not defined; synchronises nothing, so that it traces."""
    domain = _functions(formula, operands).domain
    if domain is None or operands[0].device.type == "cuda":
        return  # a failed assertion on the GPU would take the CUDA context with it
    inside = domain(*operands, **params)
    transformed = torch_state.transforms_active()
    if torch_state.is_compiling():
        if transformed:
            return  # an assertion has no batching rule, and a traced tensor cannot be unwrapped
    elif transformed:
        while torch_state.is_wrapped(inside):
            inside = torch_state.unwrapped(inside)
    elif type(inside) is Tensor and inside.is_cpu and not torch_state.dispatch_modes():
        if not inside.all():
            raise OutsideDomain
        return
    torch_state.assert_async(inside.all(), domain.__doc__ or "")
