"""Our losses in place of `torch.nn.functional`'s, and so of `torch.nn`'s modules, which call those.

A function of PyTorch stays the object that it was; its code alone is replaced. So whoever imported
it earlier, by whatever name, gets ours too, and whatever knows it by identity still does: pickle,
torch.fx, tensor subclasses.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from types import CodeType, FunctionType, SimpleNamespace
from typing import Any

import torch.nn.functional
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from . import caches, losses

HOME = torch.nn.functional
NAME = "_fusedloss"  # what the patched functions find us by, in the globals of HOME

_codes: dict[str, CodeType] = {}  # PyTorch's own, while ours are in place


def patch() -> None:
    """Makes the losses of `torch.nn` and `torch.nn.functional` run ours, for unedited code.

    Only plain tensors take our path; tensor subclasses, proxies and TorchScript get PyTorch's own
    functions as before. To patch again changes nothing.
    """
    if _codes:
        return
    plain = (Tensor, torch.nn.Parameter)
    traced = (*plain, FakeTensor, FunctionalTensor)
    ours = {name: getattr(losses, name) for name in ORIGINALS}
    names = SimpleNamespace(
        ours=ours, theirs=ORIGINALS, plain=plain, traced=traced, compiling=_compiling
    )
    caches.mark()
    setattr(HOME, NAME, names)
    for name in ORIGINALS:
        function = getattr(HOME, name)
        _codes[name] = function.__code__
        function.__code__ = _redirect(function)
        function.__prepare_scriptable__ = ours[name].__prepare_scriptable__


def unpatch() -> None:
    """Puts PyTorch's own losses back. Without a patch it does nothing."""
    for name, code in _codes.items():
        function = getattr(HOME, name)
        function.__code__ = code
        del function.__prepare_scriptable__
    if _codes:
        delattr(HOME, NAME)
        caches.unmark()
    _codes.clear()


@contextmanager
def patched() -> Iterator[None]:
    """`patch()` for the length of a block; within an outer patch it changes nothing."""
    outer = bool(_codes)
    patch()
    try:
        yield
    finally:
        if not outer:
            unpatch()


def _compiling() -> bool:
    """Whether torch.compile, whose first graph keeps the call, traces it for the second."""
    return torch.compiler.is_compiling() and not torch.compiler.is_exporting()


def _copy(function: FunctionType) -> FunctionType:
    """PyTorch's function as an object of its own, whose code stays."""
    copy = FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    copy.__annotations__ = function.__annotations__
    copy.__doc__, copy.__module__ = function.__doc__, function.__module__
    return copy


def _redirect(function: FunctionType) -> CodeType:
    """Code with the function's signature: calls ours for plain tensors, else PyTorch's."""
    name, signature = function.__name__, inspect.signature(function)
    empty = inspect.Signature.empty
    parameters = signature.parameters.values()
    bare = signature.replace(
        parameters=[p.replace(annotation=empty) for p in parameters], return_annotation=empty
    )
    names = ((f"{p.name}=" if p.kind is p.KEYWORD_ONLY else "") + p.name for p in parameters)
    passed = ", ".join(names)

    def all_in(types: str) -> str:
        return " and ".join(
            f"type({p.name}) in {NAME}.{types}"
            if p.annotation is Tensor
            else f"({p.name} is None or type({p.name}) in {NAME}.{types})"
            for p in parameters
            if p.annotation in (Tensor, Tensor | None)
        )

    source = (
        f"def {name}{bare}:\n"
        f"    if {all_in('plain')} or {NAME}.compiling() and {all_in('traced')}:\n"
        f"        return {NAME}.ours[{name!r}]({passed})\n"
        f"    return {NAME}.theirs[{name!r}]({passed})\n"
    )
    namespace: dict[str, Any] = {}
    exec(compile(source, __file__, "exec"), namespace)
    return namespace[name].__code__


# TorchScript compiles these in place of ours, patched or not.
ORIGINALS = {name: _copy(getattr(HOME, name)) for name in losses.__all__ if hasattr(HOME, name)}
for _name, _original in ORIGINALS.items():
    getattr(losses, _name).__prepare_scriptable__ = functools.partial(dict.get, ORIGINALS, _name)
