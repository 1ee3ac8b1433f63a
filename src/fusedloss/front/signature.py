"""The public function of a loss: PyTorch's signature, `__torch_function__`, and the memo of repeated calls."""

from __future__ import annotations

import ast
import inspect
import linecache
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FunctionType
from typing import Any, NamedTuple, get_args

import torch.nn.functional
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from ..kinds.torch_m import OutsideDomain
from ..route.memo import repeat, repeat_over

HOME = torch.nn.functional
LEGACY = ("size_average", "reduce")
Parameter = inspect.Parameter


def of_torch(name: str) -> inspect.Signature | None:
    """The signature of PyTorch's function, whatever another library has put in its place."""
    found = vars(HOME).get(name)
    if found is None:
        return None
    own = type(found) is FunctionType and found.__globals__ is vars(HOME)
    if own and found.__code__.co_name == name and not hasattr(found, "__wrapped__"):
        return inspect.signature(found)
    tree = ast.parse(Path(str(HOME.__file__)).read_text())
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            node.body = [ast.Pass()]
            scope = dict(vars(HOME))
            exec(
                compile(ast.fix_missing_locations(ast.Module([node], [])), "<signature>", "exec"),
                scope,
            )
            return inspect.signature(scope[name])
    return None


def extended(theirs: inspect.Signature, own: Iterable[Parameter]) -> inspect.Signature:
    """With what we add: keywords, after theirs."""
    parameters = list(theirs.parameters.values())
    more = [p.replace(kind=p.KEYWORD_ONLY) for p in own if p.name not in theirs.parameters]
    return theirs.replace(parameters=parameters + more)


def takes_tensor(parameter: Parameter) -> bool:
    annotation = parameter.annotation
    return annotation is Tensor or Tensor in get_args(annotation) or annotation == "Tensor"


def _is_default(p: Parameter) -> str:
    if p.default is None or isinstance(p.default, bool):
        return f"{p.name} is {p.default}"
    return f"type({p.name}) is {type(p.default).__name__} and {p.name} == {p.default!r}"


def bare(signature: inspect.Signature) -> str:
    """Its text without annotations, of parameters that may be given by name."""
    words = [
        p.name if p.default is p.empty else f"{p.name}={p.default!r}"
        for p in signature.parameters.values()
    ]
    kinds = [p.kind for p in signature.parameters.values()]
    if Parameter.KEYWORD_ONLY in kinds:
        words.insert(kinds.index(Parameter.KEYWORD_ONLY), "*")
    return f"({', '.join(words)})"


def compiled(
    lines: list[str], name: str, known: dict[str, Any], scope: dict[str, Any], of: str = ""
) -> Any:
    """The function of these lines, with what they know as its closure.

    Tracebacks, TorchScript and torch.compile find its text and its globals as they find others'.
    """
    inner = "\n".join(f"    {line}" for line in lines)
    source = f"def make({', '.join(known)}):\n{inner}\n    return {name}\n"
    path = f"<fusedloss {of}{name}>"
    linecache.cache[path] = (len(source), None, source.splitlines(True), path)
    made: dict[str, Any] = {}
    exec(compile(source, path, "exec"), scope, made)
    function = made["make"](**known)
    function.__qualname__ = f"{of}{name}"
    return function


class Memo(NamedTuple):
    """How a call is told to be like an earlier one, as source text."""

    plain: str  # the condition: settings whose value is all that they are
    key: str  # the settings
    tensors: str  # those that there are, in the order in which they go to the kernel
    has_domain: bool
    divides: bool = False  # a mean may be over another number


def present(*tensors: Any) -> tuple[Any, ...]:
    return tuple(t for t in tensors if t is not None)


def function(
    name: str,
    scope: dict[str, Any],
    signature: inspect.Signature,
    theirs: inspect.Signature | None,
    finish: Callable[..., Any],
    memo: Memo | None,
) -> Callable[..., Any]:
    """`finish(asked, *arguments)` behind what every loss does first; `scope` are the definition's globals."""
    parameters = signature.parameters.values()
    tensors = ", ".join(p.name for p in parameters if takes_tensor(p))
    passed = [
        p.name if p.default is p.empty and p.kind is not p.KEYWORD_ONLY else f"{p.name}={p.name}"
        for p in parameters
        if theirs is None or p.name in theirs.parameters
    ]
    for p in parameters:
        if theirs is not None and p.name not in theirs.parameters:  # PyTorch's own has none
            passed.append(f"**({{}} if {_is_default(p)} else {{{p.name!r}: {p.name}}})")
    everything = ", ".join(p.name for p in parameters)
    lines = [
        f"def {name}{bare(signature)}:",
        f"    if _has({tensors}):",
        f"        return _handle({name}, ({tensors},), {', '.join(passed)})",
    ]
    if memo is None:
        lines.append(f"    return _finish(None, {everything})")
    else:
        call = ["if (_found := _repeat(_name, _settings, _tensors)) is not None:"]
        call += ["    return _found"]
        if memo.divides:
            over = "(_found := _over(_name, _settings, _tensors, denominator)) is not None"
            call = ["if denominator is None:", *("    " + line for line in call)]
            call += [f"elif {over}:", "    return _found"]
        if memo.has_domain:  # what lies outside is told below
            call = ["try:", *("    " + line for line in call), "except _OutsideDomain:", "    pass"]
        call = [f"_settings = ({memo.key},)", f"_tensors = {memo.tensors}", *call]
        call.append(f"return _finish((_settings, _tensors), {everything})")
        lines += [f"    if {memo.plain}:", *("        " + line for line in call)]
        lines.append(f"    return _finish(None, {everything})")
    known = {
        "_has": has_torch_function_variadic,
        "_handle": handle_torch_function,
        "_name": name,
        "_repeat": repeat,
        "_over": repeat_over,
        "_present": present,
        "_finish": finish,
        "_OutsideDomain": OutsideDomain,
    }
    made: Callable[..., Any] = compiled(lines, name, known, scope)
    return made
