"""Our losses in place of `torch.nn.functional`'s, and so of `torch.nn`'s modules, which call those.

A function of PyTorch stays the object that it was; its code alone is replaced. So whoever imported
it earlier, by whatever name, gets ours too, and whatever knows it by identity still does: pickle,
torch.fx, tensor subclasses. What another library has put in a function's place is never touched.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import BuiltinFunctionType, CodeType, FunctionType, SimpleNamespace
from typing import Any

import torch.nn.functional
from torch import Tensor

from . import losses
from .core import caches, errors, sharded, torch_state
from .core.plain import PLAIN
from .core.torch_state import FakeTensor, FunctionalTensor

HOME = torch.nn.functional
NAME = "_fusedloss"  # what the patched functions find us by, in the globals of HOME
# Of the patched code. Python counts no frame of importlib's bootstrap, by these two words, when it looks
# for the caller that PyTorch's own warnings mean.
FILE = "<fusedloss.patch, uncounted as importlib._bootstrap>"

_FOR_GOOD = object()
# Ours are in place while anybody asks, `patch()` or a block; and the heads while one asks for these.
_asking: dict[object, bool] = {}
_lock = threading.RLock()


def patch(*, heads: bool = False) -> None:
    """Makes the losses of `torch.nn` and `torch.nn.functional` run ours, for unedited code.

    Plain tensors and DTensors take our path; other tensor subclasses, proxies and TorchScript get PyTorch's
    own functions as before. To patch again changes nothing. A name that another library has given to
    something of its own stays so, and a warning says whose that is.

    With `heads`, a plain :class:`torch.nn.Linear` of at least seven times as many outputs as inputs is taken
    for a head while it is trained, as by :func:`fusedloss.lazy_heads`; one whose logits are needed in full
    is so once, with a warning, and a layer like others from then on.
    """
    _ask(_FOR_GOOD, heads)


def unpatch() -> None:
    """Puts PyTorch's own losses back. Without a patch it does nothing."""
    with _lock:
        _asking.clear()
        _settle()


@contextmanager
def patched(*, heads: bool = False) -> Iterator[None]:
    """`patch()` for the length of a block; within an outer patch like it, it changes nothing."""
    block = object()
    try:
        _ask(block, heads)
        yield
    finally:
        _leave(block)


def _ask(who: object, heads: bool) -> None:
    """All or nothing: what ends it halfway, a KeyboardInterrupt too, takes it back."""
    _tell_of_others()
    with _lock:
        before = _asking.get(who)
        try:
            _asking[who] = heads or bool(before)
            _settle()
        except BaseException:
            if before is None:
                _leave(who)
            raise


def _leave(who: object) -> None:
    with _lock:
        _asking.pop(who, None)
        _settle()


def _settle() -> None:
    """Makes PyTorch as `_asking` says, from whatever state: also what an interrupt left."""
    # What else of the process goes with the patch is set before the codes, and taken back after them.
    if _asking:
        caches.mark()
        vars(HOME)[NAME] = _names
        for name, function in FUNCTIONS.items():
            if function.__code__ is ORIGINALS[name].__code__:
                function.__prepare_scriptable__ = _names.ours[name].__prepare_scriptable__
                function.__code__ = _redirect(name)
    else:
        for name, function in FUNCTIONS.items():
            if _is_redirect(function.__code__):
                function.__code__ = ORIGINALS[name].__code__
            vars(function).pop("__prepare_scriptable__", None)
        vars(HOME).pop(NAME, None)
        caches.unmark()
    _settle_heads(any(_asking.values()))


def _settle_heads(wanted: bool) -> None:
    if wanted and not (torch.nn.Linear.forward is LINEAR and _of_torch(LINEAR)):
        errors.warn(
            f"fusedloss.patch: torch.nn.Linear.forward is {_holder(torch.nn.Linear.forward)}: heads stay as "
            "they are"
        )
    elif wanted and LINEAR.__code__ is OWN_LINEAR:
        from .lazy.heads import of_patch

        vars(LAYERS)[NAME] = of_patch
        LINEAR.__code__ = _LAZY_LINEAR
    elif not wanted and LINEAR.__code__ is _LAZY_LINEAR:
        LINEAR.__code__ = OWN_LINEAR
        vars(LAYERS).pop(NAME, None)


def _tell_of_others() -> None:
    """Warns of the names that are not PyTorch's own functions any more, or were not from the start."""
    foreign = []
    for name in FOUND:
        found = vars(HOME).get(name)
        if found is not FUNCTIONS.get(name, FOUND):
            foreign.append(f"{name} ({_holder(found)})")
        elif found.__code__ is not ORIGINALS[name].__code__ and not _is_redirect(found.__code__):
            foreign.append(f"{name} (with code from {found.__code__.co_filename})")
    if foreign:
        errors.warn(
            "fusedloss.patch: names of torch.nn.functional that hold no function of PyTorch's stay as "
            f"they are: {', '.join(foreign)}"
        )


