"""`LazyLogits`: a head's logits as a tensor that knows what it is made of, and is computed only when it must.

Whatever torch function meets one finds its rule in `RULES`, or computes the logits once and goes on with them.
Below the functions, where C++ meets one (a custom autograd function, say), it is the output of a node whose
gradient reaches hidden states, weight and bias. What torch.compile traces gets `TracedLogits`, no tensor, by
the same rules: the graph meets the head's inputs and the loss, and no logits.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from ..core import errors, torch_state, trace

NAME = "lazy_head"
LOGITS, LOG_PROBS, PROBS = "logits", "log-probabilities", "probabilities"
P_LOG_P, P_X = "p log p", "p x"  # what is summed over the classes
Step = Callable[[Tensor], Tensor]
# What a torch function does with lazy logits: its result, or NotImplemented where it needs the numbers.
RULES: dict[Any, Callable[..., Any]] = {}
PRODUCTS = (
    Tensor.__matmul__,
    Tensor.matmul,
)  # dynamo swaps the operands of `@` before an object of ours
BY_NAME: dict[
    Any, Any
] = {}  # the same: dynamo finds no function of Python among the keys of a dict
EITHER_NAMES: set[Any] = set()
EITHER: set[Any] = set()  # those that lazy logits may be the second argument of


class LazyLogitsWarning(UserWarning):
    """Lazy logits were computed in full: an operation needed the numbers."""


@dataclass(frozen=True, eq=False)
class Product:
    """Rows x = s (h W^T + b), or c tanh(x) of them."""

    hidden: Tensor  # (..., D)
    weight: Tensor  # (C, D)
    bias: Tensor | None  # (C)
    scale: float = 1.0
    cap: float = 0.0  # c; 0: no tanh

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

    def made(self, like: Like, step: Step, product: Product | None = None) -> Any:
        """What `step` makes of it, lazy too."""
        raise NotImplementedError


class LazyLogits(Lazy, Tensor):
    """A head's logits, or what a few operations make of them, before anybody needs the numbers."""

    root: LazyLogits | None  # what it was made of; None: the head's own output
    replay: Step | None  # makes it of the root's values, as the operations would have
    value: Tensor | None  # with autograd's graph, once it is computed
    members: list[weakref.ref[LazyLogits]]  # of a root: what was made of it
    versions: tuple[int, ...]  # of a root: of its tensors
    awaited: list[Callable[[Tensor], Any]]  # of a root: who is told when a gradient comes
    told: Callable[[], bool]  # of a root: whether a warning is due when it is computed

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if all(t.value is None for t in lazy_in((args, kwargs))):
            with torch_state.no_torch_function():
                found = ruled(func, args, kwargs)
            if found is not NotImplemented:
                return _announced(found, args)
        return in_full(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        def value(tensor: Any) -> Tensor:
            with torch_state.differentiating():
                return computed(tensor, str(func)).detach()

        return func(*replaced(args, value), **replaced(kwargs or {}, value))

    def made(self, like: Like, step: Step, product: Product | None = None) -> LazyLogits:
        root, before = root_of(self), self.replay
        replay = step if before is None else lambda logits: step(before(logits))
        made = _tensor(product or self.product, like, root, replay)
        root.members.append(weakref.ref(made))
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return repr(self.value) if self.value is not None else described(self)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return computed(self, "pickle").__reduce_ex__(protocol)

    def __deepcopy__(self, memo: Any) -> Any:
        return computed(self, "deepcopy").__deepcopy__(memo)


class TracedLogits(Lazy):
    """The same for torch.compile. It has the methods that have rules; other functions get the numbers."""

    def __init__(self, product: Product, like: Like) -> None:
        self.product, self.like = product, like

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", None)
        return traced(func, BY_NAME.get(name), name in EITHER_NAMES, args, kwargs or {})

    def made(self, like: Like, step: Step, product: Product | None = None) -> TracedLogits:
        return TracedLogits(product or self.product, like)

    @property
    def shape(self) -> torch.Size:
        return self.like.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.like.dtype

    @property
    def mT(self) -> Any:  # noqa: N802
        return self.transpose(-2, -1)

    @property
    def ndim(self) -> int:
        return len(self.like.shape)

    @property
    def device(self) -> torch.device:
        return self.product.hidden.device

    @property
    def requires_grad(self) -> bool:
        return any(t is not None and t.requires_grad for t in self.product.tensors)

    def values(self) -> Tensor:
        return _of_kind(self.product.logits().to(self.like.dtype), self.like)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.values(), name)

    def __repr__(self) -> str:
        return described(self)


