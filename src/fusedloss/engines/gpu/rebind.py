"""A formula as a Triton function: the same source, its `m` the namespace of `gpu/m.py`."""

from __future__ import annotations

import ast
import functools
import inspect
import linecache
import textwrap
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl

from ...kinds.formula import Pointwise
from ...kinds.names import NUMBERS, OPERANDS
from . import m


class Rebound(NamedTuple):
    value: Any
    grad: Any
    domain: Any | None


@functools.cache
def rebound(formula: Pointwise) -> Rebound:
    domain = formula.domain and _triton(formula.domain, formula)
    return Rebound(_triton(formula.value, formula), _triton(formula.grad, formula), domain)


def _triton(function: Callable[..., Any], formula: Pointwise) -> Any:
    # The kernel hands as many to every formula, used or not.
    names = [
        *formula.operands,
        *(f"_operand{k}" for k in range(len(formula.operands), OPERANDS)),
        *formula.params,
        *(f"_number{k}" for k in range(len(formula.params), NUMBERS)),
    ]
    return as_triton(function, names)


def as_triton(function: Callable[..., Any], names: Sequence[str]) -> Any:
    """The function with positional parameters of these names."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    tree = _Typed(names[0]).visit(tree)
    (definition,) = tree.body
    assert isinstance(definition, ast.FunctionDef)
    definition.args = ast.arguments([], [ast.arg(name) for name in names], None, [], [], None, [])
    if ast.get_docstring(definition):
        del definition.body[0]
    source = ast.unparse(ast.fix_missing_locations(tree)) + "\n"
    # Triton reads the source of what it compiles.
    path = f"<{function.__module__}.{function.__name__} for Triton>"
    linecache.cache[path] = (len(source), None, source.splitlines(True), path)
    scope: dict[str, Any] = {"m": m, "tl": tl, "__name__": function.__module__}
    exec(compile(source, path, "exec"), scope)
    return triton.jit(scope[function.__name__])


class _Typed(ast.NodeTransformer):
    """Gives the numbers of a `where` of two the type of an operand: Triton makes them float32."""

    def __init__(self, operand: str) -> None:
        self.operand = operand

    def visit_Call(self, node: ast.Call) -> ast.expr:
        self.generic_visit(node)
        number = ast.Attribute(ast.Name("m", ast.Load()), "number", ast.Load())
        operand = ast.Name(self.operand, ast.Load())
        match node:
            case ast.Call(ast.Attribute(ast.Name("m"), "where"), [condition, a, b]) if not any(
                isinstance(each, ast.Name | ast.Call) and getattr(each, "id", "") != "m"
                for branch in (a, b)
                for each in ast.walk(branch)
            ):
                typed = (ast.Call(number, [each, operand], []) for each in (a, b))
                return ast.Call(node.func, [condition, *typed], [])
        return node
