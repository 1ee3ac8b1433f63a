"""Prints the formulas of pointwise losses as C++: `python printer.py LOSSES... > formulas.h`.

Runs at build time on the source text alone, so it needs neither torch nor the package. It finds the
module-level calls `Pointwise(value, grad[, domain=...])` and prints the functions that they name: names,
numbers, arithmetic, comparisons, `&`, `|`, and calls of the namespace `m`, whose C++ side is math.h.
"""

from __future__ import annotations

import ast
import copy
import sys
from pathlib import Path

OPERATORS = {
    ast.Add: "+",
    ast.Sub: "-",
    ast.Mult: "*",
    ast.Div: "/",
    ast.BitAnd: "&",
    ast.BitOr: "|",
    ast.Lt: "<",
    ast.LtE: "<=",
    ast.Gt: ">",
    ast.GtE: ">=",
    ast.Eq: "==",
    ast.NotEq: "!=",
    ast.USub: "-",
}
FUNCTIONS = {"abs", "maximum", "where"}
# Long chains of dependent instructions, of which a processor overlaps few: each gets a loop of its own.
STAGED = {"exp", "log", "log1p", "log_or_zero"}
INPUTS = 3
STAGES = 2


class CannotPrint(Exception):
    """A formula uses something that has no C++ counterpart here."""