def traced(func: Any, rule: Any, either: bool, args: Any, kwargs: Any) -> Any:
    found = by_rule(rule, either, args, kwargs)
    if found is not NotImplemented:
        return found
    if func in PRODUCTS and isinstance(args[-1], TracedLogits):
        words = "is traced with its factors in either order: use torch.matmul(logits, other)"
        errors.fail(NotImplementedError, NAME, f"logits @ other {words}")
    return func(*replaced(args, TracedLogits.values), **replaced(kwargs, TracedLogits.values))


def _of_kind(x: Tensor, like: Like) -> Tensor:
    """From logits whose classes are the last dimension."""
    if like.kind is not LOGITS:
        log_p = torch.log_softmax(x, -1)
        p = log_p.exp()
        x = {LOG_PROBS: log_p, PROBS: p, P_LOG_P: p * log_p, P_X: p * x}[like.kind] * like.factor
    return x.movedim(-1, like.at)


def described(lazy: Lazy) -> str:
    like = lazy.like
    return f"LazyLogits({like.kind} of shape {list(like.shape)}, {like.dtype}, not computed)"


def ruled(func: Any, args: Any, kwargs: Any) -> Any:
    return by_rule(RULES.get(func), func in EITHER, args, kwargs)


def by_rule(rule: Any, either: bool, args: Any, kwargs: Any) -> Any:
    if rule is None:
        return NotImplemented
    if not args and "input" in kwargs:
        args, kwargs = (kwargs["input"],), {k: v for k, v in kwargs.items() if k != "input"}
    if not args or not (isinstance(args[0], Lazy) or either):
        return NotImplemented
    return rule(*args, **kwargs)


def _announced(found: Any, args: Any) -> Any:
    """A result whose gradient is the first that comes of the logits."""
    if type(found) is Tensor and found.requires_grad and found.is_floating_point():
        for lazy in lazy_in(args):
            for hook in root_of(lazy).awaited:
                found.register_hook(hook)
    return found


class _Node(torch.autograd.Function):
    """Gives lazy logits their place in autograd's graph."""

    @staticmethod
    def forward(
        ctx: Any, like: Like, replay: Step | None, device: torch.device, *tensors: Tensor | None
    ) -> Tensor:
        ctx.replay = replay
        ctx.save_for_backward(*tensors)
        return torch_state.wrapper(LazyLogits, like.shape, like.stride, like.dtype, device)

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
        needed, again = ctx.needs_input_grad[3:], torch.is_grad_enabled()
        with torch.enable_grad():
            leaves = [
                t if t is None or again else t.detach().requires_grad_(need)
                for t, need in zip(ctx.saved_tensors, needed, strict=True)
            ]
            logits = F.linear(*leaves)
            found = logits if ctx.replay is None else ctx.replay(logits)
            wanted = [t for t, need in zip(leaves, needed, strict=True) if need]
            grads = iter(torch.autograd.grad(found, wanted, incoming, create_graph=again))
        return None, None, None, *(next(grads) if need else None for need in needed)


def lazy(product: Product, told: Callable[[], bool] = lambda: True) -> Any:
    """The output of a head; `told` is asked when it is computed in full, whether to warn."""
    shape = torch.Size((*product.rows, product.classes))
    stride = tuple(math.prod(shape[k + 1 :]) for k in range(len(shape)))
    like = Like(shape, stride, product.hidden.dtype, len(shape) - 1)
    if torch.compiler.is_dynamo_compiling():
        return TracedLogits(product, like)
    found = _tensor(product, like, None, None)
    found.members, found.awaited, found.told = [], [], told
    found.versions = tuple(t._version for t in product.tensors if t is not None)
    return found


