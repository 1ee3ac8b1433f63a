"""Every loss of the registry: its formula against PyTorch, its kernel against its formula."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from conftest import (
    CASES,
    FLOATS,
    GPU,
    HALVES,
    Case,
    Options,
    Outcome,
    Reference,
    Tensors,
    assert_exact,
    assert_same_bits,
    check,
    draw_incoming,
    each_dtype,
    formula_path,
    leaves,
    name_of,
    no_head,
    parameters,
    parameters_reduced,
    reference,
    run,
    same_bits,
)
from torch import Generator, Tensor

import fusedloss
from fusedloss.front.definition import REGISTRY

VECTOR = 16  # the widest: floats of AVX-512
BLOCK = 1024  # elements of a pointwise block, classes of a row block
LANES = 64  # positions side by side where classes are strided
THREADED = 70_000  # elements: twice the grain of any kernel

OLDER = torch.__version__ < "2.12"  # its mse_loss takes mixed types in forward alone

each_path = pytest.mark.parametrize("path", [nullcontext, formula_path], ids=["kernel", "formula"])


def around(*sizes: int) -> list[int]:
    return sorted({n + k for n in sizes for k in (-1, 0, 1)})


def shapes_of(case: Case) -> list[tuple[int, ...]]:
    """Small shapes of every number of dimensions that the loss takes."""
    shapes: list[tuple[int, ...]] = [(7,), (5, 7), (2, 5, 3), (2, 5, 3, 4), (0, 5)]
    if case.kind == "pointwise":
        shapes += [(), (0,), (3, 0, 2)]
    elif case.kind == "rows":
        shapes += [(0, 5, 3), (2, 5, 0), (1,), (1, 1)]
        shapes += [] if case.loss.indices is not None else [(3, 0)]
    elif case.kind == "heads":
        shapes += [(0, 5, 3), (1,), (1, 1)]
    return shapes


def assert_kernel(case: Case, tensors: Tensors, options: Options) -> None:
    route = fusedloss.explain(case.function, *tensors, **options)
    if GPU and not all(t.numel() for t in tensors):
        return  # nothing to launch
    assert (route.kernel is not None, route.device) == (True, "GPU" if GPU else "CPU"), str(route)


# Against PyTorch


@each_path
@parameters_reduced()
def test_equals_torch_in_float64(
    case: Case, reduction: str, path: Callable[[], Any], generator: Generator
) -> None:
    wanted = case.loss.differentiable
    for shape in shapes_of(case):
        tensors, options = case.example(shape, torch.float64, generator)
        options["reduction"] = reduction
        theirs = run(case.loss.torch_function, tensors, options, wanted)
        incoming = draw_incoming(theirs.value, generator)
        theirs = run(case.loss.torch_function, tensors, options, wanted, incoming)
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
    Case(dataclasses.replace(loss, options=loss.extensions), option)
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


@each_dtype
@parameters_reduced()
def test_result_type_is_that_of_torch(
    case: Case, reduction: str, dtype: torch.dtype, generator: Generator
) -> None:
    wanted = case.loss.differentiable
    tensors, options = case.example((3, 4), dtype, generator)
    options["reduction"] = reduction
    ours = run(case.function, tensors, options, wanted)
    theirs = run(case.loss.torch_function, tensors, options, wanted)
    for (name, a), (_, e) in zip(ours.named(), theirs.named(), strict=True):
        assert (a.dtype, a.shape) == (e.dtype, e.shape), name


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
        theirs = run(case.loss.torch_function, tensors, options, wanted)
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
        theirs = run(case.loss.torch_function, tensors, options, (0, 1))
    except RuntimeError as error:
        assert OLDER
        pytest.skip(str(error))
    for (name, a), (_, e) in zip(ours.named(), theirs.named(), strict=True):
        assert (a.dtype, a.shape) == (e.dtype, e.shape), name
        torch.testing.assert_close(a, e, rtol=2e-2, atol=2e-2)


@parameters_reduced(lambda case: case.kind == "rows" and case.loss.indices is not None)
def test_one_row_with_its_index_in_a_vector(
    case: Case, reduction: str, generator: Generator
) -> None:
    (x, y), options = case.example((7,), torch.float64, generator)
    options["reduction"] = reduction
    ours = run(case.function, (x, y.reshape(1)), options, (0,))
    # PyTorch takes the vector as the scalar, and fails in its backward. Its mean of no row is 0 on a GPU.
    there = {k: v.cpu() if isinstance(v, Tensor) else v for k, v in options.items()}
    theirs = run(case.loss.torch_function, (x.cpu(), y.cpu()), there, (0,))
    for (_, a), (_, e) in zip(ours.named(), theirs.named(), strict=True):
        torch.testing.assert_close(a.cpu(), e, rtol=1e-11, atol=1e-12, equal_nan=True)


@each_dtype
@parameters()
def test_autocast_gives_float32(case: Case, dtype: torch.dtype, generator: Generator) -> None:
    tensors, options = case.example((3, 4), dtype, generator)
    with torch.autocast("cpu", torch.bfloat16):
        ours = run(case.function, tensors, options, case.loss.differentiable)
        try:
            theirs = run(case.loss.torch_function, tensors, options, case.loss.differentiable)
        except RuntimeError as error:
            assert "autocast" in str(error)  # PyTorch refuses BCE there
            return
    # PyTorch gives float32 too, but for its losses that are made of other operations.
    assert ours.value.dtype == torch.promote_types(dtype, torch.float32)
    for (name, a), (_, e) in zip(ours.named(), theirs.named(), strict=True):
        torch.testing.assert_close(a, e, rtol=2e-2, atol=2e-2, equal_nan=True, check_dtype=False)
        assert name == "value" or a.dtype == e.dtype, name


# Kernel against formula


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
}


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


@parameters()
def test_sum_and_mean_are_those_of_none(case: Case, generator: Generator) -> None:
    tensors, options = case.example((40, 70), torch.float32, generator)
    losses = case.function(*tensors, **options, reduction="none").double()
    total = case.function(*tensors, **options, reduction="sum")
    torch.testing.assert_close(total.double(), losses.sum(), rtol=1e-6, atol=1e-5)


# What 'mean' divides by


def mapped(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def one(*tensors: Tensor, **options: Any) -> Tensor:
        batch = (t.unsqueeze(0) for t in tensors)
        return torch.vmap(lambda *each: function(*each, **options))(*batch)[0]

    return one


def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    torch._dynamo.reset()
    return torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=False)


DIVIDES: dict[str, tuple[Callable[[], Any], Callable[..., Any]]] = {
    "kernel": (nullcontext, lambda function: function),
    "formula": (formula_path, lambda function: function),
    "vmap": (nullcontext, mapped),
    "compiled": (nullcontext, compiled),
}


def divisor(case: Case, tensors: Tensors, options: Options, losses: Tensor) -> float:
    """Of the mean, from numbers that a computer rounds once."""
    weight = options.get("weight")
    target = options.get("target")
    if target is not None or case.loss.indices is not None:
        target = tensors[case.loss.indices] if target is None else target
        kept = target[target != options.get("ignore_index", -100)]
        return len(kept) if weight is None else math.fsum(weight[kept].tolist())
    if case.loss.name == "mse_loss" and weight is not None:
        return math.fsum(weight.flatten().tolist())
    return losses.numel()


DEFAULTS = (torch.float32, torch.float64, *HALVES)

# torch.compile's own, of any autograd function.
of_compile = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


@pytest.mark.parametrize("path", [name for name in DIVIDES if name != "compiled"])
@parameters(lambda case: "mean" in case.reductions)
def test_mean_is_the_sum_over_an_exact_divisor(case: Case, path: str, generator: Generator) -> None:
    for shape in (37, 7), (3, 5, 11), (6,):
        for weights in FLOATS:
            assert_divides(case, path, shape, weights, generator)


@of_compile
@parameters(lambda case: case.option in ("weight", "all") and "mean" in case.reductions)
def test_compiled_mean_is_the_sum_over_an_exact_divisor(case: Case, generator: Generator) -> None:
    assert_divides(case, "compiled", (37, 7), torch.float32, generator)


def assert_divides(
    case: Case, path: str, shape: tuple[int, ...], weights: torch.dtype, generator: Generator
) -> None:
    where, through = DIVIDES[path]
    tensors, options = case.example(shape, torch.float64, generator)
    if case.kind != "heads" and case.loss.indices is None:  # others have the input's type
        options = {k: _typed(v, weights) for k, v in options.items()}
    with where():
        function = through(case.function)
        losses = run(case.function, tensors, {**options, "reduction": "none"}).value
        total, mean = (
            run(function, tensors, {**options, "reduction": r}, case.loss.differentiable)
            for r in ("sum", "mean")
        )
    by = divisor(case, tensors, options, losses)
    for (name, a), (_, e) in zip(mean.named(), total.named(), strict=True):
        error = (a - e / by).abs().max() / (e / by).abs().max()
        assert not error > 1e-14, f"{shape} {weights} {name}: off by {error:.3g}"


def _typed(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) else value


@pytest.mark.parametrize("path", [name for name in DIVIDES if name != "compiled"])
@parameters_reduced()
def test_the_default_type_changes_no_bit(
    case: Case, reduction: str, path: str, generator: Generator
) -> None:
    where, through = DIVIDES[path]
    function = through(case.function)
    shapes = [(9, 7), (6,), ()] if case.kind == "pointwise" else [(9, 7), (6,)]
    for shape, dtype in itertools.product(shapes, FLOATS):
        tensors, options = case.example(shape, dtype, generator)
        options["reduction"] = reduction
        found = []
        for default in DEFAULTS:
            torch.set_default_dtype(default)
            try:
                with where():
                    found.append(run(function, tensors, options, case.loss.differentiable))
            finally:
                torch.set_default_dtype(torch.float32)
        for other in found[1:]:
            assert_same_bits(other, found[0])


@of_compile
@pytest.mark.parametrize("path", DIVIDES)
@pytest.mark.parametrize("loss", ["cross_entropy", "nll_loss", "mse_loss"])
def test_weights_whose_sum_passes_the_greatest_half(loss: str, path: str) -> None:
    where, through = DIVIDES[path]
    x = torch.linspace(-1, 1, 400).reshape(100, 4).half()
    if loss == "nll_loss":
        x = x.float().log_softmax(1).half()
    weight = torch.full_like(x if loss == "mse_loss" else x[0], 60000)
    target = x.flip(0) if loss == "mse_loss" else torch.arange(100) % 4
    function = REGISTRY[loss].function
    with where():
        found = run(through(function), (x, target), {"weight": weight}, (0,))
    wide = x.double(), target.double() if loss == "mse_loss" else target
    exact = run(function, wide, {}, (0,))
    for (_, a), (_, e) in zip(found.named(), exact.named(), strict=True):
        torch.testing.assert_close(a.double(), e, rtol=1e-3, atol=1e-7)


# Derivatives


@each_path
@parameters_reduced()
def test_finite_differences(
    case: Case, reduction: str, path: Callable[[], Any], generator: Generator
) -> None:
    function, inputs = differentiable(case, reduction, generator)
    with path():
        assert torch.autograd.gradcheck(
            function, inputs, check_forward_ad=True, check_batched_grad=True, fast_mode=True
        )


@each_path
@parameters_reduced()
def test_finite_differences_of_the_gradient(
    case: Case, reduction: str, path: Callable[[], Any], generator: Generator
) -> None:
    function, inputs = differentiable(case, reduction, generator)
    with path():
        assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


def differentiable(
    case: Case, reduction: str, generator: Generator
) -> tuple[Callable[..., Tensor], Tensors]:
    tensors, options = case.example((5, 4), torch.float64, generator)
    inputs = leaves(tensors, case.loss.differentiable)[: len(case.loss.differentiable)]
    rest = tensors[len(inputs) :]
    return lambda *x: case.function(*x, *rest, **options, reduction=reduction), inputs


# NaN and infinities


@pytest.mark.parametrize("special", [float("nan"), float("inf"), -float("inf")], ids=str)
@parameters_reduced()
def test_specials_go_where_the_formula_lets_them(
    case: Case, reduction: str, special: float, generator: Generator
) -> None:
    for shape in [(3, 37), (2, 5, LANES + 2)] if case.kind == "rows" else [(3, 37)]:
        clean, options = case.example(shape, torch.float32, generator)
        options["reduction"] = reduction
        for k in case.loss.differentiable:
            if case.loss.variant == "probabilities" and k == len(clean) - 1 and special == special:
                continue  # no probability is infinite
            for position in (0, clean[k].numel() // 2, clean[k].numel() - 1):
                tensors = tuple(t.clone() for t in clean)
                tensors[k].view(-1)[position] = special
                compare_paths(case, tensors, options, f"argument {k}[{position}] of {shape}")


def compare_paths(case: Case, tensors: Tensors, options: Options, where: str) -> None:
    wanted = case.loss.differentiable
    if case.loss.name == "binary_cross_entropy":  # it takes nothing beyond [0, 1]
        for path in (nullcontext, formula_path):
            with path(), pytest.raises(RuntimeError, match="between 0 and 1"):
                run(case.function, tensors, options)
        return
    kernel = run(case.function, tensors, options, wanted)
    with formula_path():
        formula = run(case.function, tensors, options, wanted)
    infinite = any(t.isinf().any() for t in tensors if t.is_floating_point())
    for (name, a), (_, e) in zip(kernel.named(), formula.named(), strict=True):
        if case.kind == "heads" and name != "value" and infinite:
            continue  # 0 * inf in products of more or fewer rows
        if case.kind == "triplet" and name != "value":
            # Where a branch is not taken the kernel has 0, the formula 0 * inf.
            a = torch.where(e.isfinite() & kernel.value.isfinite().all(), a, e)
        close = torch.isclose(a, e, rtol=1e-4, atol=1e-4, equal_nan=True)
        assert close.all(), f"{where}: {name} is {a[~close]}, not {e[~close]}"


@pytest.mark.parametrize("loss", ["cross_entropy", "nll_loss"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("classes", [3, 20, 300])
def test_what_an_ignored_row_holds_does_not_count(
    loss: str,
    dtype: torch.dtype,
    memory_format: torch.memory_format,
    classes: int,
    generator: Generator,
) -> None:
    row = REGISTRY[loss]
    x = torch.rand(2, classes, 5, 7, generator=generator).to(dtype)
    target = torch.randint(classes, (2, 5, 7), generator=generator)
    ignored = torch.rand(2, 5, 7, generator=generator) < 0.3
    x.masked_fill_(ignored[:, None], float("nan"))
    target[ignored] = -1
    whole = x.to(memory_format=memory_format).requires_grad_()
    row.function(whole, target, ignore_index=-1).backward()
    kept = x.detach().movedim(1, -1)[~ignored].requires_grad_()
    row.function(kept, target[~ignored]).backward()
    assert whole.grad is not None and kept.grad is not None
    grad = whole.grad.movedim(1, -1)
    assert (grad[ignored] == 0).all()
    torch.testing.assert_close(grad[~ignored], kept.grad)


@pytest.mark.parametrize("special", [float("nan"), float("inf")], ids=str)
@parameters(lambda case: case.loss.name != "binary_cross_entropy")
def test_specials_stay_in_their_row(case: Case, special: float, generator: Generator) -> None:
    tensors, options = case.example((70, 5), torch.float32, generator)
    options["reduction"] = "none"
    wanted = case.of_rows
    clean = run(case.function, tensors, options, wanted)
    for k in wanted:
        for row in (0, 33, 69):
            planted = tuple(t.clone() for t in tensors)
            planted[k][row] = special
            dirty = run(case.function, planted, options, wanted)
            for (name, a), (_, e) in zip(dirty.named(), clean.named(), strict=True):
                others = torch.arange(70, device=a.device) != row
                assert same_bits(a[others], e[others]), f"{name}: row {row} reached another"


# The same bits


# Matrix products may be other ones where there are more threads or rows.
@pytest.mark.parametrize("reduction", ["none", "mean"])
@parameters(no_head)
def test_threads_do_not_change_a_bit(case: Case, reduction: str, generator: Generator) -> None:
    shapes = [(37, THREADED // 37)]
    if case.kind == "rows":
        shapes.append((2, 7, THREADED // 14))
    for shape in shapes:
        tensors, options = case.example(shape, torch.float32, generator)
        options["reduction"] = reduction
        one = run(case.function, tensors, options, case.loss.differentiable)
        torch.set_num_threads(2)
        try:
            two = run(case.function, tensors, options, case.loss.differentiable)
        finally:
            torch.set_num_threads(1)
        assert_same_bits(two, one)
        again = run(case.function, tensors, options, case.loss.differentiable)
        assert_same_bits(again, one)


@each_dtype
@parameters(no_head)
def test_a_row_does_not_depend_on_its_batch(
    case: Case, dtype: torch.dtype, generator: Generator
) -> None:
    shapes = [(67, 13), (67, 1030)]
    if case.kind == "rows":
        shapes.append((67, 5, 3))
    for shape in shapes:
        tensors, settings = case.example(shape, dtype, generator)
        whole = rows_of(case, tensors, settings, slice(None))
        for rows in (slice(0, 1), slice(33, 34), slice(66, 67), slice(5, 44), slice(1, None, 3)):
            part = rows_of(case, tensors, settings, rows)
            assert_same_bits(part, Outcome(whole.value[rows], tuple(g[rows] for g in whole.grads)))


def rows_of(case: Case, tensors: Tensors, settings: Options, rows: slice) -> Outcome:
    options = {
        k: v[rows] if isinstance(v, Tensor) and v.shape == tensors[0].shape else v
        for k, v in settings.items()
    }
    options["reduction"] = "none"
    return run(case.function, tuple(t[rows] for t in tensors), options, case.loss.differentiable)


@pytest.mark.parametrize("factor", [1.0, -2.5])
@parameters_reduced()
def test_second_backward(case: Case, reduction: str, factor: float, generator: Generator) -> None:
    """It gives the same bits, whatever was done to the gradients of the first."""
    tensors, options = case.example((5, 7), torch.float32, generator)
    inputs = leaves(tensors, case.loss.differentiable)
    moving = inputs[: len(case.loss.differentiable)]
    value = case.function(*inputs, **options, reduction=reduction)
    incoming = torch.full_like(value, factor)
    first = torch.autograd.grad(value, moving, incoming, retain_graph=True)
    kept = [g.clone() for g in first]
    for retain in (True, False):
        for grad in first:
            grad.fill_(float("nan"))
        first = torch.autograd.grad(value, moving, incoming, retain_graph=retain)
        assert all(map(same_bits, first, kept))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(value, moving, incoming)


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


@pytest.mark.parametrize("dtype", HALVES, ids=name_of)
def test_ties_round_to_even(dtype: torch.dtype) -> None:
    """Odd squares end in 001, three times them in 011: ties of the first go down, of the second up."""
    x = torch.arange(256).to(dtype)
    for factor in (1, 3):
        weight = torch.full_like(x, factor)
        found = fusedloss.mse_loss(x, torch.zeros_like(x), reduction="none", weight=weight)
        assert same_bits(found, (factor * x.float().square()).to(dtype))
        sums = [
            fusedloss.mse_loss(v, torch.zeros_like(v), reduction="sum", weight=w)
            for v, w in zip(x, weight, strict=True)
        ]
        assert same_bits(torch.stack(sums), found)


@pytest.mark.parametrize("step", [1, 2], ids=["dense", "strided"])
@pytest.mark.parametrize("dtype", HALVES, ids=name_of)
def test_every_half_is_read_and_rounded_as_torch_does(dtype: torch.dtype, step: int) -> None:
    """Subnormals, infinities and NaNs among them."""
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    x = every.repeat_interleave(step)[::step]
    for factor in (1.0, 1e-3, 3e4):
        weight = torch.full((2**16,), factor)
        found = fusedloss.mse_loss(
            x, torch.zeros_like(x), reduction="none", weight=weight.to(dtype)
        )
        want = x.float().square() * weight.to(dtype).float()
        assert same_bits(found, want.to(dtype))
