"""Each kernel against its formula: types, sizes, layouts, incoming gradients."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
from conftest import (
    CASES,
    Case,
    Outcome,
    Reference,
    assert_exact,
    check,
    draw_incoming,
    each_dtype,
    formula_path,
    parameters,
    parameters_reduced,
    reference,
    run,
)
from shapes import assert_kernel
from torch import Generator, Tensor

VECTOR = 16  # the widest: floats of AVX-512
BLOCK = 1024  # elements of a pointwise block, classes of a row block
LANES = 64  # positions side by side where classes are strided


def around(*sizes: int) -> list[int]:
    return sorted({n + k for n in sizes for k in (-1, 0, 1)})


@pytest.mark.one_in(2)
@each_dtype
@parameters_reduced()
def test_formula_in_every_type(
    case: Case, reduction: str, dtype: torch.dtype, generator: Generator
) -> None:
    tensors, options = case.example((5, 70), dtype, generator)
    options["reduction"] = reduction
    with formula_path():
        check(case, tensors, options, generator, roundings=64)


def sizes_of(case: Case) -> Iterator[tuple[int, ...]]:
    """Sizes around the boundaries of the loops."""
    if case.kind == "pointwise":
        for n in (0, 1, *around(8, VECTOR, LANES, BLOCK), 2500):
            yield (n,)
        yield (3, 700)
        return
    if case.kind == "sequences":
        yield from ((2,), (5,), (1, 1), (1, 5), (13, 70), (700, 5), (3, 2500))
        for frames in (1, 6, 31, 32, 33, 200):  # mantissas are scaled in frame 32
            yield (3, 5, frames)
        return
    if case.kind == "heads":
        yield from ((5,), (0, 5), (1, 5), (13, 1), (13, 70), (2, 3, 5))
        return
    for c in (1, 2, *around(LANES, BLOCK), 2500):
        yield (3, c)
    for n in (0, 1, *around(8, VECTOR), 700):
        yield (n, 5)
    if case.kind == "rows":
        yield (5,)
        for d in (0, 1, *around(LANES)):
            yield (2, 5, d)
        yield (2, LANES + 6, LANES + 1)
        yield (3, 5, 700)
        yield (2, 3, 5, 30)


SIZES = [(case, shape) for case in CASES for shape in sizes_of(case)]


@pytest.mark.one_in(12)
@each_dtype
@pytest.mark.parametrize(
    ("case", "shape"), SIZES, ids=[f"{case}-{'x'.join(map(str, shape))}" for case, shape in SIZES]
)
def test_kernel_at_each_size(
    case: Case, shape: tuple[int, ...], dtype: torch.dtype, generator: Generator
) -> None:
    tensors, options = case.example(shape, dtype, generator)
    assert_kernel(case, tensors, options)
    for options["reduction"] in ("none", "mean"):
        check(case, tensors, options, generator)


def filler(tensor: Tensor, *shape: int) -> Tensor:
    """What no kernel may read: NaN, or an index that is out of range."""
    return tensor.new_full(shape, float("nan") if tensor.is_floating_point() else -12345)


def transposed(tensor: Tensor) -> Tensor:
    backwards = tuple(reversed(range(tensor.dim())))
    return tensor.permute(backwards).contiguous().permute(backwards)


def stepped(tensor: Tensor) -> Tensor:
    if not tensor.dim():
        return tensor
    return torch.stack([tensor, filler(tensor, *tensor.shape)], -1).flatten(-2)[..., ::2]


def cropped(tensor: Tensor) -> Tensor:
    """Rows with a gap between them, from an odd offset on."""
    if not tensor.dim():
        return tensor
    return torch.nn.functional.pad(tensor, (3, 2), value=filler(tensor).item())[..., 3:-2]


def offset(tensor: Tensor) -> Tensor:
    return torch.cat([filler(tensor, 3), tensor.flatten()])[3:].view(tensor.shape)


def expanded(tensor: Tensor) -> Tensor:
    return tensor[:1].expand_as(tensor) if tensor.dim() else tensor


def expanded_last(tensor: Tensor) -> Tensor:
    return tensor[..., :1].expand_as(tensor) if tensor.dim() else tensor


def overlapping(tensor: Tensor) -> Tensor:
    return tensor.as_strided(tensor.shape, (1,) * tensor.dim())


def channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor


LAYOUTS = (
    transposed,
    stepped,
    cropped,
    offset,
    expanded,
    expanded_last,
    overlapping,
    channels_last,
)


LAID_OUT: dict[str, list[tuple[int, ...]]] = {
    "pointwise": [(2, 5, 6, 12)],
    "rows": [(9, 70), (2, 5, 6, 12)],
    "triplet": [(9, 70), (2, 5, 6, 12)],
    "heads": [(9, 70)],
    "sequences": [(9, 70), (2, 5, 13)],
    "pair": [(9, 70)],
    "margins": [(9, 70)],
    "multilabel": [(9, 70), (2, 5, 6, 12)],
}
# Not of lengths and the labels that they count.
OTHER_VALUES = (expanded, expanded_last, overlapping)


@pytest.mark.one_in(8)
@each_dtype
@pytest.mark.parametrize("layout", LAYOUTS)
@parameters()
def test_kernel_at_each_layout(
    case: Case, layout: Callable[[Tensor], Tensor], dtype: torch.dtype, generator: Generator
) -> None:
    for shape in LAID_OUT[case.kind]:
        example, settings = case.example(shape, dtype, generator)
        options = {k: layout(v) if isinstance(v, Tensor) else v for k, v in settings.items()}
        every = tuple(map(layout, example))
        if case.kind == "sequences" and layout in OTHER_VALUES:
            every = (every[0], *example[1:])
        options["reduction"] = "mean"
        assert_kernel(case, every, options)
        check(case, every, options, generator)
        options["reduction"] = "none"
        for tensors in (every, (every[0], *example[1:])):
            incoming = draw_incoming(run(case.function, tensors, options).value, generator)
            check(case, tensors, options, generator, layout(incoming))


@parameters(lambda case: case.kind == "pointwise")
def test_more_dimensions_than_a_loop_has(case: Case, generator: Generator) -> None:
    """Strides in opposite orders, so that no two dimensions become one."""
    dimensions = tuple(reversed(range(18)))
    (x, *rest), options = case.example((2,) * 18, torch.float32, generator)
    tensors = (x, *(t.permute(dimensions) for t in rest))
    copies = tuple(t.contiguous() for t in tensors)
    found = run(case.function, tensors, options, case.loss.differentiable)
    expected = run(case.function, copies, options, case.loss.differentiable)
    torch.testing.assert_close(found, expected)


@pytest.mark.one_in(2)
@each_dtype
@parameters_reduced()
def test_any_incoming_gradient(
    case: Case, reduction: str, dtype: torch.dtype, generator: Generator
) -> None:
    """Also one that a scaler made large: it must reach gradients that are small without it."""
    tensors, options = case.example((300, 5), dtype, generator)
    options["reduction"] = reduction
    value = run(case.function, tensors, options).value
    for factor in (0.0, -2.5, 2.0**12):
        incoming = torch.full_like(value, factor)
        check(case, tensors, options, generator, incoming)


@parameters_reduced()
def test_any_subset_of_gradients(case: Case, reduction: str, generator: Generator) -> None:
    tensors, options = case.example((5, 70), torch.float32, generator)
    options["reduction"] = reduction
    every = case.loss.differentiable
    value = run(case.function, tensors, options).value
    incoming = draw_incoming(value, generator)
    expected = reference(case, tensors, options, every, incoming, generator)
    for n in range(len(every)):
        for wanted in itertools.combinations(every, n):
            actual = run(case.function, tensors, options, wanted, incoming)
            some = reference_of(expected, wanted)
            assert_exact(actual, some)
            assert actual.value.requires_grad is False


def reference_of(whole: Reference, wanted: tuple[int, ...]) -> Reference:
    return Reference(*(Outcome(o.value, tuple(o.grads[k] for k in wanted)) for o in whole))
