"""CTC: lengths, labels and blanks of all kinds; against PyTorch, sums of probabilities, and all paths."""

# ruff: noqa: E501 - a row of the table is a line

from __future__ import annotations

import itertools
import math
from contextlib import nullcontext
from typing import Any

import pytest
import sequences
import torch
from conftest import formula_path, run, same_bits
from torch import Generator, Tensor
from torch.nn import functional as F  # noqa: N812
from torch.testing import assert_close

import fusedloss
from fusedloss import functional

each_path = pytest.mark.parametrize("path", [nullcontext, formula_path], ids=["kernel", "formula"])
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def scores(generator: Generator, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=generator).log_softmax(-1).to(dtype)


@each_path
@pytest.mark.parametrize("lengths", ["tensors", "lists", "tuples"])
@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_equals_torch(path: Any, dtype: torch.dtype, lengths: str, generator: Generator) -> None:
    """After log_softmax, where its gradients are right."""
    x = torch.randn(40, 4, 7, dtype=torch.float64, generator=generator)
    targets = torch.randint(1, 7, (4, 9), generator=generator).to(dtype)
    inputs, counts = torch.tensor([40, 30, 0, 19]), torch.tensor([9, 0, 0, 9])
    dense = torch.cat([row[:n] for row, n in zip(targets, counts.tolist(), strict=True)])
    given: tuple[Any, ...] = inputs.to(dtype), counts.to(dtype)
    if lengths != "tensors":
        given = tuple((list if lengths == "lists" else tuple)(t.tolist()) for t in given)
    for labels, reduction in itertools.product((targets, dense), ("none", "mean", "sum")):
        ours, theirs = (sequences.function_of(f, "ctc_loss") for f in (functional, F))
        options = {"reduction": reduction}
        with path():
            found = run(lambda x, f=ours: f(x, labels, *given, **options), (x,), {}, (0,))  # noqa: B023
        want = run(lambda x, f=theirs: f(x, labels, *given, **options), (x,), {}, (0,))  # noqa: B023
        for (_, a), (_, e) in zip(found.named(), want.named(), strict=True):
            assert_close(a, e)


def alignments(path: tuple[int, ...], blank: int) -> list[int]:
    return [c for c, _ in itertools.groupby(path) if c != blank]


@each_path
def test_is_the_sum_over_all_paths(path: Any, generator: Generator) -> None:
    x = scores(generator, 5, 3)
    for blank, count in itertools.product(range(3), range(4)):
        for y in itertools.product([c for c in range(3) if c != blank], repeat=count):
            p, through = 0.0, torch.zeros(5, 3, dtype=torch.float64)
            for way in itertools.product(range(3), repeat=5):
                if alignments(way, blank) == list(y):
                    q = math.exp(sum(x[t, c].item() for t, c in enumerate(way)))
                    p += q
                    through[range(5), way] += q
            labels = torch.tensor(y, dtype=torch.int64), torch.tensor(5), torch.tensor(count)
            with path():
                found = run(
                    lambda x: fusedloss.ctc_loss(x, *labels, blank, "none"),  # noqa: B023
                    (x,),
                    {},
                    (0,),
                )
            assert found.value.item() == pytest.approx(-math.log(p) if p else math.inf)
            assert_close(found.grads[0], -through / p if p else through)


