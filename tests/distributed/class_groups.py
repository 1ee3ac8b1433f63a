"""Losses of plain shards of classes on several processes, against those of one of all classes."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed.tensor
from problems import Distillation, without_kernels
from torch import Generator, Tensor

import fusedloss
from distributed.class_cases import (
    HEAD,
    LOOSE,
    OF_HEADS,
    SIZES,
    TIGHT,
    C,
    Case,
    D,
    N,
    Own,
    cases,
    divergences,
    drawn,
    heads,
    of_shard,
)
from fusedloss.cli.bench import distributed as bench
from fusedloss.cli.processes import growth, small_pages
from fusedloss.engines.chunks import products


def matrix(rank: int, dtype: torch.dtype, torch_steps: bool = False) -> int:
    """How many cases there are, none of which is wrong on this process."""
    tolerance = TIGHT if dtype is torch.float64 else LOOSE
    group, count = dist.group.WORLD, 0
    with without_kernels_here() if torch_steps else contextlib.nullcontext():
        for case, sizes in itertools.product(cases(dtype), SIZES[dist.get_world_size()]):
            try:
                case.check(rank, sizes, group, **tolerance)
            except Exception as error:
                raise AssertionError(f"{case.name} {sizes}") from error
            count += 1
    return count


@contextlib.contextmanager
def without_kernels_here() -> Iterator[None]:
    import pytest

    with pytest.MonkeyPatch.context() as patch:
        without_kernels(patch)
        yield


def seen(call: Callable[[], Any]) -> str:
    """What it raises."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def refused(rank: int) -> dict[str, str]:
    """What this process sees of calls of which something is wrong, on some process at least."""
    world = dist.get_world_size()
    group, found = dist.group.WORLD, {}
    x, y, w = torch.randn(N, D), torch.arange(N) % 8, torch.randn(4, D)
    head = fusedloss.linear_cross_entropy

    def say(name: str, function: Callable[..., Any], *given: Any, **more: Any) -> None:
        settings = {"class_group": group, **more}
        found[name] = seen(lambda: function(*given, **settings))

    say("label", head, x, w, torch.where(y == 3, 4 * world, y))
    bad = y.clone()
    if rank == 1:
        bad[2] = -7
    say("label of one", head, x, w, bad)
    say("label of likelihood", fusedloss.functional.nll_loss, torch.randn(N, 4), bad)
    say("label of logits", fusedloss.functional.cross_entropy, torch.randn(N, 4), bad)
    say("weight", head, x, w, y, weight=torch.ones(4))
    say("probabilities", head, x, w, torch.rand(N, 3))
    say("features", head, x, torch.randn(4, D + rank), y)
    say("bias", head, x, w, y, linear_bias=torch.zeros(4 + rank))
    say("rows", head, x[: N - rank], w, y[: N - rank])
    say("labels", head, x, w, (y + rank) % 4)
    say("type", head, x.double() if rank else x, w.double() if rank else w, y % 4)
    say("settings", head, x, w, y % 4, label_smoothing=0.1 * rank)
    say("requires", head, x.clone().requires_grad_(rank == 0), w, y % 4, reduction="none")
    share = torch.ones(N)
    share[5] = rank
    say("weights of rows", head, x, w, y % 4, sample_weight=share)
    ignored = torch.where(torch.arange(N) == 3 + rank, -100, 2)
    say("which are ignored", head, x, w, ignored)
    say("order", head, x, w, torch.where(torch.arange(N) == 3 + rank, 1, 2))
    warmth = torch.tensor(1.0 - 2 * rank)
    teacher = {"teacher_input": x, "teacher_weight": w, "temperature": warmth}
    say("temperature", fusedloss.linear_kl_div, x, w, **teacher)
    warmth = torch.tensor(2.0).requires_grad_(rank == 0)
    say("learned", fusedloss.linear_kl_div, x, w, **{**teacher, "temperature": warmth})
    over = torch.tensor(3.0).requires_grad_(rank == 0)
    say("learned denominator", head, x, w, y % 4, denominator=over)
    say("no group", head, x, w, y, class_group="tp")
    say("no member", head, x, w, y, class_group=-100)
    mesh = torch.distributed.init_device_mesh("cpu", (world, 1), mesh_dim_names=("dp", "tp"))
    say("mesh", head, x, w, y, class_group=mesh)
    placed = torch.distributed.tensor.distribute_tensor(
        torch.randn(8, D), mesh["dp"], [torch.distributed.tensor.Shard(0)]
    )
    say("DTensor", head, x, placed, y)
    say("budget", head, x, w, y % 4, memory_budget=10)
    say("no tensor", head, x, None, y)
    return found


