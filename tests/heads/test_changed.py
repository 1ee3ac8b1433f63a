"""What is changed, or comes back otherwise, between loss and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import same_bits, tells_what_changed
from problems import Distillation, Problem, Results, Subclass, backward, close
from torch import Generator, Tensor

from fusedloss import linear_cross_entropy, linear_kl_div, linear_log_prob


def changed(problem: Problem, name: str, call: Callable[..., Any], compiled: bool) -> Results:
    """The gradients of all but `name`, which is frozen and changed after the loss was taken."""
    call = torch.compile(call, backend="aot_eager") if compiled else call
    inputs = {k: t.clone() for k, t in problem.tensors.items()}
    learned = [inputs[k].requires_grad_() for k in problem.learned if k != name]
    results = call(**inputs)
    inputs[name].data.mul_(1)  # an optimizer's way leaves the version
    with torch.no_grad():
        inputs[name].zero_()
    return [*torch.autograd.grad(results, learned)]


@pytest.mark.parametrize("compiled", [pytest.param(False, marks=tells_what_changed), True])
def test_frozen_tensors_changed_before_backward(compiled: bool, generator: Generator) -> None:
    """Where forward stored the gradients they may be."""
    problem = Distillation(generator)
    calls: list[Callable[..., Any]] = [
        linear_cross_entropy,
        lambda **t: linear_kl_div(**t, **problem.teacher),
    ]
    for call in calls[: 1 if compiled else 2]:
        for name in problem.tensors if not compiled else ("linear_weight",):
            expected = backward(problem, call, {})[1:]
            pairs = zip(problem.learned, expected, strict=True)
            found = changed(problem, name, call, compiled)
            close(found, [g for k, g in pairs if k != name])


@tells_what_changed
def test_what_learns_changed_before_backward(generator: Generator) -> None:
    """Its gradient is there; what would be computed anew, with create_graph, is refused."""
    problem = Problem(generator)
    expected = backward(problem, linear_cross_entropy, {})[1:]
    inputs = {k: t.requires_grad_(k in problem.learned) for k, t in problem.tensors.items()}
    loss = linear_cross_entropy(**inputs)
    with torch.no_grad():
        inputs["input"].zero_()
    words = "linear_cross_entropy: input was changed after the loss was taken: .* create_graph"
    learned = [inputs[k] for k in problem.learned]
    with pytest.raises(RuntimeError, match=words):
        torch.autograd.grad(loss, learned, create_graph=True, retain_graph=True)
    close([*torch.autograd.grad(loss, learned, retain_graph=True)], expected)
    close([*torch.autograd.grad(loss, learned)], expected)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, learned)


@tells_what_changed
@pytest.mark.parametrize("name", ["input", "linear_weight", "target", "sample_weight"])
def test_unreduced_losses_need_what_they_were_given(name: str, generator: Generator) -> None:
    problem = Problem(generator)
    inputs = {k: t.requires_grad_(k in problem.learned) for k, t in problem.tensors.items()}
    inputs["sample_weight"] = problem.rewards()
    losses = linear_cross_entropy(**inputs, reduction="none")
    with torch.no_grad():
        inputs[name].zero_()
    words = f"linear_cross_entropy: {name} was changed after the loss was taken: .*no gradient is"
    with pytest.raises(RuntimeError, match=words):
        losses.sum().backward()


@pytest.mark.parametrize("name", ["input", "linear_weight", "linear_bias", "target"])
def test_saved_tensors_of_another_size(name: str, generator: Generator) -> None:
    """Nothing is read out of bounds."""
    problem = Problem(generator)
    inputs = {k: t.requires_grad_(k in problem.learned) for k, t in problem.tensors.items()}
    for call in (linear_cross_entropy, linear_log_prob):
        inputs = {k: t.detach().requires_grad_(k in problem.learned) for k, t in inputs.items()}
        settings = {"reduction": "none"} if call is linear_cross_entropy else {}
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, shorter(inputs[name])):
            losses = call(**inputs, **settings)
        with pytest.raises(RuntimeError, match=f"{name} was saved for backward as"):
            losses.sum().backward()


def shorter(of: Tensor) -> Callable[[Tensor], Tensor]:
    """An unpack hook that gives one of the tensors with a row less."""
    same = (of.untyped_storage().data_ptr(), of.numel())
    return lambda t: t[:-1] if (t.untyped_storage().data_ptr(), t.numel()) == same else t


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_saved_tensors_in_other_forms(reduction: str, generator: Generator) -> None:
    """Of another type, elsewhere in memory, or a subclass; and what a hook kept stays as it is."""
    problem = Problem(generator)
    settings = {"reduction": reduction}
    expected = backward(problem, linear_cross_entropy, settings)
    kept: list[tuple[Tensor, Tensor]] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append((tensor, tensor.clone()))
        return tensor

    forms: list[Callable[[Tensor], Tensor]] = [
        lambda t: t,
        lambda t: torch.stack([t, t], -1)[..., 0],
        lambda t: t.as_subclass(Subclass) if t.is_floating_point() else t,
        lambda t: t if t.is_floating_point() else t.to(torch.int16),
    ]
    for form in forms:
        with torch.autograd.graph.saved_tensors_hooks(pack, form):
            inputs = {
                k: t.clone().requires_grad_(k in problem.learned)
                for k, t in problem.tensors.items()
            }
            loss = linear_cross_entropy(**inputs, **settings)
        grads = torch.autograd.grad(
            3 * loss, [inputs[k] for k in problem.learned], torch.ones_like(loss)
        )
        close([g / 3 for g in grads], expected[1:])
        assert kept and all(same_bits(t.detach(), copy.detach()) for t, copy in kept)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_tensors_of_inference_mode(reduction: str, generator: Generator) -> None:
    """A teacher's, and labels; and what is made within it is not differentiable."""
    problem = Distillation(generator)
    settings = {"reduction": reduction, "hard_weight": 0.5}
    expected = backward(problem, linear_kl_div, {**settings, "teacher_logits": problem.logits()})
    with torch.inference_mode():
        logits, target = problem.logits(), problem.tensors["target"].clone()
    inputs = {k: t.requires_grad_(k in problem.learned) for k, t in problem.tensors.items()}
    inputs |= {"target": target, "teacher_logits": logits}
    learned = [inputs[k] for k in problem.learned]
    loss = linear_kl_div(**inputs, **settings)
    ones = torch.ones_like(loss)
    if reduction == "mean":
        with pytest.raises(RuntimeError, match="target is of inference mode, and not kept"):
            torch.autograd.grad(loss, learned, ones, create_graph=True, retain_graph=True)
    with torch.inference_mode():
        logits.zero_()
    close([loss.detach(), *torch.autograd.grad(loss, learned, ones)], expected)
    with torch.inference_mode(), torch.enable_grad():
        assert not linear_kl_div(**inputs, **settings).requires_grad
