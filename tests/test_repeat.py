"""A call like an earlier one skips the checks that saw no more than types, shapes and settings."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from conftest import formula_path, same_bits
from torch import Generator, Tensor, tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import fusedloss
from fusedloss import functional, route
from fusedloss.define import REGISTRY, Loss

BY_KERNEL = [loss for loss in REGISTRY.values() if loss.name != "triplet_margin_with_distance_loss"]
each_loss = pytest.mark.parametrize("loss", BY_KERNEL, ids=lambda loss: loss.key)
BCE, CE, KL = "binary_cross_entropy", "cross_entropy", "kl_div"


class Passing(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def nothing_known() -> Iterator[None]:
    route._known.clear()
    yield
    route._known.clear()


def options(loss: Loss) -> dict[str, object]:
    return {"log_target": True} if loss.variant == "log_target" else {}


@each_loss
def test_no_check_runs_again(
    loss: Loss, generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = loss.example((3, 5), torch.float32, generator)
    first = loss.function(*tensors, **options(loss), reduction="sum")
    monkeypatch.setattr(route, "dispatch", lambda *_, **__: pytest.fail("it was checked again"))
    before = route.calls()[loss.name, "kernel"]
    assert same_bits(loss.function(*tensors, **options(loss), reduction="sum"), first)
    assert route.calls()[loss.name, "kernel"] == before + 1
    leaf = tensors[0].clone().requires_grad_()
    loss.function(leaf, *tensors[1:], **options(loss), reduction="sum").backward()
    assert leaf.grad is not None


@pytest.mark.filterwarnings("ignore")  # of torch.jit.trace
@each_loss
def test_what_is_in_force_holds_for_known_calls_too(loss: Loss, generator: Generator) -> None:
    tensors = loss.example((3, 5), torch.float32, generator)

    def run(*inputs: Tensor) -> Tensor:
        return loss.function(*inputs, **options(loss), reduction="sum")

    run(*tensors)
    assert route._known
    before = route.calls()[loss.name, "formula"]
    with formula_path():
        run(*tensors)
    torch.func.grad(run)(*tensors)
    with forward_ad.dual_level():
        run(*tensors)
    with Passing():
        run(*tensors)
    torch.jit.trace(run, tensors, check_trace=False)
    assert route.calls()[loss.name, "formula"] == before + 5
    assert fusedloss.explain(run, *tensors).kernel


@each_loss
def test_half_types_depend_on_autocast(loss: Loss, generator: Generator) -> None:
    tensors = loss.example((3, 5), torch.bfloat16, generator)
    for _ in range(2):
        assert loss.function(*tensors, **options(loss)).dtype == torch.bfloat16
        with torch.autocast("cpu", torch.bfloat16):
            assert loss.function(*tensors, **options(loss)).dtype == torch.float32


def test_strict_mode_sees_known_calls() -> None:
    p = torch.tensor([[0.25, 0.75]]).repeat(8, 1)
    for _ in range(2):
        functional.kl_div(p, p, reduction="sum")
        with fusedloss.checks("strict"), pytest.raises(ValueError, match="kl_div"):
            functional.kl_div(p, p, reduction="sum")


@pytest.mark.parametrize(
    ("function", "arguments", "options"),
    [
        ("mse_loss", (torch.ones(3, 1), torch.ones(3)), {}),
        (KL, (torch.zeros(3), torch.ones(3)), {"reduction": "mean"}),
        (CE, (torch.zeros(3, 4), tensor([0, 1, 2])), {"reduction": "elementwise_mean"}),
        (CE, (torch.zeros(3, 4), tensor([0, 1, 2])), {"size_average": False}),
    ],
)
def test_a_warning_comes_each_time(
    function: str, arguments: tuple[Tensor, ...], options: dict[str, object]
) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for count in (1, 2, 3):
            getattr(functional, function)(*arguments, **options)
            assert len(caught) == count


@pytest.mark.filterwarnings("ignore")  # of torch.jit.trace
def test_tracing_without_sizes() -> None:
    """In a trace each size is a tensor, which no key holds; a scalar has none."""
    x, y = torch.tensor(2.0), torch.tensor(5.0)
    for _ in range(2):
        assert functional.mse_loss(x, y) == 9
    traced = torch.jit.trace(functional.mse_loss, (x, y), check_trace=False)
    assert traced(x + 1, y) == 4


def test_values_are_checked_each_time() -> None:
    x, target = torch.zeros(3, 4), tensor([0, 1, 2])
    functional.cross_entropy(x, target)
    with pytest.raises(IndexError, match=r"target\[1\] = 9 is out of range for 4 classes"):
        functional.cross_entropy(x, tensor([0, 9, 2]))
    p = torch.full((3,), 0.5)
    functional.binary_cross_entropy(p, p)
    with pytest.raises(RuntimeError, match=r"target\[0\] = 1\.5"):
        functional.binary_cross_entropy(p, 3 * p)


def test_settings_that_are_equal_but_of_other_types() -> None:
    x, target = torch.zeros(3, 4), tensor([0, 1, 2])
    for function in (functional.cross_entropy, functional.nll_loss):
        function(x, target)
        with pytest.raises(TypeError, match="ignore_index"):
            function(x, target, ignore_index=-100.0)
    a = torch.zeros(2, 3)
    for margin in (tensor(1.0), np.ones(())):
        assert functional.triplet_margin_loss(a, a, a, margin=margin) == 1
        margin += 1
        assert functional.triplet_margin_loss(a, a, a, margin=margin) == 2
    with pytest.raises(ValueError, match="reduction"):
        functional.cross_entropy(x, target, reduction=[])


def test_what_is_known_stays_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(route, "MOST_KNOWN", 4)
    for n in range(20):
        functional.mse_loss(torch.zeros(n), torch.ones(n))
        assert len(route._known) <= 4