def counted(rank: int) -> dict[str, list[str]]:
    """The collectives of calls, in their order."""
    return {
        f"{name}{head}": collectives(head, reduction, gradients)
        for name, reduction, gradients in (
            ("mean", "mean", (0, 1)),
            ("weight alone", "mean", (1,)),
            ("without", "mean", ()),
            ("none", "none", (0, 1)),
            ("one rank alone", "mean", (0, 1) if rank else ()),
        )
        for head in ("", " of a divergence", " of a small divergence")
    }


def collectives(of: str, reduction: str, gradients: tuple[int, ...]) -> list[str]:
    seen: list[str] = []

    def noting(name: str) -> Callable[..., Any]:
        function = getattr(dist, name)

        def noted(*args: Any, **kwargs: Any) -> Any:
            seen.append(name)
            return function(*args, **kwargs)

        return noted

    with contextlib.ExitStack() as stack:
        for name in ("all_gather_into_tensor", "all_reduce"):
            stack.enter_context(mock.patch.object(dist, name, noting(name)))
        draw = Generator().manual_seed(0)
        x, w = torch.randn(64, 8, generator=draw), torch.randn(40, 8, generator=draw)
        leaves = [t.requires_grad_(k in gradients) for k, t in enumerate((x, w))]
        settings: dict[str, Any] = {"class_group": dist.group.WORLD, "reduction": reduction}
        settings["memory_budget"] = 12_000
        if of:
            teacher = x.detach() * (1.001 if "small" in of else -2), w.detach()
            losses = fusedloss.linear_kl_div(*leaves, *teacher, **settings)
        else:
            losses = fusedloss.linear_cross_entropy(*leaves, torch.arange(64), **settings)
        loss = losses.sum()
        seen.append("forward")
        if loss.requires_grad:
            loss.backward()
    return seen


def double_backward(rank: int) -> None:
    """Second derivatives are those of one process."""
    sizes = SIZES[dist.get_world_size()][0]
    own = of_shard(rank, sizes)
    for case in (*itertools.islice(heads(torch.float64), 3), *divergences(torch.float64)):
        expected = second(case, lambda tensor, dim: tensor)
        found = second(case, own, class_group=dist.group.WORLD)
        for name, whole, part in zip(HEAD, expected, found, strict=True):
            dim = case.classes.get(name)
            torch.testing.assert_close(part, whole if dim is None else own(whole, dim), **TIGHT)


def second(case: Case, own: Own, **more: Any) -> list[Tensor]:
    """By `HEAD`, the derivatives of the squares of the first ones of the input."""
    given = {}
    for name, tensor in case.tensors.items():
        dim = case.classes.get(name)
        found = tensor if dim is None else own(tensor, dim)
        given[name] = found.detach().clone().requires_grad_(name in HEAD)
    loss = case.function(**given, **case.settings, **more).sum()
    (grad,) = torch.autograd.grad(loss, given["input"], create_graph=True)
    return list(torch.autograd.grad(grad.square().sum(), [given[n] for n in HEAD]))


def compiled(rank: int) -> None:
    """Under torch.compile the same call gives the same bits."""
    problem = drawn(torch.float32)
    own = of_shard(rank, SIZES[dist.get_world_size()][0])
    given = {k: own(t, 0) if k in OF_HEADS else t for k, t in problem.tensors.items()}
    given["target"] = given["target"].clamp(min=0)

    def loss(input: Tensor, linear_weight: Tensor, linear_bias: Tensor, target: Tensor) -> Tensor:
        more = {"linear_bias": linear_bias, "class_group": dist.group.WORLD}
        return 2 * fusedloss.linear_cross_entropy(input * 1.5, linear_weight, target, **more)

    results = []
    for function in (loss, torch.compile(loss, backend="aot_eager")):
        leaves = {k: t.detach().clone().requires_grad_(k in HEAD) for k, t in given.items()}
        value = function(**leaves)
        results.append([value, *torch.autograd.grad(value, [leaves[k] for k in HEAD])])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def halves(rank: int, multiplies: bool) -> None:
    """In half types, of logits in which the roundings count in some rows, on one process or on both."""
    for sizes in SIZES[dist.get_world_size()]:
        half_types(rank, multiplies, sizes)