def _holder(found: Any) -> str:
    """Where it comes from: of a wrapper too, which may bear the name of what it wraps."""
    if isinstance(found, functools.partial):
        return f"a partial of {_holder(found.func)}"
    if isinstance(found, FunctionType):
        code = found.__code__
        return f"{found.__globals__.get('__name__')}.{getattr(code, 'co_qualname', code.co_name)}"
    named = found if isinstance(found, (type, BuiltinFunctionType)) else type(found)
    return f"{named.__module__}.{named.__qualname__}"


def _is_own(name: str, found: Any) -> bool:
    """Whether it is PyTorch's own function with PyTorch's own code."""
    return (
        type(found) is FunctionType
        and found.__globals__ is vars(HOME)
        and found.__code__.co_name == name
        and not hasattr(found, "__wrapped__")
        and not _is_redirect(found.__code__)
    )


def _of_torch(function: Any) -> bool:
    return function.__globals__ is vars(LAYERS) and not hasattr(function, "__wrapped__")


def _is_redirect(code: CodeType) -> bool:
    return NAME in code.co_names


def _spread(*tensors: Any) -> bool:
    """Whether there are DTensors, and nothing else but plain tensors."""
    return sharded.among(tensors) and all(
        t is None or type(t) in PLAIN or sharded.is_sharded(t) for t in tensors
    )


def _copy(function: FunctionType) -> FunctionType:
    """PyTorch's function as an object of its own, whose code stays."""
    copy = FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    copy.__annotations__ = function.__annotations__
    copy.__doc__, copy.__module__ = function.__doc__, function.__module__
    return copy


@functools.cache
def _redirect(name: str) -> CodeType:
    """Code with the function's signature: calls ours for plain tensors and DTensors, else PyTorch's."""
    signature = inspect.signature(ORIGINALS[name])
    empty = inspect.Signature.empty
    parameters = signature.parameters.values()
    bare = signature.replace(
        parameters=[p.replace(annotation=empty) for p in parameters], return_annotation=empty
    )
    names = ((f"{p.name}=" if p.kind is p.KEYWORD_ONLY else "") + p.name for p in parameters)
    passed = ", ".join(names)

    def all_in(types: str) -> str:
        return " and ".join(
            f"type({p.name}) in found.{types}"
            if p.annotation is Tensor
            else f"({p.name} is None or type({p.name}) in found.{types})"
            for p in parameters
            if p.annotation in (Tensor, Tensor | None)
        )

    tensors = ", ".join(p.name for p in parameters if p.annotation in (Tensor, Tensor | None))
    source = (
        f"def {name}{bare}:\n"
        f"    try:\n"
        f"        found = {NAME}\n"
        f"    except NameError:\n"  # another thread has unpatched since this call began
        f"        from {__name__} import ORIGINALS\n"
        f"        return ORIGINALS[{name!r}]({passed})\n"
        f"    if {all_in('plain')} or found.compiling() and {all_in('traced')} or found.spread({tensors}):\n"
        f"        return found.ours[{name!r}]({passed})\n"
        f"    return found.theirs[{name!r}]({passed})\n"
    )
    namespace: dict[str, Any] = {}
    exec(compile(source, FILE, "exec"), namespace)
    return namespace[name].__code__


_earlier = vars(HOME).get(NAME)  # of this module, which is being imported anew
if _earlier:
    _earlier.unpatch()

FOUND = {name: getattr(HOME, name) for name in losses.__all__ if hasattr(HOME, name)}
FUNCTIONS = {name: found for name, found in FOUND.items() if _is_own(name, found)}
# TorchScript compiles these in place of ours, patched or not.
ORIGINALS = {name: _copy(function) for name, function in FUNCTIONS.items()}
for _name, _found in {**FOUND, **ORIGINALS}.items():
    getattr(losses, _name).__prepare_scriptable__ = functools.partial(lambda found: found, _found)

# The layer whose outputs may be logits.
LAYERS, LINEAR = torch.nn.modules.linear, torch.nn.Linear.forward
OWN_LINEAR = LINEAR.__code__
_made: dict[str, Any] = {}
exec(
    compile(
        "def forward(self, input):\n"
        "    try:\n"
        f"        found = {NAME}\n"
        "    except NameError:\n"  # another thread has unpatched since this call began
        "        return F.linear(input, self.weight, self.bias)\n"
        "    return found(self, input)\n",
        FILE,
        "exec",
    ),
    _made,
)
_LAZY_LINEAR: CodeType = _made["forward"].__code__

_names = SimpleNamespace(
    ours={name: getattr(losses, name) for name in FUNCTIONS},
    theirs=ORIGINALS,
    plain=PLAIN,
    traced=(*PLAIN, FakeTensor, FunctionalTensor),
    # An exporter, too, whose first graph keeps the call, traces it for the second.
    compiling=torch_state.is_compiling,
    spread=_spread,
    unpatch=unpatch,
)
if _earlier:
    patch()