def _tensor(
    product: Product, like: Like, root: LazyLogits | None, replay: Step | None
) -> LazyLogits:
    of = product if root is None else root.product
    found: LazyLogits = _Node.apply(like, replay, of.hidden.device, *of.tensors)
    found.product, found.like, found.root, found.replay = product, like, root, replay
    found.value = None
    return found


def root_of(tensor: LazyLogits) -> LazyLogits:
    return tensor if tensor.root is None else tensor.root


def computed(tensor: LazyLogits, why: str) -> Tensor:
    """Its values, as a plain tensor with autograd's graph; `why` is who needs them."""
    if tensor.value is None:
        root = root_of(tensor)
        with torch.enable_grad():
            if root.value is None:
                check_unchanged(tensor)
                _tell(root, why)
                root.value = F.linear(*root.product.tensors)
            tensor.value = root.value if tensor.replay is None else tensor.replay(root.value)
    return tensor.value


def check_unchanged(lazy: Lazy) -> None:
    """Refuses logits whose parts are not what they were when the head was called.

    Raises:
        RuntimeError: the hidden states, the weight or the bias were changed in place since.
    """
    if not isinstance(lazy, LazyLogits):
        return
    root = root_of(lazy)
    names = ("input", "weight", "bias")
    parts = [(n, t) for n, t in zip(names, root.product.tensors, strict=True) if t is not None]
    for (name, part), version in zip(parts, root.versions, strict=True):
        if part._version != version:
            errors.fail(
                RuntimeError,
                NAME,
                f"the head's {name} was changed in place (by optimizer.step(), say) before its lazy logits "
                "of an earlier call were used. Use them before, or keep what you need of them",
            )


def in_full(func: Any, args: Any, kwargs: Any) -> Any:
    """The function on the values."""
    name = getattr(func, "__name__", str(func))
    found = {id(t): t for t in lazy_in((args, kwargs))}
    if _writes(name, kwargs):  # what shares memory with it sees the change, copies do not
        for tensor in found.values():
            for member in (root := root_of(tensor)).members:
                if (other := member()) is not None:
                    computed(other, name)
            computed(root, name)
    values = {key: computed(tensor, name) for key, tensor in found.items()}

    def value(tensor: Any) -> Tensor:
        return values[id(tensor)]

    result = func(*replaced(args, value), **replaced(kwargs, value))
    return next((t for t in found.values() if result is t.value), result)


WRITERS = {
    f"__i{n}__"
    for n in ["add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor"]
}
WRITERS |= {"__setitem__", "__set__"}


def _writes(name: str, kwargs: Any) -> bool:
    own = name.endswith("_") and not name.endswith("__")
    return own or "out" in kwargs or name in WRITERS


def lazy_in(value: Any) -> Iterator[LazyLogits]:
    if isinstance(value, LazyLogits):
        yield value
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from lazy_in(each)
    elif isinstance(value, dict):
        yield from lazy_in(tuple(value.values()))


def replaced(value: Any, by: Callable[[Any], Tensor]) -> Any:
    if isinstance(value, Lazy):
        return by(value)
    if isinstance(value, (tuple, list)):
        found: Sequence[Any] = [replaced(each, by) for each in value]
        return type(value)(*found) if hasattr(value, "_fields") else type(value)(found)
    if isinstance(value, dict):
        return {key: replaced(each, by) for key, each in value.items()}
    return value


def _tell(root: LazyLogits, why: str) -> None:
    """Counts it, for `explain`, and warns at the caller's line."""
    trace.note(NAME, None, f"{why} needs the numbers")
    if not root.told():
        return
    shape = list(root.like.shape)
    errors.warn(
        f"fusedloss.lazy_head: logits of shape {shape} were computed in full, for {why} needs their numbers",
        LazyLogitsWarning,
    )
