"""Heads on what strangers bring: subclasses, tensors without memory, other devices and forms."""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import formula_path
from problems import (
    FUNCTIONS,
    Distillation,
    Problem,
    Subclass,
    arguments,
    backward,
    close,
    freed,
    outcome,
    tensors_of,
)
from torch import Generator, Tensor

from fusedloss import linear_cross_entropy, linear_kl_div, linear_log_prob

SERVED: dict[str, Callable[[Tensor], Tensor]] = {
    "subclass": lambda t: t.as_subclass(Subclass),
    "lazy sign": lambda t: torch._neg_view(-t),
    "zeros": lambda t: torch._efficientzerotensor(t.shape, dtype=t.dtype),
}


@pytest.mark.parametrize("how", SERVED)
@pytest.mark.parametrize("kind", FUNCTIONS)
def test_odd_tensors_are_served(kind: str, how: str, generator: Generator) -> None:
    given = arguments(kind, generator)
    for name in [k for k, t in given.items() if isinstance(t, Tensor)]:
        odd = SERVED[how](given[name])
        plain = torch.zeros_like(given[name]) if how == "zeros" else given[name]
        expected = outcome(kind, given | {name: plain})
        close(outcome(kind, given | {name: odd}), expected, equal_nan=True)


ARRIVING: dict[str, Callable[[Tensor], Tensor]] = {
    **{k: SERVED[k] for k in ("lazy sign", "zeros")},
    "expanded": lambda t: t.flatten()[0].expand(t.shape),
    "strided": lambda t: torch.stack([t, t], -1)[..., 0],
}


@pytest.mark.parametrize("how", ARRIVING)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_odd_gradients_that_arrive(how: str, reduction: str, generator: Generator) -> None:
    """Those of statistics, too."""
    problem = Distillation(generator, shape=(6, 4, 9))
    calls: list[Callable[..., Any]] = [
        lambda **t: linear_cross_entropy(**t, reduction=reduction),
        lambda **t: linear_kl_div(**t, **problem.teacher, reduction=reduction),
        lambda **t: linear_log_prob(**t, statistics=True)[:3],
    ]
    for call in calls:
        inputs = {k: t.requires_grad_(k in problem.learned) for k, t in problem.tensors.items()}
        learned = [inputs[k] for k in problem.learned]
        for chosen in range(len(tensors_of(call(**inputs)))):
            results = tensors_of(call(**inputs))
            ones = [torch.ones_like(r) for r in results]
            odd = [*ones]
            odd[chosen] = ARRIVING[how](torch.full_like(ones[chosen], 2.0))
            same = [*ones]
            same[chosen] = torch.full_like(ones[chosen], 0.0 if how == "zeros" else 2.0)
            found = torch.autograd.grad(results, learned, odd, retain_graph=True)
            close([*found], [*torch.autograd.grad(results, learned, same)])
            if results[chosen].grad_fn.name() == "NegBackward0":
                continue  # PyTorch's own would read it first
            results = tensors_of(call(**inputs))
            odd[chosen] = freed(ones[chosen])
            with pytest.raises(RuntimeError, match="the storage of incoming was freed"):
                torch.autograd.grad(results, learned, odd)


def test_a_zero_that_autograd_made(generator: Generator) -> None:
    """`sgn()` sends one back: the gradient by it is 0."""
    problem = Problem(generator)
    inputs = {k: t.requires_grad_(k in problem.learned) for k, t in problem.tensors.items()}
    losses = linear_cross_entropy(**inputs, reduction="none")
    (losses.sgn() + losses).sum().backward()
    plain = Problem(generator)
    plain.tensors = problem.tensors
    expected = backward(plain, lambda **t: linear_cross_entropy(**t, reduction="sum"), {})
    close([inputs[k].grad for k in problem.learned], expected[1:])


