"""Dispatch modes, which see every operation of torch: a head is one of them, and its logits are none."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import formula_path, leaves
from torch import Generator, Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from torch.utils.flop_counter import FlopCounterMode

import fusedloss
from fusedloss import linear_cross_entropy, linear_kl_div, linear_log_prob

N, D, C, E = 6, 4, 50, 3
Function = Callable[..., Tensor]


class Watching(TorchDispatchMode):
    """Notes the operators, and the most elements in memory of a result."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.names.append(func.overloadpacket._qualified_op_name)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and not leaf.is_meta:
                self.most = max(self.most, leaf.numel())
        return result


@pytest.fixture
def head(generator: Generator) -> dict[str, Tensor]:
    return {
        "input": torch.randn(N, D, generator=generator),
        "linear_weight": torch.randn(C, D, generator=generator),
        "target": torch.randint(C, (N,), generator=generator),
        "teacher_input": torch.randn(N, E, generator=generator),
        "teacher_weight": torch.randn(C, E, generator=generator),
    }


def distilled(input: Tensor, weight: Tensor, reduction: str, teacher: tuple[Tensor, ...]) -> Tensor:
    return linear_kl_div(input, weight, *teacher, reduction=reduction)


def losses(head: dict[str, Tensor]) -> dict[str, Function]:
    """Each of a head's input and weight."""
    target, teacher = head["target"], (head["teacher_input"], head["teacher_weight"])
    found: dict[str, Function] = {
        "linear_log_prob": lambda x, w: linear_log_prob(x, w, target)[0],
    }
    for reduction in ("mean", "none"):
        found[f"linear_cross_entropy {reduction}"] = functools.partial(
            linear_cross_entropy, target=target, reduction=reduction
        )
        found[f"linear_kl_div {reduction}"] = functools.partial(
            distilled, reduction=reduction, teacher=teacher
        )
    return found


def outcome(loss: Function, head: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """The value and the gradients by input and weight."""
    x, w = leaves((head["input"], head["linear_weight"]), (0, 1))
    value = loss(x, w)
    return value, *torch.autograd.grad(value.sum(), (x, w))


def test_a_head_is_one_operator_without_logits(head: dict[str, Tensor]) -> None:
    for name, loss in losses(head).items():
        expected = outcome(loss, head)
        with Watching() as mode:
            found = outcome(loss, head)
        for a, e in zip(found, expected, strict=True):
            assert torch.equal(a, e)
        family = "distill" if "kl" in name else "linear"
        # What forward stored is scaled.
        ours = [n for n in mode.names if n.startswith("fusedloss") and "scaled" not in n]
        backward = [] if "mean" in name else [f"fusedloss::{family}_backward"]
        assert ours == [f"fusedloss::{family}", *backward]
        assert mode.most < N * C


def test_the_mode_is_named(head: dict[str, Tensor]) -> None:
    loss = losses(head)["linear_cross_entropy mean"]
    with Watching():
        route = fusedloss.explain(loss, head["input"], head["linear_weight"])
    assert route.kernel == "linear" and "TorchDispatchMode sees it as one operator" in route.why


def test_flops_are_those_of_the_products(head: dict[str, Tensor]) -> None:
    product = 2 * N * C * D
    expected = {"linear_cross_entropy": 3 * product, "linear_kl_div": 3 * product + 2 * N * C * E}
    for name, loss in losses(head).items():
        with FlopCounterMode(display=False) as counter:
            outcome(loss, head)
        with formula_path(), FlopCounterMode(display=False) as whole:
            outcome(loss, head)
        flops = expected.get(name.removesuffix(" mean"), 0)
        if flops:
            assert counter.get_total_flops() == whole.get_total_flops() == flops
        else:  # without a reduction backward takes the logits once more
            again = product + (2 * N * C * E if "kl" in name else 0)
            assert counter.get_total_flops() == whole.get_total_flops() + again
        # Nothing is learned: one product.
        with FlopCounterMode(display=False) as counter:
            loss(head["input"], head["linear_weight"])
        assert counter.get_total_flops() == product + (2 * N * C * E if "kl" in name else 0)


@pytest.mark.parametrize("policy", [CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_RECOMPUTE])
def test_selective_checkpointing(policy: CheckpointPolicy, head: dict[str, Tensor]) -> None:
    """Its policy is asked for the operator; both what is saved and what is computed again are right."""
    asked: list[str] = []

    def choose(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        asked.append(op.overloadpacket._qualified_op_name)
        return policy if "fusedloss" in asked[-1] else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, choose)
    for loss in losses(head).values():
        asked.clear()

        def whole(x: Tensor, w: Tensor, loss: Function = loss) -> Tensor:
            return loss(x.tanh(), w)

        def kept(x: Tensor, w: Tensor, whole: Function = whole) -> Tensor:
            result: Tensor = checkpoint(whole, x, w, use_reentrant=False, context_fn=contexts)
            return result

        found, expected = outcome(kept, head), outcome(whole, head)
        for a, e in zip(found, expected, strict=True):
            assert torch.equal(a, e)
        assert any("fusedloss" in name for name in asked)


def test_what_is_traced_holds_operators_of_torch_alone(head: dict[str, Tensor]) -> None:
    x, w = head["input"], head["linear_weight"]
    for loss in losses(head).values():
        graph = make_fx(loss)(x, w).graph
        assert not [n for n in graph.nodes if "fusedloss" in str(n.target)]


def test_create_graph_under_a_mode(head: dict[str, Tensor]) -> None:
    loss = losses(head)["linear_cross_entropy mean"]

    def second() -> Tensor:
        (x,) = leaves((head["input"],), (0,))
        (first,) = torch.autograd.grad(loss(x, head["linear_weight"]), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    with Watching():
        found = second()
    torch.testing.assert_close(found, second())


@pytest.mark.parametrize("value", [C, -1, C + 10**6])
def test_a_class_out_of_range_is_an_index_error(value: int, head: dict[str, Tensor]) -> None:
    target, logits = head["target"].clone(), torch.randn(N, C)
    target[2] = value
    calls: list[Callable[[], Tensor]] = [
        lambda: fusedloss.cross_entropy(logits, target),
        lambda: fusedloss.nll_loss(logits, target, reduction="none"),
        lambda: linear_cross_entropy(head["input"], head["linear_weight"], target),
        lambda: linear_log_prob(head["input"], head["linear_weight"], target)[0],
    ]
    for call in calls:
        for mode in (Watching(), FlopCounterMode(display=False)):
            with pytest.raises(IndexError, match=rf"target\[2\] = {value} is out of range"), mode:
                call()
        with pytest.raises(IndexError, match=rf"target\[2\] = {value} is out of range"):
            make_fx(call)()


def test_a_label_out_of_range_is_told_while_traced() -> None:
    x = torch.randn(3, 5)
    for call in (
        lambda: fusedloss.multi_margin_loss(x, torch.tensor([0, 1, 7])),
        lambda: fusedloss.multilabel_margin_loss(x, torch.tensor([[7, -1, 0, 0, 0]] * 3)),
    ):
        with pytest.raises(RuntimeError, match=r"target\[.+\] = 7 is "):
            make_fx(call)()


def test_the_check_of_classes_is_not_seen(generator: Generator) -> None:
    x, y = torch.randn(4, 5, generator=generator), torch.tensor([0, 1, 2, 4])
    with Watching() as mode:
        fusedloss.cross_entropy(x, y)
    assert not {"aten::_local_scalar_dense", "aten::nonzero"} & set(mode.names)
    assert torch.func.functionalize(fusedloss.cross_entropy)(x, y) == fusedloss.cross_entropy(x, y)
