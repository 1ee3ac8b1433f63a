"""The module of a loss: a subclass of its namesake in `torch.nn`, whose constructor it keeps."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Optional  # noqa: F401

import torch.nn
from torch import Tensor  # noqa: F401  (in what is compiled here)

from .settings import DENOMINATOR
from .signature import LEGACY, Parameter, bare, compiled, extended

MODULES: dict[str, type[torch.nn.Module]] = {}  # of the face fusedloss.nn, by their names
FACE = "fusedloss.nn"
OF_BATCH = "sample_weight"  # the weight that is no setting
# What forward takes, as TorchScript says it.
KINDS_OF_CALL = {OF_BATCH: "Optional[Tensor]", DENOMINATOR: "Optional[Tensor | float]"}
OF_CALL = tuple(KINDS_OF_CALL)


def make(
    name: str,
    function: Callable[..., Any],
    parameters: Mapping[str, Parameter],
    operands: tuple[str, ...],
    extensions: tuple[str, ...],
) -> None:
    """Of its settings, forward passes those that the constructor takes; an extension is a keyword of both."""
    theirs: Any = getattr(torch.nn.modules, name)  # whatever has been put into torch.nn
    constructor = inspect.signature(theirs.__init__)
    tensors = [n for n in inspect.signature(theirs.forward).parameters if n != "self"]
    kept = [n for n in parameters if n in constructor.parameters and n not in (*LEGACY, *operands)]
    passed = ", ".join([*tensors, *(f"{n}=self.{n}" for n in kept)])
    of_call = [n for n in extensions if n in OF_CALL]
    extensions = tuple(n for n in extensions if n not in OF_CALL)
    more = "".join([f", {n}=self.{n}" for n in extensions] + [f", {n}={n}" for n in of_call])
    # TorchScript takes no keyword-only parameters.
    given = [*tensors, *(f"{n}: {KINDS_OF_CALL[n]} = None" for n in of_call)]
    lines = [f"def forward(self, {', '.join(given)}):"]
    set_ = [_is_set(parameters[n]) for n in extensions] + [f"{n} is not None" for n in of_call]
    if set_:  # TorchScript, which has PyTorch's own function, drops the branch
        lines += ["    if not torch.jit.is_scripting():", f"        if {' or '.join(set_)}:"]
        lines += [f"            return _function({passed}{more})"]
        for n in of_call:
            lines.append(f"    assert {n} is None, 'TorchScript has no {n}'")
    lines += [f"    return _function({passed})"]
    body: dict[str, Any] = {
        "forward": compiled(lines, "forward", {"_function": function}, globals(), f"{name}."),
        "__module__": FACE,
        "__doc__": f"See :func:`fusedloss.functional.{function.__name__}`; constructor as "
        f":class:`torch.nn.{name}`{', and ' if extensions else ''}{', '.join(extensions)}.",
    }
    if extensions:
        added = [parameters[n] for n in extensions]
        body |= _extension(theirs, extended(constructor, added), {p.name: p.default for p in added})
    MODULES[name] = type(name, (theirs,), body)


def _is_set(extension: Parameter) -> str:
    return f"self.{extension.name}" + (" is not None" if extension.default is None else "")


def make_alone(
    name: str,
    function: Callable[..., Any],
    parameters: Mapping[str, Parameter],
    operands: tuple[str, ...],
    optional: tuple[str, ...],
) -> None:
    """One that PyTorch has no namesake of, constructed with the settings; tensors among them are buffers."""
    of_call = [n for n in OF_CALL if n in parameters]
    settings = [p for n, p in parameters.items() if n not in (*operands, *of_call)]
    taken = inspect.Signature([Parameter("self", Parameter.POSITIONAL_OR_KEYWORD), *settings])
    lines = [f"def __init__{bare(taken)}:", "    _super.__init__(self)"]
    for p in settings:
        buffer = f"    self.register_buffer({p.name!r}, {p.name})"
        lines.append(buffer if p.name in optional else f"    self.{p.name} = {p.name}")
    passed = [*operands, *(f"{p.name}=self.{p.name}" for p in settings)]
    passed += [f"{n}={n}" for n in of_call]
    forward = [
        f"def forward(self, {', '.join([*operands, *(f'{n}=None' for n in of_call)])}):",
        f"    return _function({', '.join(passed)})",
    ]

    def extra_repr(self: Any) -> str:
        shown = {p.name: getattr(self, p.name) for p in settings if p.name not in optional}
        return ", ".join(f"{n}={v!r}" for n, v in shown.items())

    constructor = compiled(lines, "__init__", {"_super": torch.nn.Module}, globals(), f"{name}.")
    MODULES[name] = type(
        name,
        (torch.nn.Module,),
        {
            "__init__": constructor,
            "forward": compiled(forward, "forward", {"_function": function}, globals(), f"{name}."),
            "extra_repr": extra_repr,
            "__constants__": [p.name for p in settings if p.name not in optional],
            "__module__": FACE,
            "__doc__": f"See :func:`fusedloss.functional.{function.__name__}`, whose settings it takes.",
        },
    )


def _extension(
    theirs: Any, constructor: inspect.Signature, added: dict[str, Any]
) -> dict[str, Any]:
    """Attributes of a module with settings that PyTorch's lacks; at their defaults it is like its namesake."""
    arguments = [n for n in constructor.parameters if n != "self" and n not in added]
    lines = [f"def __init__{bare(constructor)}:"]
    lines += [f"    _theirs.__init__(self, {', '.join(f'{n}={n}' for n in arguments)})"]
    for n, default in added.items():
        lines += [f"    if {n} != {default!r}:", f"        self.{n} = {n}"]

    def extra_repr(self: Any) -> str:
        said = theirs.extra_repr(self)
        own = [f"{n}={v}" for n, d in added.items() if (v := getattr(self, n)) != d]
        return ", ".join(filter(None, [said, *own]))

    return {
        **added,
        "__constants__": [*getattr(theirs, "__constants__", ()), *added],
        "__init__": compiled(
            lines, "__init__", {"_theirs": theirs}, globals(), f"{theirs.__name__}."
        ),
        "extra_repr": extra_repr,
    }
