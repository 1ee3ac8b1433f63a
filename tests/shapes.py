"""Shapes for every loss of the registry."""

from __future__ import annotations

from conftest import (
    GPU,
    Case,
    Options,
    Tensors,
)

import fusedloss


def shapes_of(case: Case) -> list[tuple[int, ...]]:
    """Small shapes of every number of dimensions that the loss takes."""
    if case.kind == "sequences":
        return [(7,), (5, 7), (2, 5, 3), (2, 5, 13), (1, 1)]
    shapes: list[tuple[int, ...]] = [(7,), (5, 7), (2, 5, 3), (2, 5, 3, 4), (0, 5)]
    if case.kind == "pointwise":
        shapes += [(), (0,), (3, 0, 2)]
    elif case.kind == "rows":
        shapes += [(0, 5, 3), (2, 5, 0), (1,), (1, 1)]
        shapes += [] if case.loss.indices is not None else [(3, 0)]
    elif case.kind == "heads":
        shapes += [(0, 5, 3), (1,), (1, 1)]
    return list(filter(case.takes, shapes))


def assert_kernel(case: Case, tensors: Tensors, options: Options) -> None:
    route = fusedloss.explain(case.function, *tensors, **options)
    if GPU and not all(t.numel() for t in tensors):
        return  # nothing to launch
    assert (route.kernel is not None, route.device) == (True, "GPU" if GPU else "CPU"), str(route)
