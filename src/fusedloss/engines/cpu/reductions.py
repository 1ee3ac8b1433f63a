"""Prints the losses of rows as C++: `python reductions.py LOSSES... > reductions.h`.

As `printer.py`, whose language it shares. It finds the module-level calls `Reduction(name, loss, measure,
projection)`, where the measure is a call of `Sums` or of `Distances`.
"""

from __future__ import annotations

import ast
import sys
from dataclasses import dataclass
from pathlib import Path

try:
    from . import printer
except ImportError:  # at build time there is no package
    import printer  # type: ignore[no-redef]

OPERANDS, MEASURES, NUMBERS = 3, 3, 4  # as csrc/reduction.h


class Inline(printer.Stages):
    """The loop over a row has no stages: each call stays where it is."""

    def call(self, function: str, argument: str) -> str:
        return f"math::{function}({argument})"


def names(function: ast.FunctionDef) -> list[str]:
    return [a.arg for a in function.args.args]


def numbers(function: ast.FunctionDef) -> list[str]:
    return [a.arg for a in function.args.kwonlyargs]


def returned(function: ast.FunctionDef) -> int:
    """How many values a function returns."""
    match function.body[-1]:
        case ast.Return(ast.Tuple(values)):
            return len(values)
    return 1


@dataclass
class Source:
    """A file with its functions, and what its names are assigned."""

    path: str
    functions: dict[str, ast.FunctionDef]
    values: dict[str, ast.expr]

    def refuse(self, node: ast.AST, words: str) -> Exception:
        return printer.CannotPrint(f"{self.path}:{getattr(node, 'lineno', 0)}: {words}")

    def function(self, node: ast.expr) -> ast.FunctionDef:
        if isinstance(node, ast.Name) and node.id in self.functions:
            return self.functions[node.id]
        raise self.refuse(node, f"`{ast.unparse(node)}` is not a function of this file")

    def call(self, node: ast.expr, *of: str) -> tuple[str, list[ast.expr]]:
        """The name and the arguments of a call, or of what a name was assigned."""
        found = self.values.get(node.id, node) if isinstance(node, ast.Name) else node
        match found:
            case ast.Call(ast.Name(name), args, keywords) if name in of:
                return name, [*args, *(k.value for k in keywords)]
        raise self.refuse(node, f"`{ast.unparse(node)}` is no {' or '.join(of)} of this file")

    def method(
        self, kind: str, function: ast.FunctionDef, given: list[str], results: list[str]
    ) -> list[str]:
        arguments = ", ".join([f"T {a}" for a in given] + [f"T& {r}" for r in results])
        if results and returned(function) != len(results):
            words = f"{function.name} returns {returned(function)} values, not {len(results)}"
            raise self.refuse(function, words)
        if len(results) == 1 and not isinstance(function.body[-1].value, ast.Tuple):  # type: ignore[attr-defined]
            raise self.refuse(function, f"{function.name} returns no tuple")
        formula = printer.Formula(self.path, names(function), numbers(function))
        formula.stages = Inline()
        result = printer.DERIVATIVES if results else printer.VALUE
        lines, _ = formula.body(function, result, results[0].rstrip("0") if results else "")
        return [
            f"    inline {kind}({arguments}) const {{",
            *(f"        {line}" for line in lines),
            "    }",
        ]


@dataclass
class Measure:
    operands: int
    count: int
    params: list[str]
    methods: list[str]


def sums(source: Source, map: ast.FunctionDef, slope: ast.FunctionDef) -> Measure:
    operands = names(map)
    by = names(slope)[len(operands) :]
    if names(slope)[: len(operands)] != operands or numbers(slope) != numbers(map):
        words = f"{slope.name} takes other operands or numbers than {map.name}"
        raise source.refuse(slope, words)
    terms = [f"term{k}" for k in range(len(by))]
    slopes = [f"d{k}" for k in range(len(operands))]
    methods = source.method("void map", map, operands, terms)
    methods += source.method("void slope", slope, operands + by, slopes)
    return Measure(len(operands), len(by), numbers(map), methods)


