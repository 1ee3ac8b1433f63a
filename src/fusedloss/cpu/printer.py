"""Prints the formulas of pointwise losses as C++: `python printer.py LOSSES... > formulas.h`.

Runs at build time on the source text alone, so it needs neither torch nor the package. It finds the
module-level calls `Pointwise(value, grad[, domain=...])` and prints the functions that they name: names,
numbers, arithmetic, comparisons, `&`, `|`, and calls of the namespace `m`, whose C++ side is math.h.
"""

from __future__ import annotations

import ast
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
FUNCTIONS = {
    "abs",
    "exp",
    "log",
    "log1p",
    "log_or_zero",
    "log_sigmoid",
    "maximum",
    "sigmoid",
    "where",
}
INPUTS = 3


class CannotPrint(Exception):
    """A formula uses something that has no C++ counterpart here."""


def expression(node: ast.expr, path: str) -> str:
    match node:
        case ast.Name(name):
            return name
        case ast.Constant(bool()):
            pass
        case ast.Constant(float() | int() as value):
            return f"T({value!r})"
        case ast.BinOp(left, op, right) if type(op) in OPERATORS:
            return f"({expression(left, path)} {OPERATORS[type(op)]} {expression(right, path)})"
        case ast.UnaryOp(ast.USub(), operand):
            return f"(-{expression(operand, path)})"
        case ast.Compare(left, [op], [right]) if type(op) in OPERATORS:
            return f"({expression(left, path)} {OPERATORS[type(op)]} {expression(right, path)})"
        case ast.Attribute(ast.Name("m"), "inf"):
            return "std::numeric_limits<T>::infinity()"
        case ast.Call(ast.Attribute(ast.Name("m"), name), args, []) if name in FUNCTIONS:
            return f"math::{name}({', '.join(expression(arg, path) for arg in args)})"
    raise CannotPrint(f"{path}:{node.lineno}: cannot print `{ast.unparse(node)}` as C++")


def body(function: ast.FunctionDef, path: str, results: list[str]) -> list[str]:
    """The statements of a function; what it returns goes to `results`, or is returned if they are empty."""
    lines = []
    for statement in function.body:
        match statement:
            case ast.Expr(ast.Constant(str())):
                pass
            case ast.Assign([ast.Name(name)], value):
                lines.append(f"const T {name} = {expression(value, path)};")
            case ast.Return(ast.Tuple(values)) if results and len(values) >= len(results):
                # Derivatives by operands beyond the second belong to the torch formula alone.
                lines += [
                    f"{result} = {expression(value, path)};"
                    for result, value in zip(results, values, strict=False)
                ]
            case ast.Return(ast.expr() as value) if not results:
                lines.append(f"return {expression(value, path)};")
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

    def method(kind: str, definition: ast.FunctionDef, outputs: list[str]) -> list[str]:
        extra = "".join(f", T& {o}" for o in outputs)
        lines = [f"    inline {kind}({arguments}{extra}) const {{"]
        lines += [f"        {line}" for line in body(definition, path, outputs)]
        return [*lines, "    }"]

    lines = [
        f"template <class T>\nstruct {value.name} {{  // {path}:{value.lineno}",
        f"    static constexpr int operands = {len(operands)};",
        f"    static constexpr bool has_domain = {'true' if domain else 'false'};",
        *(f"    T {p};" for p in params),
        f"    explicit {value.name}([[maybe_unused]] const double* params) {{",
        *(f"        {p} = T(params[{i}]);" for i, p in enumerate(params)),
        "    }",
        *method("T value", value, []),
        *method("void grad", grad, ["d0", "d1"]),
        *(method("bool domain", domain, []) if domain else []),
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
            "namespace fusedloss::formulas {",
            *(text for _, text in structs),
            "}  // namespace fusedloss::formulas",
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
