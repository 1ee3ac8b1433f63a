"""What only a GPU shows, and where its kernels count in 64 bits; test_gpu.py runs this file."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
import triton.language as tl
from conftest import (
    DEVICE,
    GPU,
    Case,
    name_of,
    no_head,
    parameters,
    run,
    same_bits,
)
from torch import Generator, Tensor

import fusedloss
from fusedloss import functional
from fusedloss.engines.gpu import (
    pointwise,
)

assert GPU, "test_gpu.py runs this file"


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    yield
    fusedloss.synchronize()


on_gpu = pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
each_loss = parameters(lambda case: no_head(case) and case.option == next(iter(case.loss.options)))


@on_gpu
@pytest.mark.filterwarnings("ignore:.*ynchronization debug mode")
@each_loss
def test_no_call_waits_for_the_gpu(case: Case, generator: Generator) -> None:
    tensors, options = case.example((64, 33), torch.float32, generator)
    run(case.loss.function, tensors, options)
    inputs = tuple(
        t.detach().requires_grad_(k in case.loss.differentiable) for k, t in enumerate(tensors)
    )
    one = torch.ones((), device=DEVICE)
    torch.cuda.set_sync_debug_mode("error")
    try:
        case.loss.function(*inputs, **options).backward(one)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_gpu
@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream")  # its leaves met another
@each_loss
def test_a_captured_graph_replays(case: Case, generator: Generator) -> None:
    tensors, options = case.example((64, 33), torch.float32, generator)
    inputs = tuple(
        t.detach().requires_grad_(k in case.loss.differentiable) for k, t in enumerate(tensors)
    )
    moving = [t for t in inputs if t.requires_grad]

    def step() -> tuple[Tensor, ...]:
        value = case.loss.function(*inputs, **options)
        return (value, *torch.autograd.grad(value, moving))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        moving[0].mul_(0.5)
    graph.replay()
    torch.cuda.synchronize()
    assert all(map(same_bits, captured, step()))


@on_gpu
@pytest.mark.filterwarnings("ignore")  # of Inductor's, about the precision of matrix products
@each_loss
def test_compiles_whole(case: Case, generator: Generator) -> None:
    tensors, options = case.example((64, 33), torch.float32, generator)
    function = torch.compile(case.loss.function, fullgraph=True)
    found = run(function, tensors, options, case.loss.differentiable)
    expected = run(case.loss.function, tensors, options, case.loss.differentiable)
    for (_, a), (_, e) in zip(found.named(), expected.named(), strict=True):
        torch.testing.assert_close(a, e)


@on_gpu
@pytest.mark.parametrize("shape", [(70000, 32768), (3, 5, 2**28)], ids=str)
def test_rows_of_more_elements_than_31_bits_count(shape: tuple[int, ...]) -> None:
    enough_memory(5 * math.prod(shape))
    x = torch.zeros(shape, dtype=torch.bfloat16, device=DEVICE).requires_grad_()
    y = torch.full(shape[:1] + shape[2:], shape[1] - 1, device=DEVICE)
    value = functional.cross_entropy(x, y, reduction="sum")
    (grad,) = torch.autograd.grad(value, x)
    assert value.item() == pytest.approx(y.numel() * math.log(shape[1]), rel=1e-2)
    last = grad[-1].reshape(shape[1], -1)[:, -1]
    torch.testing.assert_close(last[-1].item(), 1 / shape[1] - 1, rtol=1e-2, atol=0)


@on_gpu
@pytest.mark.parametrize("broadcast", [False, True])
def test_more_elements_than_31_bits_count(broadcast: bool) -> None:
    shape = (2**16 + 3, 2**15 + 1)
    enough_memory(8 * math.prod(shape))
    x = torch.zeros(shape, dtype=torch.bfloat16, device=DEVICE).requires_grad_()
    row = torch.arange(shape[1], device=DEVICE).remainder(2).to(x.dtype)
    t = row.expand(shape) if broadcast else row.expand(shape).contiguous()
    value = functional.mse_loss(x, t, reduction="sum")
    (grad,) = torch.autograd.grad(value, x)
    assert value.item() == pytest.approx(shape[0] * (shape[1] // 2), rel=1e-2)
    assert same_bits(grad[-1], -2 * row) and same_bits(grad[0], -2 * row)


def enough_memory(size: int) -> None:
    if torch.cuda.mem_get_info()[0] < size:
        pytest.skip("not enough memory")


def test_positions_beyond_31_bits_are_64_bit_wide() -> None:
    """Where a small tensor is broadcast to a huge shape, its own strides are not what counts."""
    assert pointwise._index_type([2**16, 2**15], [(), (0, 1)]) is tl.int64
    assert pointwise._index_type([2**10, 2**10], [(2**22, 1)]) is tl.int64
    assert pointwise._index_type([2**10, 2**10], [(2**10, 1)]) is tl.int32
    assert pointwise._index_type([], [(), ()]) is tl.int32


@on_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
@each_loss
def test_autocast_gives_float32(case: Case, dtype: torch.dtype, generator: Generator) -> None:
    tensors, options = case.example((8, 5), dtype, generator)
    with torch.autocast("cuda", dtype):
        assert case.loss.function(*tensors, **options).dtype is torch.float32


@on_gpu
def test_mixed_devices_are_refused() -> None:
    x = torch.zeros(3, device=DEVICE)
    with pytest.raises(RuntimeError, match="target is on cpu, input on cuda"):
        functional.mse_loss(x, torch.zeros(3))