class Stages:
    """The calls of a formula that are staged, and which of them each of its results needs."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.needs: list[set[int]] = []  # of each stage: the earlier ones, and itself
        self.used: set[int] = set()
        self.of_results: dict[str, int] = {}  # as bits

    def call(self, function: str, argument: str) -> str:
        """The name of the stage that makes this call, or the call itself where there are too many."""
        text = f"math::{function}({argument})"
        if text not in self.calls:
            if len(self.calls) == STAGES:
                return text
            self.calls.append(text)
            earlier = [self.needs[k] for k in range(len(self.needs)) if f"s{k}" in argument]
            self.needs.append(set().union({len(self.needs)}, *earlier))
        number = self.calls.index(text)
        self.used |= self.needs[number]
        return f"s{number}"

    def note(self, result: str, value: ast.expr, path: str) -> None:
        """Notes what a result needs; `value` has no local variables."""
        self.used = set()
        expression(value, path, self, Assigned())
        self.of_results[result] = sum(1 << k for k in self.used)


class Assigned(ast.NodeTransformer):
    """Puts what was assigned in place of a name: a stage knows no local variables."""

    def __init__(self) -> None:
        self.values: dict[str, ast.expr] = {}

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return self.values.get(node.id, node)

    def whole(self, node: ast.expr) -> ast.expr:
        return self.visit(copy.deepcopy(node))


def magnitude(node: ast.expr) -> ast.expr:
    """What `m.abs` is taken of, or the node itself."""
    match node:
        case ast.Call(ast.Attribute(ast.Name("m"), "abs"), [arg], []):
            return arg
    return node


def expression(node: ast.expr, path: str, stages: Stages, local: Assigned) -> str:
    def text(node: ast.expr) -> str:
        return expression(node, path, stages, local)

    def staged(node: ast.expr) -> str:
        return expression(local.whole(node), path, stages, Assigned())

    match node:
        case ast.Name(name):
            return name
        case ast.Constant(bool()):
            pass
        case ast.Constant(float() | int() as value):
            return f"T({value!r})"
        case ast.BinOp(left, op, right) if type(op) in OPERATORS:
            return f"({text(left)} {OPERATORS[type(op)]} {text(right)})"
        case ast.UnaryOp(ast.USub(), operand):
            return f"(-{text(operand)})"
        case ast.Compare(left, [op], [right]) if type(op) in OPERATORS:
            return f"({text(left)} {OPERATORS[type(op)]} {text(right)})"
        case ast.Attribute(ast.Name("m"), "inf"):
            return "std::numeric_limits<T>::infinity()"
        case ast.Call(ast.Attribute(ast.Name("m"), name), args, []) if name in FUNCTIONS:
            return f"math::{name}({', '.join(text(arg) for arg in args)})"
        case ast.Call(ast.Attribute(ast.Name("m"), "exp"), [ast.UnaryOp(ast.USub(), arg)], []) if (
            magnitude(arg) is not arg
        ):
            return stages.call("exp_minus_abs", staged(magnitude(arg)))
        case ast.Call(ast.Attribute(ast.Name("m"), name), [arg], []) if name in STAGED:
            return stages.call(name, staged(arg))
        case ast.Call(ast.Attribute(ast.Name("m"), "sigmoid" | "log_sigmoid" as name), [arg], []):
            # Both are made from exp(-|x|), and so share it.
            positive = arg.operand if isinstance(arg, ast.UnaryOp) else arg
            e = stages.call("exp_minus_abs", staged(magnitude(positive)))
            rest = e if name == "sigmoid" else stages.call("log1p_unit", e)
            return f"math::{name}({text(arg)}, {rest})"
    raise CannotPrint(f"{path}:{node.lineno}: cannot print `{ast.unparse(node)}` as C++")


def body(function: ast.FunctionDef, path: str, results: list[str], stages: Stages) -> list[str]:
    """The statements of a function; what it returns goes to `results`, or is returned if they are empty."""
    lines = []
    local = Assigned()
    for statement in function.body:
        match statement:
            case ast.Expr(ast.Constant(str())):
                pass
            case ast.Assign([ast.Name(name)], value):
                text = expression(value, path, stages, local)
                lines.append(f"const T {name} = {text};")
                local.values[name] = local.whole(value)
            case ast.Return(ast.Tuple(values)) if results and len(values) >= len(results):
                # Derivatives by operands beyond the second belong to the torch formula alone.
                for result, value in zip(results, values, strict=False):
                    lines.append(f"{result} = {expression(value, path, stages, local)};")
                    stages.note(result, local.whole(value), path)
            case ast.Return(ast.expr() as value) if not results:
                lines.append(f"return {expression(value, path, stages, local)};")
                stages.note(function.name, local.whole(value), path)
            case _:
                text = ast.unparse(statement).splitlines()[0]
                raise CannotPrint(f"{path}:{statement.lineno}: cannot print `{text}` as C++")
    if not isinstance(function.body[-1], ast.Return):
        raise CannotPrint(f"{path}:{function.lineno}: {function.name} does not end in a return")
    return lines


def struct(call: ast.Call, functions: dict[str, ast.FunctionDef], path: str) -> tuple[str, str]:
    """The name and the C++ struct of one `Pointwise(...)`."""

    def function(node: ast.expr) -> ast.FunctionDef:
        if isinstance(node, ast.Name) and node.id in functions:
            return functions[node.id]
        raise CannotPrint(
            f"{path}:{node.lineno}: `{ast.unparse(node)}` is not a function of this file"
        )

    named = dict(zip(("value", "grad", "domain"), call.args, strict=False))
    named |= {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg}
    if not {"value", "grad"} <= named.keys():
        raise CannotPrint(f"{path}:{call.lineno}: Pointwise needs a value and a grad")
    value, grad = function(named["value"]), function(named["grad"])
    domain = function(named["domain"]) if "domain" in named else None

    operands = [a.arg for a in value.args.args]
    params = [a.arg for a in value.args.kwonlyargs]
    if not 2 <= len(operands) <= INPUTS:
        raise CannotPrint(
            f"{path}:{value.lineno}: {value.name} takes {len(operands)} operands, not 2 or 3"
        )
    for other in filter(None, (grad, domain)):
        if [a.arg for a in other.args.args] != operands:
            raise CannotPrint(
                f"{path}:{other.lineno}: {other.name} and {value.name} take different operands"
            )
    arguments = ", ".join([f"T {o}" for o in operands] + ["T"] * (INPUTS - len(operands)))
    stage_arguments = "".join(f", T s{k}" for k in range(STAGES))
    stages = Stages()

    def method(kind: str, definition: ast.FunctionDef, outputs: list[str], extra: str) -> list[str]:
        extra += "".join(f", T& {o}" for o in outputs)
        lines = [f"    inline {kind}({arguments}{extra}) const {{"]
        lines += [f"        {line}" for line in body(definition, path, outputs, stages)]
        return [*lines, "    }"]

    domain_method = method("auto domain", domain, [], "") if domain else []
    if stages.calls:
        raise CannotPrint(f"{path}:{call.lineno}: a domain cannot use exp or log")
    value_method = method("T value", value, [], stage_arguments)
    grad_method = method("void grad", grad, ["d0", "d1"], stage_arguments)
    # Logarithms of x and 1 - x can be taken at once (math::logs_of_parts), if a domain keeps both positive.
    logs = [f"math::log({operands[0]})", f"math::log1p((-{operands[0]}))"]
    of_parts = domain is not None and stages.calls == logs
    needs = [stages.of_results[result] for result in (value.name, "d0", "d1")]

    lines = [
        f"template <class T>\nstruct {value.name} {{  // {path}:{value.lineno}",
        f"    static constexpr int operands = {len(operands)};",
        f"    static constexpr bool has_domain = {'true' if domain else 'false'};",
        f"    static constexpr int stages = {len(stages.calls)};",
        f"    static constexpr bool of_parts = {'true' if of_parts else 'false'};",
        f"    static constexpr int needs[] = {{{', '.join(map(str, needs))}}};  // as bits",
        *(f"    T {p};" for p in params),
        f"    explicit {value.name}([[maybe_unused]] const double* params) {{",
        *(f"        {p} = T(params[{i}]);" for i, p in enumerate(params)),
        "    }",
        "    template <int k>",
        f"    inline T stage({arguments}{stage_arguments}) const {{",
        *(f"        if constexpr (k == {k}) return {text};" for k, text in enumerate(stages.calls)),
        "        return T(0);",
        "    }",
        *value_method,
        *grad_method,
        *domain_method,
        "};",
    ]
    return value.name, "\n".join(lines)


def header(sources: dict[str, str]) -> str:
    """The C++ header with every formula of the sources (path to text)."""
    structs = []
    for path, text in sources.items():
        tree = ast.parse(text, path)
        functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
        for node in tree.body:
            match node:
                case ast.Assign(value=ast.Call(func=ast.Name("Pointwise")) as call):
                    structs.append(struct(call, functions, path))
    return "\n\n".join(
        [
            "// Printed by cpu/printer.py; edit the formulas instead.\n#pragma once\n#include <limits>\n\n"
            "#pragma GCC diagnostic push\n"
            '#pragma GCC diagnostic ignored "-Wunused-parameter"\n'
            '#pragma GCC diagnostic ignored "-Wunused-variable"\n'
            "namespace fusedloss::formulas {",
            *(text for _, text in structs),
            "}  // namespace fusedloss::formulas\n#pragma GCC diagnostic pop",
            "#define FUSEDLOSS_FORMULAS(X) " + " ".join(f"X({name})" for name, _ in structs) + "\n",
        ]
    )


def main(paths: list[str]) -> int:
    try:
        print(header({Path(path).name: Path(path).read_text() for path in paths}), end="")
    except CannotPrint as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
