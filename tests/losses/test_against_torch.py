"""Every loss of the registry against PyTorch's."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from conftest import (
    FLOATS,
    Case,
    Options,
    check,
    draw_incoming,
    each_dtype,
    formula_path,
    parameters,
    parameters_reduced,
    run,
)
from shapes import assert_kernel, shapes_of
from torch import Generator, Tensor

import fusedloss
from fusedloss.front.definition import REGISTRY

OLDER = torch.__version__ < "2.12"  # its mse_loss takes mixed types in forward alone

each_path = pytest.mark.parametrize("path", [nullcontext, formula_path], ids=["kernel", "formula"])


@each_path
@parameters_reduced()
def test_equals_torch_in_float64(
    case: Case, reduction: str, path: Callable[[], Any], generator: Generator
) -> None:
    wanted = case.loss.differentiable
    for shape in shapes_of(case):
        tensors, options = case.example(shape, torch.float64, generator)
        options["reduction"] = reduction
        theirs = run(case.theirs, tensors, options, wanted)
        incoming = draw_incoming(theirs.value, generator)
        theirs = run(case.theirs, tensors, options, wanted, incoming)
        with path():
            ours = run(case.function, tensors, options, wanted, incoming)
        for (name, a), (_, e) in zip(ours.named(), theirs.named(), strict=True):
            torch.testing.assert_close(
                a,
                e,
                rtol=1e-11,
                atol=1e-12,
                equal_nan=True,
                msg=lambda m: f"{shape} {name}: {m}",  # noqa: B023
            )


EXTENSIONS = [
    Case(loss._replace(options=loss.extensions), option)
    for loss in REGISTRY.values()
    for option in loss.extensions
]


@each_path
@each_dtype
@pytest.mark.parametrize("case", EXTENSIONS, ids=str)
def test_extensions(
    case: Case, dtype: torch.dtype, path: Callable[[], Any], generator: Generator
) -> None:
    """Options that PyTorch lacks, against their formula in float64 and its finite differences."""
    for shape in (*shapes_of(case), (3, 1030)):
        tensors, options = case.example(shape, dtype, generator)
        with path():
            for options["reduction"] in case.reductions:
                check(case, tensors, options, generator)
    assert_kernel(case, tensors, options)
    if dtype is torch.float64:
        tensors, options = case.example((2, 3), dtype, generator)
        inputs = tuple(t.requires_grad_() for t in tensors)
        with path():
            function = functools.partial(case.function, **options)
            assert torch.autograd.gradcheck(function, inputs)
            assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.one_in(2)
@each_dtype
@parameters_reduced()
def test_result_type_is_that_of_torch(
    case: Case, reduction: str, dtype: torch.dtype, generator: Generator
) -> None:
    wanted = case.loss.differentiable
    tensors, options = case.example((3, 4), dtype, generator)
    options["reduction"] = reduction
    ours = run(case.function, tensors, options, wanted)
    theirs = run(case.theirs, tensors, options, wanted)
    for (name, a), (_, e) in zip(ours.named(), theirs.named(), strict=True):
        assert (a.dtype, a.shape) == (e.dtype, e.shape), name


@pytest.mark.one_in(2)
@pytest.mark.parametrize("dtypes", list(itertools.permutations(FLOATS, 2)), ids=str)
@parameters(lambda case: case.loss.indices is None)
def test_mixed_types_are_those_of_torch(
    case: Case, dtypes: tuple[torch.dtype, torch.dtype], generator: Generator
) -> None:
    """One type for the first tensor, another for the rest: the same type of result or of error."""
    tensors, options = case.example((3, 4), dtypes[0], generator)
    tensors = (tensors[0], *(t.to(dtypes[1]) for t in tensors[1:]))
    wanted = case.loss.differentiable
    try:
        theirs = run(case.theirs, tensors, options, wanted)
    except RuntimeError as error:
        if OLDER and case.loss.name == "mse_loss":
            pytest.skip(str(error))
        with pytest.raises(type(error)):
            run(case.function, tensors, options, wanted)
        return
    ours = run(case.function, tensors, options, wanted)
    for (name, a), (_, e) in zip(ours.named(), theirs.named(), strict=True):
        assert a.dtype == e.dtype, name
        torch.testing.assert_close(a, e, rtol=2e-2, atol=2e-2, equal_nan=True)


@pytest.mark.filterwarnings("ignore:.*Using a target size")
@pytest.mark.parametrize("dtypes", list(itertools.permutations(FLOATS, 2)), ids=str)
@parameters(lambda case: case.loss.name in ("mse_loss", "kl_div") and case.option != "weight")
def test_scalar_target_is_typed_as_in_torch(
    case: Case, dtypes: tuple[torch.dtype, torch.dtype], generator: Generator
) -> None:
    (x, t), options = case.example((3, 4), dtypes[0], generator)
    tensors = x, t[0, 0].to(dtypes[1])
    ours = run(case.function, tensors, options, (0, 1))
    try:
        theirs = run(case.theirs, tensors, options, (0, 1))
    except RuntimeError as error:
        assert OLDER
        pytest.skip(str(error))
    for (name, a), (_, e) in zip(ours.named(), theirs.named(), strict=True):
        assert (a.dtype, a.shape) == (e.dtype, e.shape), name
        torch.testing.assert_close(a, e, rtol=2e-2, atol=2e-2)


@pytest.mark.filterwarnings("ignore:.*Using a target size")
@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("name, options", [("l1_loss", {}), ("smooth_l1_loss", {"beta": 0})])
def test_an_integer_beside_bytes_does_not_wrap_around(
    name: str, options: dict[str, Any], reduction: str
) -> None:
    """PyTorch broadcasts these first, so that one number keeps its type."""
    pair = torch.tensor([1, 2, 3], dtype=torch.uint8), torch.tensor(300)
    for tensors in (pair, pair[::-1]):
        ours = getattr(fusedloss, name)(*tensors, reduction=reduction, **options)
        theirs = getattr(torch.nn.functional, name)(*tensors, reduction=reduction, **options)
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shapes", [((3,), (3,)), ((), (3,)), ((3,), ())], ids=str)
def test_a_number_for_the_variance_of_integers_is_typed_as_in_torch(
    shapes: tuple[tuple[int, ...], tuple[int, ...]], dtype: torch.dtype
) -> None:
    input, target = torch.full(shapes[0], 3), torch.ones(shapes[1], dtype=dtype)
    for reduction in ("none", "mean"):
        ours = fusedloss.gaussian_nll_loss(input, target, 0.5, reduction=reduction)
        theirs = torch.nn.functional.gaussian_nll_loss(input, target, 0.5, reduction=reduction)
        torch.testing.assert_close(ours, theirs)


@parameters_reduced(lambda case: case.kind == "rows" and case.loss.indices is not None)
def test_one_row_with_its_index_in_a_vector(
    case: Case, reduction: str, generator: Generator
) -> None:
    (x, y), options = case.example((7,), torch.float64, generator)
    options["reduction"] = reduction
    ours = run(case.function, (x, y.reshape(1)), options, (0,))
    # PyTorch takes the vector as the scalar, and fails in its backward. Its mean of no row is 0 on a GPU.
    there = {k: v.cpu() if isinstance(v, Tensor) else v for k, v in options.items()}
    theirs = run(case.theirs, (x.cpu(), y.cpu()), there, (0,))
    for (_, a), (_, e) in zip(ours.named(), theirs.named(), strict=True):
        torch.testing.assert_close(a.cpu(), e, rtol=1e-11, atol=1e-12, equal_nan=True)


@each_dtype
@parameters()
def test_autocast_gives_float32(case: Case, dtype: torch.dtype, generator: Generator) -> None:
    tensors, options = case.example((3, 4), dtype, generator)
    with torch.autocast("cpu", torch.bfloat16):
        ours = run(case.function, tensors, options, case.loss.differentiable)
        try:
            theirs = run(case.theirs, tensors, options, case.loss.differentiable)
        except RuntimeError as error:
            assert "autocast" in str(error)  # PyTorch refuses BCE there
            return
    # PyTorch gives float32 too, but for its losses that are made of other operations.
    assert ours.value.dtype == torch.promote_types(dtype, torch.float32)
    for (name, a), (_, e) in zip(ours.named(), theirs.named(), strict=True):
        torch.testing.assert_close(a, e, rtol=2e-2, atol=2e-2, equal_nan=True, check_dtype=False)
        assert name == "value" or a.dtype == e.dtype, name


# Ties


@pytest.mark.parametrize("options", [{"p": float("inf")}, {"swap": True}], ids=str)
def test_ties_share_the_gradient(options: Options) -> None:
    """Of the largest coordinates, and of the two negative distances."""
    rows = ([0.0, 0.0, 0.0, 0.0], [2.0, 2.0, -2.0, 2.0], [1.0, 1.0, -1.0, 1.0])
    tensors = tuple(torch.tensor([row], dtype=torch.float64) for row in rows)
    options = {**options, "eps": 0.0, "margin": 3.0, "reduction": "sum"}
    ours = run(fusedloss.triplet_margin_loss, tensors, options, (0, 1, 2))
    theirs = run(torch.nn.functional.triplet_margin_loss, tensors, options, (0, 1, 2))
    for (_, a), (_, e) in zip(ours.named(), theirs.named(), strict=True):
        torch.testing.assert_close(a, e)


# Where probabilities are nearly certain


def test_binary_cross_entropy_towards_the_edges() -> None:
    small = 10.0 ** -torch.arange(1, 15, dtype=torch.float64)
    x = torch.cat((small, 1 - small, torch.tensor([0.0, 1.0], dtype=torch.float64)))
    for target in (0.0, 0.3, 1.0):
        tensors = (x, torch.full_like(x, target))
        options = {"reduction": "none"}
        ours = run(fusedloss.binary_cross_entropy, tensors, options, (0,))
        theirs = run(torch.nn.functional.binary_cross_entropy, tensors, options, (0,))
        for (_, a), (_, e) in zip(ours.named(), theirs.named(), strict=True):
            torch.testing.assert_close(a, e, rtol=1e-6, atol=1e-12)
