"""`class_group`: what processes with a shard of the classes each compute is what one computes of all."""

from __future__ import annotations

import pytest
import torch

from distributed import class_groups
from distributed.ranks import run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed"),
]
WORLDS = [2, *(pytest.param(k, marks=pytest.mark.nightly) for k in (3, 4))]
each_world = pytest.mark.parametrize("world", WORLDS)


@each_world
@pytest.mark.parametrize(
    ("torch_steps", "dtype"),
    [
        pytest.param(False, torch.float64, id="kernels-float64"),
        pytest.param(False, torch.float32, id="kernels-float32"),
        pytest.param(True, torch.float64, id="torch-float64"),
        pytest.param(True, torch.float32, id="torch-float32", marks=pytest.mark.nightly),
    ],
)
def test_matrix(world: int, dtype: torch.dtype, torch_steps: bool) -> None:
    """Every option, reduction and division of the classes; the bits are the same on all processes."""
    assert min(run(world, class_groups.matrix, dtype, torch_steps)) > 300


REFUSED = {
    "label": "IndexError: linear_cross_entropy: target[3] = 8 is out of range for 8 classes",
    "label of one": "IndexError: linear_cross_entropy: target[2] = -7 is out of range for 8 classes",
    "label of likelihood": "IndexError: nll_loss: target[2] = -7 is out of range for 8 classes",
    "label of logits": "IndexError: cross_entropy: target[2] = -7 is out of range for 8 classes",
    "weight": "RuntimeError: linear_cross_entropy: weight tensor should be defined either for all 8",
    "probabilities": "holds probabilities of [3, 3] classes on the ranks of class_group, whose shards",
    "features": "linear_weight differs between the processes of class_group: float32 [C, 6] on cpu on rank 0",
    "bias": "linear_bias differs between the processes of class_group: float32 [C] on cpu on rank 0",
    "rows": "input differs between the processes of class_group: float32 [11, 6] on cpu on rank 0",
    "labels": "ValueError: linear_cross_entropy: target differs between the processes of class_group",
    "type": "input differs between the processes of class_group: float32 [11, 6] on cpu on rank 0, float64",
    "settings": "label_smoothing differs between the processes of class_group: 0.0 on rank 0, 0.1 on rank 1",
    "requires": "input.requires_grad differs between the processes of class_group: True on rank 0, False",
    "weights of rows": "needs that of all rows: sample_weight[5] is 0.0 on rank 0, 1.0 on rank 1",
    "which are ignored": "target[3] is -100 on rank 0, 2 on rank 1",
    "order": "target[3] is 1 on rank 0, 2 on rank 1",
    "temperature": "temperature differs between the processes of class_group: float32 [] on cpu, 1.0 on rank 0",
    "learned": "temperature differs between the processes of class_group: float32 [] on cpu, 2.0, which",
    "learned denominator": "denominator differs between the processes of class_group: float32 [] on cpu, 3",
    "no group": "TypeError: linear_cross_entropy: argument 'class_group' must be a ProcessGroup",
    "no member": "ValueError: linear_cross_entropy: class_group is a group of which this process is no member",
    "mesh": "class_group is a mesh of 2 dimensions, and one must hold the classes: pass that dimension",
    "DTensor": "RuntimeError: linear_cross_entropy: linear_weight is a DTensor beside class_group",
    "budget": "does not hold one row",
    "no tensor": "argument 'linear_weight' must be Tensor, not NoneType",
}


def test_all_processes_are_refused_alike() -> None:
    """Whatever is wrong on one of them: nobody waits for the others."""
    first, second = run(2, class_groups.refused)
    assert first == second
    assert set(first) == set(REFUSED)
    for name, words in REFUSED.items():
        assert words in first[name], f"{name}: {first[name]}"


def test_one_exchange_a_chunk_and_two_a_loss() -> None:
    """One before, and one of the input's gradient; the same on a process that needs none itself.

    A divergence takes two a chunk, and a third where it is small.
    """
    gather, add = "all_gather_into_tensor", "all_reduce"
    first, second = run(2, class_groups.counted)
    assert first == second
    for name, seen in first.items():
        forward, backward = seen[: seen.index("forward")], seen[seen.index("forward") + 1 :]
        name, _, of = name.partition(" of ")
        chunks, rest = divmod(forward.count(gather) - 1, 3 if "small" in of else 2 if of else 1)
        assert chunks > 1
        assert not rest
        adds = [add] * (name in ("mean", "one rank alone"))
        assert forward == [gather] * forward.count(gather) + adds, name
        assert backward == [add] * (name == "none"), name


def test_derivatives_of_derivatives() -> None:
    run(2, class_groups.double_backward)


def test_compiled() -> None:
    run(2, class_groups.compiled)


@pytest.mark.parametrize("multiplies", [False, True], ids=["widened", "native"])
def test_half_types(multiplies: bool) -> None:
    """With the logits of a process taken exactly where their roundings count."""
    run(2, class_groups.halves, multiplies)


def test_bits() -> None:
    run(2, class_groups.bits)


def test_memory() -> None:
    for ours, placed, theirs in run(2, class_groups.memory):
        assert max(ours, placed) <= theirs / 4
