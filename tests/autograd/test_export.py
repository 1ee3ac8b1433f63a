"""Exporters under `fusedloss.patch()`: what is exported computes our losses, by operators of torch alone."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from conftest import CASES, Options, Tensors, no_head
from torch import Generator, Tensor
from torch.testing import assert_close

import fusedloss

pytestmark = pytest.mark.filterwarnings("ignore")  # exporters warn of themselves, and of onnxscript


@pytest.fixture(autouse=True)
def _patched() -> Iterator[None]:
    with fusedloss.patched():
        yield


class Losses(torch.nn.Module):
    """PyTorch's functions, each of its own inputs times a parameter, as in a model that returns its loss."""

    def __init__(self, generator: Generator) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))
        self.calls: list[tuple[Callable[..., Tensor], Options, int]] = []
        self.tensors: Tensors = ()
        for case in {
            case.loss.key: case for case in CASES if no_head(case)
        }.values():  # the last option of each
            tensors, options = case.example((4, 5), torch.float32, generator)
            self.add(case.loss.reference, tensors, options)
            self.add(case.loss.reference, tensors, {**options, "reduction": "none"})
        index = torch.tensor([0, 4, 2])
        far = torch.tensor([[90.0, 0, -90, 20, -20], [-20, -20, 30, 0, 0], [0, 60, 1, 2, 3]])
        sure = (far > 0).float()
        # Where torch's own exports lose smoothing, overflow, or give NaN.
        self.add(F.cross_entropy, (far, index), {"label_smoothing": 0.3})
        self.add(F.binary_cross_entropy_with_logits, (far, sure), {"reduction": "none"})
        self.add(F.kl_div, (torch.tensor([0.0, -torch.inf]), torch.tensor([1.0, 0.0])), {})
        if hasattr(F, "linear_cross_entropy"):
            weight = torch.randn(7, 5, generator=generator)
            self.add(F.linear_cross_entropy, (far, weight, index), {"label_smoothing": 0.1})

    def add(self, function: Callable[..., Tensor], tensors: Tensors, options: Options) -> None:
        self.calls.append((function, options, len(tensors)))
        self.tensors += tensors

    def forward(self, *tensors: Tensor) -> list[Tensor]:
        found, given = [], iter(tensors)
        for function, options, count in self.calls:
            first, *rest = (next(given) for _ in range(count))
            found.append(function(first * self.scale, *rest, **options))
        return found


@pytest.fixture
def model(generator: Generator) -> Losses:
    return Losses(generator)


def check(found: Any, model: Losses, rtol: float = 1.3e-6) -> None:
    expected = model(*model.tensors)
    for (function, options, _), a, e in zip(model.calls, found, expected, strict=True):
        assert_close(
            torch.as_tensor(a),
            e.detach(),
            rtol=rtol,
            atol=1e-5,
            msg=lambda m, f=function, o=options: f"{f} {o} {m}",
        )
    assert expected[-1].isfinite().all() and not any(e.isnan().any() for e in expected)


@pytest.mark.parametrize("strict", [False, True], ids=["traced", "strict"])
def test_export(strict: bool, model: Losses) -> None:
    program = torch.export.export(model, model.tensors, strict=strict)
    for part in program.graph_module.modules():
        for node in part.graph.nodes if isinstance(part, torch.fx.GraphModule) else ():
            assert getattr(node.target, "namespace", "") != "fusedloss", node.target
    check(program.module()(*model.tensors), model)
    fusedloss.unpatch()
    found = program.module()(*model.tensors)
    with fusedloss.patched():
        check(found, model)


def in_onnxruntime(model: Any, tensors: Tensors) -> list[Any]:
    session = pytest.importorskip("onnxruntime").InferenceSession(model)
    names = [given.name for given in session.get_inputs()]
    kept: list[Any] = session.run(
        None, {name: tensors[int(name.removeprefix("tensors_"))].numpy() for name in names}
    )
    return kept


@pytest.mark.slow
@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "TorchScript"])
def test_onnx(dynamo: bool, model: Losses) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    names = [f"tensors_{k}" for k in range(len(model.tensors))]
    file = io.BytesIO()
    program = torch.onnx.export(
        model, model.tensors, file, dynamo=dynamo, input_names=names, verbose=False
    )
    if program is not None:
        file = io.BytesIO(program.model_proto.SerializeToString())
    # onnxruntime rounds exp and log otherwise.
    check(in_onnxruntime(file.getvalue(), model.tensors), model, rtol=1e-5)
