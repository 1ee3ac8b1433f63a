"""A distance that is a module is read through only where to call it could do nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.nn import PairwiseDistance
from torch.nn.modules import module as modules
from torch.nn.utils import parametrize

import fusedloss
from fusedloss.functional import triplet_margin_with_distance_loss as loss

Distance = Callable[[Tensor, Tensor], Tensor]


class Tripled(PairwiseDistance):
    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        return 3 * super().forward(x1, x2)


class Doubled(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def hooked(register: str, hook: Callable[..., object], **options: bool) -> Distance:
    made = PairwiseDistance()
    getattr(made, register)(hook, **options)
    return made


def own_forward() -> Distance:
    made = PairwiseDistance()
    made.forward = lambda a, b: (a - b).abs().sum(-1)  # type: ignore[method-assign]
    return made


def set_to(**attributes: object) -> Distance:
    made = PairwiseDistance()
    for name, value in attributes.items():
        setattr(made, name, value)
    return made


def parametrized() -> Distance:
    made = PairwiseDistance()
    made.register_parameter("scale", torch.nn.Parameter(torch.ones(1)))
    parametrize.register_parametrization(made, "scale", Doubled())
    made.forward = lambda a, b: made.scale * (a - b).abs().sum(-1)  # type: ignore[method-assign]
    return made


MODULES: dict[str, Callable[[], Distance]] = {
    "forward hook": lambda: hooked("register_forward_hook", lambda m, i, out: out * 3),
    "forward hook, always": lambda: hooked(
        "register_forward_hook", lambda m, i, out: out * 3, always_call=True
    ),
    "forward hook with keywords": lambda: hooked(
        "register_forward_hook", lambda m, i, k, out: out * 3, with_kwargs=True
    ),
    "forward pre-hook": lambda: hooked("register_forward_pre_hook", lambda m, i: (2 * i[0], i[1])),
    "backward hook": lambda: hooked(
        "register_full_backward_hook", lambda m, i, o: (5 * i[0], i[1])
    ),
    "backward pre-hook": lambda: hooked(
        "register_full_backward_pre_hook", lambda m, o: (5 * o[0],)
    ),
    "subclass": Tripled,
    "own forward": own_forward,
    "parametrized": parametrized,
    "norm in a tensor": lambda: set_to(norm=torch.tensor(3.0)),
    "norm below 0": lambda: set_to(norm=-1.0),
    "eps in a tensor": lambda: set_to(eps=torch.tensor(0.1)),
}


@contextmanager
def global_hook(register: str, hook: Callable[..., object]) -> Iterator[None]:
    handle = getattr(modules, register)(hook)
    try:
        yield
    finally:
        handle.remove()


def other(*arguments: object) -> Tensor:
    a, b = (t for t in arguments if isinstance(t, Tensor))
    return (a - b).square().sum(-1)


AROUND: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "global forward hook": lambda: global_hook(
        "register_module_forward_hook", lambda m, i, out: out * 3
    ),
    "global forward pre-hook": lambda: global_hook(
        "register_module_forward_pre_hook", lambda m, i: (2 * i[0], i[1])
    ),
    "torch.nn.functional": lambda: mock.patch("torch.nn.functional.pairwise_distance", other),
    "torch": lambda: mock.patch("torch.pairwise_distance", other),
    "class": lambda: mock.patch.object(PairwiseDistance, "forward", other),
    "call": lambda: mock.patch.object(PairwiseDistance, "__call__", other),
}


def assert_as_torch(distance: Distance | None, swap: bool = False) -> None:
    outcomes = []
    for function in (loss, torch.nn.functional.triplet_margin_with_distance_loss):
        generator = torch.Generator().manual_seed(1)
        inputs = [
            torch.randn(6, 4, generator=generator, dtype=torch.float64).requires_grad_()
            for _ in range(3)
        ]
        value = function(*inputs, distance_function=distance, swap=swap, margin=2.0)
        outcomes.append([value, *torch.autograd.grad(value, inputs)])
    for ours, theirs in zip(*outcomes, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)
def test_a_module_that_does_more_is_called(make: Callable[[], Distance]) -> None:
    assert_as_torch(make())
    assert_as_torch(make(), swap=True)


@pytest.mark.parametrize("around", AROUND.values(), ids=AROUND)
def test_what_was_put_in_its_place_is_called(
    around: Callable[[], AbstractContextManager[object]],
) -> None:
    for distance in (None, PairwiseDistance()):
        with around():
            assert_as_torch(distance)
            assert_as_torch(torch.nn.functional.pairwise_distance)


def test_a_compiled_call_sees_an_own_forward() -> None:
    a, b, c = torch.randn(3, 6, 4)
    module = PairwiseDistance()
    torch._dynamo.reset()
    fast = torch.compile(loss, fullgraph=True, backend="aot_eager")
    before = fusedloss.core.trace.calls()["triplet_margin_loss", "kernel"]
    fast(a, b, c, distance_function=module)
    assert fusedloss.core.trace.calls()["triplet_margin_loss", "kernel"] == before + 1
    module.forward = lambda x, y: (x - y).abs().sum(-1)  # type: ignore[method-assign]
    expected = loss(a, b, c, distance_function=module)
    torch.testing.assert_close(fast(a, b, c, distance_function=module), expected)


def test_a_plain_module_runs_fused() -> None:
    a, b, c = torch.randn(3, 6, 4)
    for distance in (None, PairwiseDistance(3), torch.pairwise_distance, PairwiseDistance().eval()):
        assert fusedloss.explain(loss, a, b, c, distance_function=distance).kernel == "triplet"
    assert fusedloss.explain(loss, a, b, c, distance_function=Tripled()).kernel != "triplet"
