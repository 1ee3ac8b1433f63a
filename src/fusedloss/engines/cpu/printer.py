"""Prints the formulas of pointwise losses as C++: `python printer.py FOLDER LOSSES...`.

Into the folder go a unit for each file of losses, for a formula that changes to rebuild no other, and
formulas.h, which lists them. Runs at build time on the source text alone, so it needs neither torch nor the
package. It finds the module-level calls `Pointwise(value, grad[, domain=...])` and prints the functions
that they name, written with what `kinds/names.py` lists; the C++ side of it is math.h.
"""

from __future__ import annotations

import ast
import copy
import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple, NoReturn

# By its path: at build time there is no package.
NAMES = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[2] / "kinds" / "names.py")))
BINARY = NAMES.ARITHMETIC | NAMES.LOGIC
SIGNS = " ".join([*BINARY.values(), *NAMES.COMPARISONS.values()])
USUAL = f"a formula has its parameters, numbers, {SIGNS} and m"
CONDITION, NUMBER, VALUE, DERIVATIVES = "a condition", "a number", "a value", "derivatives"


class CannotPrint(Exception):
    """A formula uses something that has no C++ counterpart here."""


class Stages:
    """The calls of a formula that are staged, and which of them each of its results needs."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.needs: list[set[int]] = []  # of each stage: the earlier ones, and itself
        self.used: set[int] = set()

    def call(self, function: str, argument: str) -> str:
        """The name of the stage that makes this call, or the call itself where there are too many."""
        text = f"math::{function}({argument})"
        if text not in self.calls:
            if len(self.calls) == NAMES.STAGES:
                return text
            self.calls.append(text)
            earlier = [self.needs[k] for k in range(len(self.needs)) if f"s{k}" in argument]
            self.needs.append(set().union({len(self.needs)}, *earlier))
        number = self.calls.index(text)
        self.used |= self.needs[number]
        return f"s{number}"


class Assigned(ast.NodeTransformer):
    """Puts what was assigned in place of a name: a stage knows no local variables."""

    def __init__(self) -> None:
        self.values: dict[str, ast.expr] = {}

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return self.values.get(node.id, node)

    def whole(self, node: ast.expr) -> ast.expr:
        return self.visit(copy.deepcopy(node))


def of_m(node: ast.expr) -> tuple[str, list[ast.expr]] | None:
    """The name and the arguments of a call of `m`."""
    match node:
        case ast.Call(ast.Attribute(ast.Name("m"), name), args, []):
            return name, args
    return None


def magnitude(node: ast.expr) -> ast.expr:
    """Something of the same magnitude, with fewer signs."""
    match node:
        case ast.UnaryOp(ast.USub(), operand):
            return magnitude(operand)
        case ast.Call(ast.Attribute(ast.Name("m"), "abs"), [arg], []):
            return magnitude(arg)
        case ast.BinOp(left, ast.Mult() | ast.Div() as op, right):
            return ast.BinOp(magnitude(left), op, magnitude(right))
    return node


class Formula:
    """Prints the functions of one formula."""

    def __init__(self, path: str, operands: Sequence[str], numbers: Sequence[str]) -> None:
        self.path = path
        self.parameters = dict.fromkeys(operands, VALUE) | dict.fromkeys(numbers, NUMBER)
        self.stages = Stages()

    def refuse(self, node: ast.AST, why: str = USUAL) -> NoReturn:
        text = ast.unparse(node).splitlines()[0]
        raise CannotPrint(f"{self.at(node)}: cannot print `{text}` as C++: {why}")

    def kind(self, node: ast.expr, local: Assigned) -> str:
        """Whether this is a condition, a number or a value; refuses what is none of them."""
        match node:
            case ast.Name(name) if name in local.values:
                return self.kind(local.values[name], Assigned())
            case ast.Name(name) if name in self.parameters:
                return self.parameters[name]
            case ast.Name():
                self.refuse(node, "it is no parameter, and no variable that was set before")
            case ast.Constant(bool()):
                pass
            case ast.Constant(float() | int()) | ast.Attribute(ast.Name("m"), "inf"):
                return NUMBER
            case ast.BinOp(left, op, right) if type(op) in BINARY:
                logic = type(op) in NAMES.LOGIC
                kinds = [self.expect(each, logic, local) for each in (left, right)]
                return VALUE if VALUE in kinds else kinds[0]
            case ast.UnaryOp(ast.USub(), operand):
                return self.expect(operand, False, local)
            case ast.Compare(left, [op], [right]) if type(op) in NAMES.COMPARISONS:
                for each in (left, right):
                    self.expect(each, False, local)
                return CONDITION
            case ast.Attribute(ast.Name("m"), name) | ast.Call(ast.Attribute(ast.Name("m"), name)):
                return self.kind_of_call(node, name, local)
        self.refuse(node)

    def kind_of_call(self, node: ast.expr, name: str, local: Assigned) -> str:
        known = NAMES.FUNCTIONS.get(name)
        if known is None:
            all_names = ", ".join([*NAMES.FUNCTIONS, *NAMES.CONSTANTS])
            self.refuse(node, f"m has no {name}, but {all_names}")
        found = of_m(node)
        if found is None or len(found[1]) != known.arity:
            self.refuse(node, f"m.{name} takes {known.arity} arguments, by position")
        _, args = found
        if name == "where":
            self.expect(args[0], True, local)
            args = args[1:]
        kinds = [self.expect(each, False, local) for each in args]
        if name == "pow" and not (
            isinstance(args[1], ast.Name) and self.parameters.get(args[1].id) == NUMBER
        ):
            self.refuse(node, "the exponent is one of the formula's numbers")
        if name != "where" and VALUE not in kinds:
            self.refuse(node, "it depends on no operand: let the loss compute it, as a number")
        return VALUE

    def expect(self, node: ast.expr, condition: bool, local: Assigned) -> str:
        found = self.kind(node, local)
        if (found == CONDITION) is not condition:
            self.refuse(node, f"it is {found} where {CONDITION if condition else VALUE} belongs")
        return found

    def text(self, node: ast.expr, local: Assigned) -> str:
        """As C++, of what `kind` let pass."""

        def text(node: ast.expr) -> str:
            return self.text(node, local)

        def staged(node: ast.expr, reduce: Callable[[ast.expr], ast.expr] = lambda n: n) -> str:
            return self.text(reduce(local.whole(node)), Assigned())

        match node:
            case ast.Name(name):
                return name
            case ast.Constant(value):
                return f"T({value!r})"
            case ast.BinOp(left, op, right):
                return f"({text(left)} {BINARY[type(op)]} {text(right)})"
            case ast.UnaryOp(_, operand):
                return f"(-{text(operand)})"
            case ast.Compare(left, [op], [right]):
                return f"({text(left)} {NAMES.COMPARISONS[type(op)]} {text(right)})"
            case ast.Attribute():
                return "std::numeric_limits<T>::infinity()"
            case ast.Call(ast.Attribute(attr="exp"), [ast.UnaryOp(_, arg)]) if (of_m(arg) or [""])[
                0
            ] == "abs":
                return self.stages.call("exp_minus_abs", staged(arg, magnitude))
            case ast.Call(ast.Attribute(attr="sigmoid" | "log_sigmoid" as name), [arg]):
                # Both are made from exp(-|x|), and so share it.
                e = self.stages.call("exp_minus_abs", staged(arg, magnitude))
                rest = e if name == "sigmoid" else self.stages.call("log1p_unit", e)
                return f"math::{name}({text(arg)}, {rest})"
            case ast.Call(ast.Attribute(attr="pow"), [arg, ast.Name(number)]):
                return self.stages.call("pow", f"{staged(arg)}, exactly.{number}")
            case ast.Call(ast.Attribute(attr=name), [arg]) if NAMES.FUNCTIONS[name].staged:
                return self.stages.call(name, staged(arg))
            case ast.Call(ast.Attribute(attr=name), args):
                return f"math::{name}({', '.join(map(text, args))})"
        self.refuse(node)

    def needs(self, node: ast.expr) -> int:
        """The stages that a result needs, as bits; it has no local variables."""
        self.stages.used = set()
        self.text(node, Assigned())
        return sum(1 << k for k in self.stages.used)

    def body(
        self, function: ast.FunctionDef, result: str, to: str = "d"
    ) -> tuple[list[str], list[int]]:
        """The statements of a function, and what its results need; derivatives go to d0, d1, ..."""
        lines: list[str] = []
        needs: list[int] = []
        local = Assigned()
        for statement in function.body:
            match statement:
                case ast.Expr(ast.Constant(str())):
                    pass
                case ast.Assign([ast.Name(name)], value):
                    if name in self.parameters or name in local.values:
                        self.refuse(statement, f"{name} is set already: take another name")
                    kind = "auto" if self.kind(value, local) == CONDITION else "T"
                    lines.append(f"const {kind} {name} = {self.text(value, local)};")
                    local.values[name] = local.whole(value)
                case ast.Return(ast.Tuple([_, *_] as values)) if result == DERIVATIVES:
                    for k, value in enumerate(values):
                        self.expect(value, False, local)
                        lines.append(f"{to}{k} = {self.text(value, local)};")
                        needs.append(self.needs(local.whole(value)))
                case ast.Return(ast.expr() as value) if result != DERIVATIVES:
                    self.expect(value, result == CONDITION, local)
                    lines.append(f"return {self.text(value, local)};")
                    needs.append(self.needs(local.whole(value)))
                case ast.Return() if result == DERIVATIVES:
                    self.refuse(statement, "a gradient is a tuple, of a derivative by each operand")
                case _:
                    self.refuse(statement)
        last = function.body[-1]
        if not isinstance(last, ast.Return):
            raise CannotPrint(f"{self.at(function)}: {function.name} does not end in a return")
        return lines, needs

    def at(self, node: ast.AST) -> str:
        return f"{self.path}:{getattr(node, 'lineno', '?')}"


class Parts(NamedTuple):
    """The functions of a formula."""

    value: ast.FunctionDef
    grad: ast.FunctionDef
    domain: ast.FunctionDef | None


def parts(call: ast.Call, functions: dict[str, ast.FunctionDef], path: str) -> Parts:
    """Those that one `Pointwise(...)` names, which agree in their parameters."""

    def fail(node: ast.expr | ast.stmt, why: str) -> NoReturn:
        raise CannotPrint(f"{path}:{node.lineno}: {why}")

    def function(node: ast.expr) -> ast.FunctionDef:
        if isinstance(node, ast.Name) and node.id in functions:
            return functions[node.id]
        fail(node, f"`{ast.unparse(node)}` is not a function of this file: define it there")

    named = dict(zip(("value", "grad", "domain"), call.args, strict=False))
    named |= {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg}
    if not {"value", "grad"} <= named.keys():
        fail(call, "Pointwise needs a value and a grad")
    value, grad = function(named["value"]), function(named["grad"])
    domain = function(named["domain"]) if "domain" in named else None
    operands, numbers = parameters(value)
    if not 2 <= len(operands) <= NAMES.OPERANDS:
        words = f"{value.name} takes {len(operands)} operands, not 2 to {NAMES.OPERANDS}"
        fail(value, f"{words}: its positional parameters")
    if len(numbers) > NAMES.NUMBERS:
        words = f"{value.name} takes {len(numbers)} numbers, not up to {NAMES.NUMBERS}"
        fail(value, f"{words}: its keyword-only parameters")
    for other in filter(None, (grad, domain)):
        for kind, ours, theirs in zip(
            ("operands", "numbers"), parameters(other), (operands, numbers), strict=True
        ):
            if ours != theirs:
                words = f"{other.name} and {value.name} take different {kind}"
                fail(other, f"{words}: give it the parameters ({ast.unparse(value.args)})")
    return Parts(value, grad, domain)


def parameters(function: ast.FunctionDef) -> tuple[list[str], list[str]]:
    """The operands and the numbers."""
    args = function.args
    return [a.arg for a in args.posonlyargs + args.args], [a.arg for a in args.kwonlyargs]


def struct(call: ast.Call, functions: dict[str, ast.FunctionDef], path: str) -> Struct:
    """Of one `Pointwise(...)`."""
    value, grad, domain = parts(call, functions, path)
    operands, numbers = parameters(value)
    formula = Formula(path, operands, numbers)
    in_domain, _ = formula.body(domain, CONDITION) if domain else ([], [])
    if formula.stages.calls:
        raise CannotPrint(f"{path}:{call.lineno}: a domain cannot use exp or log")
    in_value, needs_value = formula.body(value, VALUE)
    in_grad, needs_grad = formula.body(grad, DERIVATIVES)
    count, stages = len(needs_grad), formula.stages.calls
    if count > len(operands):
        words = f"{grad.name} gives {count} derivatives by {len(operands)} operands"
        raise CannotPrint(f"{path}:{grad.lineno}: {words}: return one for each, in their order")

    def method(kind: str, given: list[str], lines: list[str]) -> list[str]:
        head = f"    inline {kind}({', '.join(given)}) const {{"
        return [head, *(f"        {line}" for line in lines), "    }"]

    # The loops hand as many to every formula, used or not.
    absent = ["T"] * (NAMES.OPERANDS - len(operands))
    taken = [*(f"T {name}" for name in operands), *absent]
    staged = taken + [f"T s{k}" if k < len(stages) else "T" for k in range(NAMES.STAGES)]
    given = [f"T& d{k}" if k < count else "T&" for k in range(NAMES.OPERANDS)]
    made = [f"if constexpr (k == {k}) return {text};" for k, text in enumerate(stages)]
    # Logarithms of x and 1 - x can be taken at once (math::logs_of_parts), if a domain keeps both positive.
    logs = [f"math::log({operands[0]})", f"math::log1p((-{operands[0]}))"]
    of_parts = domain is not None and stages == logs
    powers = any("exactly." in text for text in stages)
    lines = [
        f"template <class T>\nstruct {value.name} {{",
        f"    static constexpr int operands = {len(operands)};",
        f"    static constexpr int derivatives = {count};",
        f"    static constexpr int numbers = {len(numbers)};",
        f"    static constexpr int stages = {len(stages)};",
        f"    static constexpr bool has_domain = {'true' if domain else 'false'};",
        f"    static constexpr bool of_parts = {'true' if of_parts else 'false'};",
        "    // The stages of the value and of each derivative, as bits.",
        f"    static constexpr int needs[] = {{{', '.join(map(str, needs_value + needs_grad))}}};",
        *(f"    T {p};" for p in numbers),
        *(
            ["    struct {", *(f"        double {p};" for p in numbers), "    } exactly;"]
            if powers
            else []
        ),
        f"    explicit {value.name}([[maybe_unused]] const double* numbers) {{",
        *(f"        {p} = T(numbers[{i}]);" for i, p in enumerate(numbers)),
        *(f"        exactly.{p} = numbers[{i}];" for i, p in enumerate(numbers) if powers),
        "    }",
        *(["    template <int k>", *method("T stage", staged, made)] if stages else []),
        *method("T value", staged, in_value),
        *method("void grad", staged + given, in_grad),
        *(method("auto domain", taken, in_domain) if domain else []),
        "};",
    ]
    return Struct(value.name, len(operands), count, "\n".join(lines))


class Struct(NamedTuple):
    """A formula as C++."""

    name: str
    operands: int
    derivatives: int
    text: str


def printed(sources: dict[str, str]) -> dict[str, str]:
    """Name and text of the list, and of a unit for each source (path to text) that has formulas.

    The same formula is printed once.
    """
    known: dict[str, tuple[Struct, str]] = {}
    files: dict[str, str] = {}
    for path, text in sources.items():
        tree = ast.parse(text, path)
        functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
        own = []
        for node in tree.body:
            match node:
                case ast.Assign(value=ast.Call(func=ast.Name("Pointwise")) as call):
                    found, place = struct(call, functions, path), f"{path}:{call.lineno}"
                    first, where = known.setdefault(found.name, (found, place))
                    if first != found:
                        words = f"{found.name} names another formula at {where}: rename one"
                        raise CannotPrint(f"{place}: {words}")
                    if where == place:
                        own.append(found)
        if own:
            files[f"formulas_{Path(path).stem}.cpp"] = unit(own)
    rows = (f"X({s.name}, {s.operands}, {s.derivatives})" for s, _ in known.values())
    files["formulas.h"] = f"{HEAD}\n#pragma once\n#define FUSEDLOSS_FORMULAS(X) {' '.join(rows)}\n"
    return files


HEAD = "// Printed by cpu/printer.py; edit the formulas instead."


def unit(structs: Sequence[Struct]) -> str:
    return "\n\n".join(
        [
            f'{HEAD}\n#include "formula.h"',
            "#pragma GCC diagnostic push\n"
            '#pragma GCC diagnostic ignored "-Wunused-parameter"\n'
            '#pragma GCC diagnostic ignored "-Wunused-variable"\n'
            '#pragma GCC diagnostic ignored "-Wunused-but-set-variable"\n'
            "namespace fusedloss::formulas {",
            *(s.text for s in structs),
            "}  // namespace fusedloss::formulas\n#pragma GCC diagnostic pop",
            "namespace fusedloss {",
            "\n".join(f"FUSEDLOSS_FORMULA({s.name})" for s in structs),
            "}  // namespace fusedloss\n",
        ]
    )


def main(folder: str, *paths: str) -> int:
    """Writes the files, but for those that stand there as they would be."""
    try:
        files = printed({Path(path).name: Path(path).read_text() for path in paths})
    except CannotPrint as error:
        print(error, file=sys.stderr)
        return 1
    for name, text in files.items():
        to = Path(folder) / name
        if not (to.exists() and to.read_text() == text):
            to.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