@each_path
@pytest.mark.parametrize("blank", [0, 1, 2])
def test_labels_may_be_the_blank(path: Any, blank: int, generator: Generator) -> None:
    x = scores(generator, 7, 3, 3)
    labels = torch.tensor([[1, 0, 0], [2, 1, 0], [0, 0, 2]]), torch.tensor([7, 6, 7])
    given = *labels, torch.tensor([3, 3, 2])
    with path():
        found = run(lambda x: fusedloss.ctc_loss(x, *given, blank=blank), (x,), {}, (0,))
    want = run(lambda x: sequences.ctc_loss(x, *given, blank=blank), (x,), {}, (0,))
    assert_close(found, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_long_sequences(dtype: torch.dtype, generator: Generator) -> None:
    """Whose states are not kept at a time: the first frames are gone through twice, with the same bits."""
    frames, most = 500, 300  # five times as many frames as are kept
    x = scores(generator, frames, 3, 5, dtype=dtype)
    targets = torch.randint(1, 5, (3, most), generator=generator)
    lengths = torch.tensor([frames, 470, 20]), torch.tensor([most, 150, 4])
    found = run(fusedloss.ctc_loss, (x, targets, *lengths), {"reduction": "none"}, (0,))
    with formula_path():
        want = run(fusedloss.ctc_loss, (x, targets, *lengths), {"reduction": "none"}, (0,))
    assert_close(found.value, want.value)
    assert_close(found.grads, want.grads, rtol=1e-5 if dtype is torch.float32 else 1e-8, atol=1e-12)
    # Of a sequence alone, whose states are all kept.
    short = x[:20, 2:], targets[2:, :4], lengths[0][2:], lengths[1][2:]
    alone = run(fusedloss.ctc_loss, short, {"reduction": "none"}, (0,))
    assert same_bits(found.value[2:], alone.value)
    assert same_bits(found.grads[0][:20, 2:], alone.grads[0])
    assert (found.grads[0][20:, 2] == 0).all()


@each_path
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_without_an_alignment(path: Any, reduction: str, generator: Generator) -> None:
    """Fewer frames than labels and the blanks between equal ones, masked labels, or no frame at all."""
    x = scores(generator, 4, 4, 3)
    x[1, 2] = -math.inf
    given = (
        torch.tensor([[1, 1, 2], [1, 2, 1], [1, 0, 0], [1, 0, 0]]),
        torch.tensor([3, 2, 4, 0]),
        torch.tensor([3, 3, 1, 1]),
    )
    for zero in (False, True):
        options = {"reduction": reduction, "zero_infinity": zero}
        with path():
            found = run(fusedloss.ctc_loss, (x, *given), options, (0,))
        assert (found.value == (0.0 if zero else math.inf)).all()
        assert same_bits(found.grads[0], torch.zeros_like(x))


def test_scores_need_not_be_normalised(generator: Generator) -> None:
    """The gradient is that of differences; PyTorch's is not."""
    x = 3 * torch.randn(6, 2, 4, dtype=torch.float64, generator=generator)
    given = torch.tensor([[1, 2], [3, 3]]), torch.tensor([6, 5]), torch.tensor([2, 2])
    function = lambda x: fusedloss.ctc_loss(x, *given)  # noqa: E731
    assert torch.autograd.gradcheck(function, (x.requires_grad_(),), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, (x,), check_fwd_over_rev=True)


@pytest.mark.parametrize("scale", [1e3, 1e6, 1e20, 1e37])
def test_large_scores(scale: float, generator: Generator) -> None:
    """Nothing over- or underflows: what is far from likely counts where nothing else is left."""
    x = (scale * scores(generator, 9, 2, 4)).float()
    given = torch.tensor([[1, 2], [3, 3]]), torch.tensor([9, 8]), torch.tensor([2, 2])
    found = run(fusedloss.ctc_loss, (x, *given), {}, (0,))
    with formula_path():
        want = run(fusedloss.ctc_loss, (x, *given), {}, (0,))
    assert found.value.isfinite()
    assert_close(found.value, want.value)
    assert found.grads[0].isfinite().all()


def test_mean_of_few_digits_is_a_mean_of_many(generator: Generator) -> None:
    """Half types are rounded once."""
    x = scores(generator, 30, 3, 5)
    given = torch.randint(1, 5, (3, 4), generator=generator), [30, 20, 25], [4, 3, 0]
    for dtype in (torch.bfloat16, torch.float16):
        half = x.to(dtype)
        found, want = (
            run(lambda x: fusedloss.ctc_loss(x, *given), (t,), {}, (0,))
            for t in (half, half.double())
        )
        assert same_bits(found.value, want.value.to(dtype))
        assert_close(found.grads[0], want.grads[0].to(dtype), rtol=2**-7, atol=1e-7)


REFUSED: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "a length beyond the frames": (RuntimeError, r"input_lengths\[1\] must be at most 6.*7", {"inputs": [6, 7]}),
    "a negative length": (RuntimeError, r"input_lengths\[0\] must be at least 0.*-1", {"inputs": [-1, 6]}),
    "more labels than there are": (RuntimeError, r"target_lengths\[0\] must be at most 3.*4", {"counts": [4, 2]}),
    "a negative number of labels": (RuntimeError, r"target_lengths\[1\] must be at least 0", {"counts": [2, -2]}),
    "a blank that is no class": (RuntimeError, r"blank = 5 is out of range for 5 classes", {"blank": 5}),
    "a negative blank": (RuntimeError, r"blank = -1 is out of range", {"blank": -1}),
    "lengths of another number": (RuntimeError, r"input_lengths must be of size batch_size, 2", {"inputs": [6]}),
    "a label that is no class": (
        *(IndexError, r"targets\[1, 0\] = 5 is out of range for 5 classes"),
        {"targets": torch.tensor([[1, 2, 9], [5, 1, 2]])},
    ),
    "a negative label": (
        *(IndexError, r"targets\[3\] = -7 is out of range"),
        {"targets": torch.tensor([1, 2, 3, -7]), "counts": [2, 2]},
    ),
    "labels of another number": (
        *(RuntimeError, r"targets \[3\] must hold the labels of all sequences.* 4"),
        {"targets": torch.tensor([1, 2, 3]), "counts": [2, 2]},
    ),
    "fractional lengths": (RuntimeError, r"input_lengths must be integral", {"inputs": torch.tensor([6.0, 6.0])}),
    "a list beside a tensor": (TypeError, r"'target_lengths' must be list or tuple", {"counts": torch.tensor([2, 2])}),
    "one number for all": (TypeError, r"'input_lengths' must be .*, not int", {"inputs": 6, "counts": 2}),
    "targets in three dimensions": (RuntimeError, r"targets must be \(N, S\)", {"targets": torch.ones(2, 3, 1).long()}),
    "no frames": (RuntimeError, r"log_probs tensor must not be empty", {"x": torch.zeros(0, 2, 5)}),
    "too many dimensions": (RuntimeError, r"log_probs must be \(T, N, C\)", {"x": torch.zeros(1, 6, 2, 5)}),
    "integer scores": (NotImplementedError, r"log_probs must be real floating point", {"x": torch.zeros(6, 2, 5).long()}),
}  # fmt: skip