def half_types(rank: int, multiplies: bool, sizes: tuple[int, ...]) -> None:
    draw = Generator().manual_seed(5)
    with mock.patch.object(products, "multiplies_bfloat16", lambda: multiplies):
        for dtype in (torch.bfloat16, torch.float16):
            problem = drawn(dtype)
            factors = torch.tensor([1.0, 30.0, 8.0]).repeat(N)[:N].unsqueeze(1)
            problem.tensors["input"] = (problem.tensors["input"] * factors).to(dtype)
            problem.tensors["target"].clamp_(min=0)
            for settings in ({}, {"reduction": "none"}, {"exact_logits": True}):
                given = (fusedloss.linear_cross_entropy, problem.tensors, OF_HEADS, HEAD)
                case = Case(f"{dtype} {settings}", *given, **settings)
                case.check(rank, sizes, dist.group.WORLD, rtol=2e-2, atol=2e-2)
            both = Distillation(Generator().manual_seed(2), dtype, shape=(N, D, C))
            both.teacher["teacher_input"] *= factors.to(dtype)
            tensors = {**both.tensors, **both.teacher}
            case = Case(f"divergence {dtype}", fusedloss.linear_kl_div, tensors, OF_HEADS, HEAD)
            case.check(rank, sizes, dist.group.WORLD, rtol=2e-2, atol=2e-2)
            x = 20 * torch.randn(N, C, generator=draw).to(dtype)
            tensors = {"input": x, "target": torch.arange(N) % C}
            given = (fusedloss.functional.cross_entropy, tensors, {"input": 1}, ("input",))
            for reduction in ("none", "mean"):
                case = Case(f"logits {dtype} {reduction}", *given, reduction=reduction)
                case.check(rank, sizes, dist.group.WORLD, rtol=1e-2, atol=1e-3)


def bits(rank: int) -> None:
    """For any number of threads, time after time."""
    sizes = SIZES[dist.get_world_size()][1]
    draw = Generator().manual_seed(6)
    tensors = {
        "input": torch.randn(300, 40, generator=draw),
        "linear_weight": torch.randn(900, 40, generator=draw),
        "target": torch.randint(900, (300,), generator=draw),
    }
    sizes = tuple(100 * size for size in sizes)
    settings = {"label_smoothing": 0.1, "memory_budget": 300_000}
    given = (fusedloss.linear_cross_entropy, tensors, OF_HEADS, HEAD[:2])
    cases = [Case("bits", *given, **settings)]
    teacher = {
        "teacher_input": tensors["input"] + 0.1,
        "teacher_weight": tensors["linear_weight"],
    }
    given = (fusedloss.linear_kl_div, {**tensors, **teacher}, OF_HEADS, HEAD[:2])
    settings = {"divergence": "js", "hard_weight": 0.5, "memory_budget": 300_000}
    cases.append(Case("bits of a divergence", *given, **settings))
    for case in cases:
        found = []
        for threads in (1, 2, 1):
            torch.set_num_threads(threads)
            found.append(case.run(of_shard(rank, sizes), class_group=dist.group.WORLD))
        for again in found[1:]:
            for a, b in zip(found[0], again, strict=True):
                assert a.numpy().tobytes() == b.numpy().tobytes()


def memory(rank: int) -> tuple[int, ...]:
    """What ours, the same of DTensors and PyTorch's take, gradients included."""
    small_pages()
    found = []
    for variant in (bench.OURS, bench.PLACED, bench.THEIRS):
        step = bench.step_of(bench.CROSS_ENTROPY, variant, (1024, 512, 16384))
        step()
        found.append(growth(step))
    return tuple(found)