DISTRIBUTED = """
import sys, torch
import torch.distributed as dist
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

sys.path.insert(0, sys.argv[1])
from conftest import *
from problems import FUNCTIONS, arguments, close, outcome

dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))

for kind, function in FUNCTIONS.items():
    given = arguments(kind, torch.Generator().manual_seed(0))
    names = [k for k, t in given.items() if isinstance(t, torch.Tensor)]
    expected = outcome(kind, given)
    for name in names:
        close(outcome(kind, given | {name: AsyncCollectiveTensor(given[name])}), expected)
        mixed = given | {name: distribute_tensor(given[name], mesh, [Replicate()])}
        if name == "denominator":  # a number to DTensors as well
            continue
        try:
            function(**mixed)
        except RuntimeError as error:
            words = str(error)
            assert words.startswith(f"{function.__name__}: {name} is a DTensor, "), words
            remedies = ("the module's forward", "unshard()", "DTensor.from_local(", "class_group=")
            assert all(remedy in words for remedy in remedies)
        else:
            raise AssertionError(f"{kind}: {name} as a DTensor")
    spread = {k: distribute_tensor(given[k], mesh, [Replicate()]) for k in names}
    of_rows = ("target", "weight", "sample_weight", "denominator")
    for some in (spread, {k: t for k, t in spread.items() if k not in of_rows}):
        found = outcome(kind, given | some)
        close([t.full_tensor() if hasattr(t, "full_tensor") else t for t in found], expected)
print("all of them")
"""


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")
def test_tensors_of_torch_distributed(tmp_path: Path) -> None:
    """In a process of its own: those without a kernel once ended it."""
    command = [
        sys.executable,
        "-c",
        DISTRIBUTED,
        str(Path(__file__).parent.parent),
        str(tmp_path / "x"),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0 and "all of them" in done.stdout, done.stderr[-3000:]


def test_nodes_and_events_bear_the_name_of_the_loss(generator: Generator) -> None:
    problem = Distillation(generator)
    inputs = {k: t.requires_grad_(k in problem.learned) for k, t in problem.tensors.items()}
    calls: dict[str, Callable[..., Any]] = {
        "linear_cross_entropy": linear_cross_entropy,
        "linear_kl_div": lambda **t: linear_kl_div(**t, **problem.teacher),
        "linear_log_prob": lambda **t: linear_log_prob(**t, statistics=True).lse.sum(),
    }
    for name, call in calls.items():
        with torch.profiler.profile() as seen:
            loss = call(**inputs)
            loss.backward()
            with torch.no_grad():
                call(**inputs)
            with formula_path():
                call(**inputs)
        events = [e.key for e in seen.key_averages() for _ in range(e.count)]
        assert events.count(f"fusedloss::{name}") == 3
        assert any(f"fusedloss::{name}Backward" in e for e in events)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_autocast_leaves_float64_alone(reduction: str, generator: Generator) -> None:
    problem = Distillation(generator)
    settings = {"reduction": reduction}
    calls: list[Callable[..., Any]] = [
        lambda **t: linear_cross_entropy(**t, **settings),
        lambda **t: linear_kl_div(**t, **problem.teacher, **settings),
        linear_log_prob,
    ]
    for call, name in itertools.product(calls, ("chunks", "formula")):
        with formula_path() if name == "formula" else contextlib.nullcontext():
            expected = problem.run(call)
            with torch.autocast("cpu", torch.bfloat16):
                found = problem.run(call)
        assert all(t.dtype is torch.float64 for t in found)
        close(found, expected, rtol=1e-12, atol=1e-12)
    problem.tensors["linear_weight"] = problem.tensors["linear_weight"].float()
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError, match="same dtype"):
        calls[0](**problem.tensors)


def test_heads_on_meta_tensors(generator: Generator) -> None:
    """Shapes and types, and gradients of them."""
    problem = Distillation(generator)
    problem.tensors = {k: t.to("meta") for k, t in problem.tensors.items()}
    teacher = {k: t.to("meta") for k, t in problem.teacher.items()}
    weight = torch.ones(problem.c, dtype=torch.float64, device="meta")
    rewards = torch.ones(problem.n, dtype=torch.float64, device="meta")
    number = torch.tensor(2.0, dtype=torch.float64, device="meta")
    calls: list[Callable[..., Any]] = [
        lambda **t: linear_cross_entropy(**t, weight=weight, z_loss=0.1, softcap=2.0),
        lambda **t: linear_cross_entropy(**t, sample_weight=rewards, denominator=3.0),
        lambda **t: linear_cross_entropy(**t, reduction="none", label_smoothing=0.1),
        lambda **t: linear_log_prob(**t, statistics=True, temperature=0.5),
        lambda **t: linear_kl_div(**t, **teacher, hard_weight=0.5),
        lambda **t: linear_cross_entropy(**t, softcap=number, logit_scale=number),
        lambda **t: linear_log_prob(**t, temperature=number),
        lambda **t: linear_kl_div(**t, **teacher, temperature=number, softcap=number),
    ]
    for call in calls:
        inputs = {
            k: t.detach().requires_grad_(k in problem.learned) for k, t in problem.tensors.items()
        }
        results = tensors_of(call(**inputs))
        assert all(r.is_meta and r.shape in ((), (problem.n,)) for r in results)
        grads = torch.autograd.grad(results[0].sum(), [inputs[k] for k in problem.learned])
        assert all(g.is_meta for g in grads)


@pytest.mark.parametrize("out", [(), (3,), (2, 2)], ids=str)
@pytest.mark.parametrize("batch", [(), (3, 4)], ids=str)
def test_unreduced_losses_are_contiguous(
    batch: tuple[int, ...], out: tuple[int, ...], path: str, generator: Generator
) -> None:
    problem = Problem(generator, out=out, shape=(12, 4, 5))
    shapes = {"input": (*(batch or (12,)), 4), "target": (*(batch or (12,)), *out)}
    for name, shape in shapes.items():
        problem.tensors[name] = problem.tensors[name].reshape(shape)
    losses = linear_cross_entropy(**problem.tensors, reduction="none")
    found = [losses, *linear_log_prob(**problem.tensors, statistics=True)[:4]]
    assert all(t.shape == shapes["target"] and t.is_contiguous() for t in found)
    losses.view(-1)
