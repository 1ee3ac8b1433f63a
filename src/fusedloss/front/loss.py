"""`@loss`: from a definition its public function, its module, its documentation and its registry rows."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from torch import Tensor

from ..core import errors, levels, plain, reduce, sharded, torch_state
from ..route.memo import Asked
from . import docs, modules, signature, strict
from .definition import Loss, register
from .modules import OF_BATCH, OF_CALL
from .settings import BY_DEFAULT, DENOMINATOR, Setting, divisor
from .signature import Memo, Parameter

FUNCTIONS: dict[str, Callable[..., Any]] = {}  # every public loss, by its name
BY = Parameter(DENOMINATOR, Parameter.KEYWORD_ONLY, default=None, annotation=Tensor | float | None)


class Malformed(TypeError):
    """A definition that cannot be; file, line and remedy are in the message."""


@dataclass(repr=False, eq=False)
class Definition:
    """What a loss is beside its formulas."""

    name: str
    body: Callable[..., Any]  # chooses the formula by the settings, or computes the loss
    module: str | None
    signature: inspect.Signature
    operands: tuple[str, ...]  # the tensors that every call has
    optional: tuple[str, ...]  # those that it may have
    further: tuple[str, ...]  # of these, the operands of a formula that the body chooses by them
    settings: dict[str, Setting]
    extensions: tuple[str, ...]  # settings that PyTorch lacks
    theirs: inspect.Signature | None  # that of PyTorch's function
    named: tuple[str, ...]  # the parameters but for what 'mean' divides by

    @property
    def alone(self) -> bool:
        """Whether PyTorch has no function of the name: the body has the whole signature."""
        return self.theirs is None

    def tensors(self, given: dict[str, Any], kind: type[Exception]) -> dict[str, Tensor]:
        """The operands.

        Raises:
            kind: one is no tensor.
        """
        found = {n: given[n] for n in self.operands}
        for t in found.values():
            if not isinstance(t, Tensor):
                errors.not_tensors(self.name, kind, **found)
        return found

    def more_tensors(self, given: dict[str, Any], kind: type[Exception]) -> dict[str, Tensor]:
        """The optional ones that there are; raises likewise."""
        found = {n: t for n in self.optional if (t := given[n]) is not None}
        for t in found.values():
            if not isinstance(t, Tensor):
                errors.not_tensors(self.name, kind, **found)
        return found

    def checked(self, given: dict[str, Any]) -> dict[str, Any]:
        """The settings that are meant.

        Raises:
            TypeError, ValueError: what a setting's word says.
        """
        return {n: s.check(self.name, n, given[n]) for n, s in self.settings.items()}

    def chosen(self, given: dict[str, Any], settings: dict[str, Any]) -> Any:
        """What the body makes of the settings that are meant."""
        if not self.alone:
            return self.body(**settings)
        return self.body(**{**{n: given[n] for n in self.named}, **settings})

    def reduction(self, given: dict[str, Any], allowed: tuple[str, ...] = reduce.REDUCTIONS) -> str:
        return reduce.resolve(
            self.name,
            given["reduction"],
            given.get("size_average"),
            given.get("reduce"),
            allowed,
        )

    def divisor(self, given: dict[str, Any], reduction: str) -> Tensor | float | None:
        """What 'mean' shall divide by, in place of a count of its own; raises as `settings.divisor` does."""
        value = given.get(DENOMINATOR)
        if value is None:
            return None
        first = self.operands[0]
        return divisor(self.name, value, reduction, **{first: given[first]})

    def memo(self, has_domain: bool = False, *conditions: str) -> Memo:
        """A call is repeated by its settings and its tensors: the operands, and then those that it may have."""
        absent = [n for n in signature.LEGACY if n in self.signature.parameters]
        settled = [s.settled.format(n) for n, s in self.settings.items() if s.settled]
        plain = " and ".join([*(f"{n} is None" for n in absent), *settled, *conditions]) or "True"
        more = sorted(self.optional, key=(*self.further, "weight", OF_BATCH).index)
        keys = ["reduction", *(s.key.format(n) for n, s in self.settings.items())]
        keys += [f"{n} is None" for n in more]  # where tensors stand depends on it
        tensors = f"({', '.join(self.operands)})"
        if more:
            none = " and ".join(f"{n} is None" for n in more)
            if len(more) > 1:
                more = [f"*_present({', '.join(more)})"]
            others = f"({', '.join((*self.operands, *more))})"
            tensors = f"({tensors} if {none} else {others})"
        return Memo(
            plain, ", ".join(keys), tensors, has_domain, DENOMINATOR in self.signature.parameters
        )

    def refuse_what_users_rue(
        self, tensors: dict[str, Tensor], given: dict[str, Any], **settings: Any
    ) -> None:
        """ValueError where `checks("strict")` refuses the call."""
        if levels.strict() and self.name in strict.RULES:
            if given.get(DENOMINATOR) is not None:
                settings["reduction"] = (
                    "sum"  # nothing of a mean over a count of its own is at stake
                )
            seen = {n: v for n, v in settings.items() if n in strict.Seen._fields}
            strict.check(self.name, tensors["input"], tensors["target"], **seen)


class Ladder(Protocol):
    """The checks of a family of losses, and what is run after them."""

    kind: ClassVar[str]  # of kernels, as the registry names them
    computes: ClassVar[bool]  # whether the definition's function computes the loss

    @property
    def divides(self) -> bool:
        """Whether 'mean' has one count of its own, for which another may be given."""

    def memo(self, loss: Definition) -> Memo | None:
        """How a call is told to be like an earlier one; None: it is never repeated unchecked."""

    def run(self, loss: Definition, asked: Asked | None, given: dict[str, Any]) -> Any: ...

    def words(self, loss: Definition) -> docs.Words: ...


def loss(
    module: str | None,
    ladder: Ladder,
    *rows: Loss,
    rules: tuple[strict.Rule, ...] = (),
    **settings: Setting,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Makes the public function of the name and with the parameters of PyTorch's, and its module.

    The function that is decorated says the rest: its docstring the formula and what the arguments are, its
    parameters the settings that it chooses by, of which one with a default is an extension. `settings` says
    what each may be, in a word of `settings.py`, if its default does not say it; `rules` what
    `checks("strict")` refuses.

    Raises:
        Malformed: the definition lacks a part, or says what PyTorch's signature or the library does not know.
    """

    def define(body: Callable[..., Any]) -> Callable[..., Any]:
        found = _definition(body, module, settings, ladder)
        parameters = found.signature.parameters
        names = list(parameters)

        def finish(asked: tuple[Any, Any] | None, *arguments: Any) -> Any:
            given = dict(zip(names, map(plain.taken, arguments), strict=True))
            told = Asked(*asked) if asked else None
            if torch_state.is_compiling() or not sharded.among(given.values()):
                return ladder.run(found, told, given)
            with sharded.noted(given):
                return ladder.run(found, told, given)

        made = signature.function(
            found.name, body.__globals__, found.signature, found.theirs, finish, ladder.memo(found)
        )
        namesake = "" if found.alone else module or ""
        words = ladder.words(found)
        made.__doc__ = docs.of_function(body, namesake, names, found.settings, words)
        made.__annotations__ = {n: p.annotation for n, p in parameters.items()}
        made.__annotations__["return"] = found.signature.return_annotation
        FUNCTIONS[found.name] = made
        if rules:
            strict.RULES[found.name] = rules
        for row in rows:
            kind = row.kind or ladder.kind
            register(row._replace(function=made, module=namesake, kind=kind))
        if module is not None and found.alone:
            modules.make_alone(module, made, parameters, found.operands, found.optional)
        elif module is not None:
            modules.make(module, made, parameters, found.operands, found.extensions)
        return made

    return define


