"""`LazyLogits`: a head's logits as a tensor that knows what it is made of, and is computed only when it must.

Whatever torch function meets one finds its rule in `RULES`, or computes the logits once and goes on with them.
Below the functions, where C++ meets one (a custom autograd function, say), it is the output of a node whose
gradient reaches hidden states, weight and bias. What torch.compile traces gets `TracedLogits`, no tensor, by
the same rules: the graph meets the head's inputs and the loss, and no logits.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from ..core import errors, torch_state, trace
from .product import Lazy, Like, Product, Step, described, of_kind

NAME = "lazy_head"
# What a torch function does with lazy logits: its result, or NotImplemented where it needs the numbers.
RULES: dict[Any, Callable[..., Any]] = {}
# Dynamo swaps the operands of `@` before an object of ours, and finds no function among the keys of a dict.
PRODUCTS = (Tensor.__matmul__, Tensor.matmul)
BY_NAME: dict[Any, Any] = {}
ASKED: set[Any] = set()  # what is answered without the numbers
EITHER_NAMES: set[Any] = set()
EITHER: set[Any] = set()  # those that lazy logits may be the second argument of


class LazyLogitsWarning(UserWarning):
    """Lazy logits were computed in full: an operation needed the numbers."""


class LazyLogits(Lazy, Tensor):
    """A head's logits, or what a few operations make of them, before anybody needs the numbers."""

    root: LazyLogits | None  # what it was made of; None: the head's own output
    replay: Step | None  # makes it of the root's values, as the operations would have
    made_of: tuple[LazyLogits, Step] | None  # whose memory it may share, once both are computed
    others: tuple[Any, ...]  # the tensors that learn, besides the root's, that it is made of
    value: Tensor | None  # with autograd's graph, once it is computed
    members: list[weakref.ref[LazyLogits]]  # of a root: what was made of it
    written: list[tuple[Tensor, Any]]  # its values after a write in place, and the root's tensors
    node: Any  # autograd's, as it was made
    version: int  # of its values, when they were computed
    used: bool  # of a root: whether a gradient comes without its logits
    versions: tuple[int, ...]  # of a root: of its tensors
    awaited: list[Callable[[Tensor], Any]]  # of a root: who is told when a gradient comes
    told: Callable[[], bool]  # of a root: whether a warning is due when it is computed

    @classmethod
    @torch_state.untraced
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        lazies = [*lazy_in((args, kwargs))]
        if all(map(_untouched, lazies)) or (func in ASKED and lazies[0].value is None):
            with torch_state.no_torch_function():
                found = ruled(func, args, kwargs)
            if found is not NotImplemented:
                return _announced(found, lazies)
        return in_full(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        def value(tensor: Any) -> Tensor:
            with torch_state.differentiating():
                return computed(tensor, str(func)).detach()

        return func(*replaced(args, value), **replaced(kwargs or {}, value))

    def made(
        self, like: Like, step: Step, product: Product | None = None, *others: Any
    ) -> LazyLogits:
        root, before, product = root_of(self), self.replay, product or self.product
        now = _as_now(step, product.hidden.device.type)
        if not torch.is_grad_enabled():
            product = product.detached
        replay = now if before is None else lambda logits: now(before(logits))
        made = _tensor(product, like, root, replay, (*self.others, *others))
        made.made_of = self, now
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
        self.value: Tensor | None = None  # after a write in place

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in WRITER_NAMES or (kwargs or {}).get("inplace"):
            for each in args:
                if isinstance(each, TracedLogits):
                    each.value = each.values()
        return traced(func, BY_NAME.get(name), name in EITHER_NAMES, args, kwargs or {})

    def made(
        self, like: Like, step: Step, product: Product | None = None, *others: Any
    ) -> TracedLogits:
        product = product or self.product
        return TracedLogits(product if torch.is_grad_enabled() else product.detached, like)

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
        if self.value is not None:
            return self.value
        return of_kind(self.product.logits().to(self.like.dtype), self.like)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name.endswith("_"):
            self.value = self.values()
        return getattr(self.values(), name)

    def __setitem__(self, index: Any, value: Any) -> None:
        self.value = self.values()
        self.value[index] = value.values() if isinstance(value, TracedLogits) else value

    def __repr__(self) -> str:
        return described(self)


def traced(func: Any, rule: Any, either: bool, args: Any, kwargs: Any) -> Any:
    written = any(isinstance(each, TracedLogits) and each.value is not None for each in args)
    found = NotImplemented if written else by_rule(rule, either, args, kwargs)
    if found is not NotImplemented:
        return found
    if func in PRODUCTS and isinstance(args[-1], TracedLogits):
        words = "is traced with its factors in either order: use torch.matmul(logits, other)"
        errors.fail(NotImplementedError, NAME, f"logits @ other {words}")
    return func(*replaced(args, TracedLogits.values), **replaced(kwargs, TracedLogits.values))


def ruled(func: Any, args: Any, kwargs: Any) -> Any:
    return by_rule(RULES.get(func), func in EITHER, args, kwargs)


def by_rule(rule: Any, either: bool, args: Any, kwargs: Any) -> Any:
    if rule is None:
        return NotImplemented
    if not args and "input" in kwargs:
        args, kwargs = (kwargs["input"],), {k: v for k, v in kwargs.items() if k != "input"}
    if len(args) == 1 and "other" in kwargs:
        args, kwargs = (*args, kwargs["other"]), {k: v for k, v in kwargs.items() if k != "other"}
    if not args or not (isinstance(args[0], Lazy) or either):
        return NotImplemented
    return rule(*args, **kwargs)


def _announced(found: Any, lazies: Iterable[LazyLogits]) -> Any:
    """A result whose gradient is the first that comes of the logits."""
    if type(found) is Tensor and found.requires_grad and found.is_floating_point():
        for lazy in lazies:
            root_of(lazy).used = True
            for hook in root_of(lazy).awaited:
                found.register_hook(hook)
    return found


def _untouched(lazy: LazyLogits) -> bool:
    """Whether a rule may answer for it: its values are its product's, and its gradient goes to its product."""
    if lazy.value is not None or torch_state.transforms_active() or _moved(lazy):
        return False
    while lazy.made_of is not None:
        lazy = lazy.made_of[0]
        if lazy.value is not None and _version(lazy.value) != lazy.version:
            return False
    return True


def _moved(lazy: LazyLogits) -> bool:
    """Whether an autograd function, a module's backward hook say, returned it as its own output."""
    with torch_state.no_torch_function():
        return lazy.grad_fn is not lazy.node


def _as_now(step: Step, device: str) -> Step:
    """The step with autocast and grad mode as they are."""
    autocast, learns = torch.is_autocast_enabled(device), torch.is_grad_enabled()
    if learns and not autocast:
        return step
    dtype = torch.get_autocast_dtype(device)

    def now(x: Tensor) -> Tensor:
        with torch.autocast(device, dtype, enabled=autocast):
            return step(x) if learns else step(x).detach()

    return now


class _Node(torch.autograd.Function):
    """Gives lazy logits their place in autograd's graph."""

    @staticmethod
    def forward(
        ctx: Any,
        like: Like,
        replay: Step | None,
        device: torch.device,
        written: list[tuple[Tensor, Any]],
        *tensors: Tensor | None,
    ) -> Tensor:
        ctx.replay, ctx.written, ctx.others = replay, written, tensors[3:]
        ctx.save_for_backward(*tensors)
        return torch_state.wrapper(LazyLogits, like.shape, like.stride, like.dtype, device)

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
        needed, again = ctx.needs_input_grad[4:], torch.is_grad_enabled()
        with torch.enable_grad(), torch.autocast(incoming.device.type, enabled=False):
            if ctx.written:
                found, parts = ctx.written[-1]
            else:
                parts = [
                    t if t is None or again else t.detach().requires_grad_(need)
                    for t, need in zip(ctx.saved_tensors[:3], needed, strict=False)
                ]
                logits = F.linear(*parts)
                found = logits if ctx.replay is None else ctx.replay(logits)
            each = zip((*parts, *ctx.others), needed, strict=True)
            wanted = [t for t, need in each if need]
            settings = {"create_graph": again, "retain_graph": True, "allow_unused": True}
            grads = iter(torch.autograd.grad(found, wanted, incoming, **settings))
        return None, None, None, None, *(next(grads) if need else None for need in needed)


class _Behind(torch.autograd.Function):
    """Values whose gradient goes where that of lazy logits goes by now."""

    @staticmethod
    def forward(ctx: Any, lazy: Tensor, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor, None]:
        return incoming, None


def lazy(product: Product, told: Callable[[], bool] = lambda: True) -> Any:
    """The output of a head; `told` is asked when it is computed in full, whether to warn."""
    shape = torch.Size((*product.rows, product.classes))
    stride = tuple(math.prod(shape[k + 1 :]) for k in range(len(shape)))
    like = Like(shape, stride, product.hidden.dtype, len(shape) - 1)
    if torch.compiler.is_dynamo_compiling():
        return TracedLogits(product, like)
    if not torch.is_grad_enabled():
        product = product.detached
    found = _tensor(product, like, None, None)
    found.members, found.awaited, found.told, found.used = [], [], told, False
    found.versions = tuple(map(_version, product.tensors))
    return found


def _version(tensor: Tensor | None) -> int:
    return 0 if tensor is None or tensor.is_inference() else tensor._version


def _tensor(
    product: Product,
    like: Like,
    root: LazyLogits | None,
    replay: Step | None,
    others: tuple[Any, ...] = (),
) -> LazyLogits:
    of = product if root is None else root.product
    written: list[Any] = []
    found: LazyLogits = _Node.apply(like, replay, of.hidden.device, written, *of.tensors, *others)
    found.product, found.like, found.root, found.replay = product, like, root, replay
    found.value, found.others, found.written, found.made_of = None, others, written, None
    with torch_state.no_torch_function():
        found.node = found.grad_fn
    return found


def root_of(tensor: LazyLogits) -> LazyLogits:
    return tensor if tensor.root is None else tensor.root


def computed(tensor: LazyLogits, why: str) -> Tensor:
    """Its values, as a plain tensor with autograd's graph; `why` is who needs them."""
    if tensor.value is None:
        root = root_of(tensor)
        with torch_state.as_if_alone(root.product.hidden.device.type):
            if tensor.made_of is None:
                check_unchanged(tensor)
                _tell(root, why)
                value = F.linear(*root.product.tensors)
            else:
                before, step = tensor.made_of
                of = computed(before, why)
                value = step(of)
                if value.untyped_storage().data_ptr() != of.untyped_storage().data_ptr():
                    tensor.made_of = None  # a copy: what it was made of is nobody's
            tensor.value = _Behind.apply(tensor, value.detach()) if _moved(tensor) else value
            tensor.version = _version(tensor.value)
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
    for name, part, version in zip(names, root.product.tensors, root.versions, strict=True):
        if _version(part) != version:
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
    roots = [root_of(tensor) for tensor in found.values()]
    if name in HOOKS or func is torch.autograd.grad:
        _check_unused(lazy_in((args[1:], kwargs)) if func is torch.autograd.grad else roots, name)
    # What shares memory with it sees a change, copies do not; a hook sees all gradients.
    writes = _writes(name, args, kwargs)
    family = [m for root in roots for m in _family(root)] if writes or name in HOOKS else []
    for member in family:
        computed(member, name)
    values = {key: computed(tensor, name) for key, tensor in found.items()}

    def value(tensor: Any) -> Tensor:
        return values[id(tensor)]

    result = func(*replaced(args, value), **replaced(kwargs, value))
    for member in family if writes else ():
        member.written[:] = [(computed(member, name), root_of(member).product.tensors)]
    return next((t for t in found.values() if result is t.value), result)


WRITERS = {
    f"__i{n}__"
    for n in ["add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor"]
}
WRITERS |= {"__setitem__", "__set__"}
WRITER_NAMES = {n for f in (torch, F) for n in dir(f) if n.endswith("_") and n[0] != "_"}
HOOKS = {"register_hook", "retain_grad"}


def _writes(name: str, args: Any, kwargs: Any) -> bool:
    own = name.endswith("_") and not name.endswith("__")
    inplace = any(a is True for a in args) or kwargs.get("inplace")  # of relu, say
    return own or "out" in kwargs or name in WRITERS or bool(inplace)


def _family(root: LazyLogits) -> list[LazyLogits]:
    members = (member() for member in root.members)
    return [root, *(m for m in members if m is not None)]


def _check_unused(lazies: Iterable[LazyLogits], name: str) -> None:
    """Refuses to look for a gradient that never is.

    Raises:
        RuntimeError: a loss of these logits was computed without them.
    """
    if any(root_of(each).used for each in lazies):
        errors.fail(
            RuntimeError,
            NAME,
            f"{name} asks for the gradient of lazy logits after a loss of theirs was computed without them. "
            "Call logits.retain_grad() before the loss: they are computed in full then",
        )


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