@each_path
@pytest.mark.parametrize("what", REFUSED)
def test_refuses(path: Any, what: str) -> None:
    """As PyTorch does, but for labels, which it does not look at."""
    kind, words, changed = REFUSED[what]
    given = {"x": torch.zeros(6, 2, 5), "targets": torch.tensor([[1, 2, 9], [3, 1, 2]]), "blank": 0}
    given |= {"inputs": [6, 6], "counts": [2, 2], **changed}
    if isinstance(given["inputs"], Tensor):
        given["counts"] = torch.tensor(given["counts"])
    call = given["x"], given["targets"], given["inputs"], given["counts"], given["blank"]
    with path(), pytest.raises(kind, match=f"^ctc_loss: .*{words}"):
        fusedloss.ctc_loss(*call)
    if kind is not IndexError:
        with pytest.raises(kind):
            F.ctc_loss(*call)


def test_compiled_call_refuses_bad_input() -> None:
    fast = torch.compile(fusedloss.ctc_loss, backend="aot_eager", fullgraph=True)
    x, lengths = torch.zeros(6, 2, 5), (torch.tensor([6, 6]), torch.tensor([1, 1]))
    with pytest.raises(IndexError, match=r"targets\[1, 0\] = 5 is out of range"):
        fast(x, torch.tensor([[1], [5]]), *lengths)
    with pytest.raises(RuntimeError, match=r"input_lengths\[0\] must be at most 6"):
        fast(x, torch.tensor([[1], [2]]), lengths[0] + 1, lengths[1])