def _definition(
    body: Callable[..., Any], module: str | None, settings: dict[str, Setting], ladder: Ladder
) -> Definition:
    name, computes = body.__name__, ladder.computes
    own = inspect.signature(body, eval_str=True)
    theirs, whole = signature.of_torch(name), own
    if theirs is not None:
        added = [p for p in own.parameters.values() if p.default is not p.empty]
        whole = signature.extended(theirs, added)
    elif "reduction" not in whole.parameters and not computes:
        remedy = "name it as PyTorch does, or write its whole signature"
        raise malformed(body, f"torch.nn.functional has no {name}", remedy)
    named = tuple(whole.parameters)
    if ladder.divides:
        whole = signature.extended(whole, [BY])
    tensors = {n: p for n, p in whole.parameters.items() if signature.takes_tensor(p)}
    for n in own.parameters:
        if n not in whole.parameters:
            fault = f"{n} is no parameter of PyTorch's {name}"
            raise malformed(body, fault, "give it a default, as an extension")
        if n in settings or n in tensors or n == "reduction" or computes:
            continue
        if (word := BY_DEFAULT.get(type(whole.parameters[n].default))) is None:
            remedy = f"pass @loss a word of front/settings.py, such as {n}=positive"
            raise malformed(body, f"{n} does not say what it may be", remedy)
        settings[n] = word
    for n in settings:
        if n not in own.parameters:
            raise malformed(body, f"it takes no {n}", f"let it choose by {n}, or drop the word")
    if not body.__doc__:
        raise malformed(body, "it has no docstring", "write its formula and its arguments there")
    return Definition(
        name=name,
        body=body,
        module=module,
        signature=whole,
        operands=tuple(n for n, p in tensors.items() if p.default is p.empty),
        optional=tuple(n for n, p in tensors.items() if p.default is None and n != DENOMINATOR),
        further=tuple(
            n
            for n in own.parameters
            if theirs and n in tensors and tensors[n].default is None and n not in OF_CALL
        ),
        settings={n: settings[n] for n in own.parameters if n in settings},
        extensions=tuple(n for n in whole.parameters if theirs and n not in theirs.parameters),
        theirs=theirs,
        named=named,
    )


def malformed(body: Callable[..., Any], fault: str, remedy: str) -> Malformed:
    code = body.__code__
    return Malformed(
        f"{code.co_filename}:{code.co_firstlineno}: {body.__name__}: {fault}: {remedy}"
    )