def measure(source: Source, node: ast.expr) -> Measure:
    kind, given = source.call(node, "Sums", "Distances")
    if kind == "Sums" and len(given) == 2:
        return sums(source, source.function(given[0]), source.function(given[1]))
    match given:
        case [ast.Tuple(operands), ast.Constant(int() as count)] if kind == "Distances":
            if len(operands) == (2 if count == 1 else 3):
                return Measure(len(operands), count, ["p", "eps"], [])
    raise source.refuse(node, f"cannot print `{ast.unparse(node)}` as C++")


def struct(source: Source, call: ast.Call) -> tuple[str, str]:
    """The name and the C++ struct of one `Reduction(...)`."""
    given = [*call.args, *(k.value for k in call.keywords)]
    match given:
        case [ast.Constant(str() as name), _, measured, projection]:
            found = measure(source, measured)
        case _:
            words = "Reduction takes a name, a loss, a measure and a projection"
            raise source.refuse(call, words)
    _, functions = source.call(projection, "Pointwise")
    value, grad = (source.function(node) for node in functions[:2])
    labels = len(names(value)) - found.count
    params = list(dict.fromkeys([*found.params, *numbers(value)]))
    for most, count, words in (
        (OPERANDS, found.operands + max(labels, 0), "tensors"),
        (MEASURES, found.count, "measures"),
        (NUMBERS, len(params), "numbers"),
    ):
        if not count <= most:
            raise source.refuse(call, f"{name} has {count} {words}, more than {most}")
    if labels not in (0, 1):
        words = (
            f"{value.name} takes {len(names(value))} operands, not {found.count} and maybe a label"
        )
        raise source.refuse(value, words)
    if names(grad) != names(value):
        raise source.refuse(grad, f"{grad.name} and {value.name} take different operands")
    slopes = [f"d{k}" for k in range(found.count)]
    lines = [
        f"struct {name} {{",
        "    using T = double;",
        f"    static constexpr int operands = {found.operands}, measures = {found.count};",
        f"    static constexpr bool label = {str(labels == 1).lower()};",
        f"    static constexpr bool distances = {str(not found.methods).lower()};",
        *(f"    T {p};" for p in params),
        f"    explicit {name}([[maybe_unused]] const double* numbers) {{",
        *(f"        {p} = numbers[{k}];" for k, p in enumerate(params)),
        "    }",
        *found.methods,
        *source.method("T value", value, names(value), []),
        *source.method("void grad", grad, names(grad), slopes),
        "};",
    ]
    return name, "\n".join(lines)


def header(sources: dict[str, str]) -> str:
    """The C++ header with every loss of rows of the sources (path to text)."""
    structs = []
    for path, text in sources.items():
        body = ast.parse(text, path).body
        functions = {node.name: node for node in body if isinstance(node, ast.FunctionDef)}
        values = {
            node.targets[0].id: node.value
            for node in body
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
        }
        source = Source(path, functions, values)
        for value in values.values():
            match value:
                case ast.Call(func=ast.Name("Reduction")):
                    structs.append(struct(source, value))
    return "\n\n".join(
        [
            "// Printed by cpu/reductions.py; edit the formulas instead.\n#pragma once\n#include <limits>\n\n"
            '#include "math.h"\n\n'
            "#pragma GCC diagnostic push\n"
            '#pragma GCC diagnostic ignored "-Wunused-parameter"\n'
            '#pragma GCC diagnostic ignored "-Wunused-variable"\n'
            "namespace fusedloss::reductions {",
            *(text for _, text in structs),
            "}  // namespace fusedloss::reductions\n#pragma GCC diagnostic pop",
            "#define FUSEDLOSS_REDUCTIONS(X) "
            + " ".join(f"X({name})" for name, _ in structs)
            + "\n",
        ]
    )


def main(paths: list[str]) -> int:
    try:
        print(header({Path(path).name: Path(path).read_text() for path in paths}), end="")
    except printer.CannotPrint as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
