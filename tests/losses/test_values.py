"""Five results to four decimals, from tensors as printed."""

from __future__ import annotations

import pytest
import torch

from fusedloss import nn

MSE_INPUT = [
    [0.8964, 1.6948, 0.5003, 0.6851, -0.7712],
    [-0.7480, -0.1916, 0.4495, -1.2375, -0.7038],
    [-1.5244, 0.2029, -0.7153, -1.4792, 1.1071],
]
MSE_TARGET = [
    [-1.2733, 0.2253, 0.1926, -1.1926, 0.5637],
    [-0.9189, 2.7922, 0.2730, 0.6243, -1.2396],
    [1.2193, -0.6027, -0.1948, 0.5456, -0.3350],
]
LOGITS = [
    [-1.3169, 0.6902, -0.3976, -0.1056, 1.6268],
    [-0.1469, -0.8665, -0.7510, -0.5994, 0.0559],
    [-0.5486, -0.6443, -0.1930, 0.7109, 0.0054],
]
ANCHOR = [[0.2258, -0.6545, -1.5043], [1.0083, 0.6198, -0.1240]]
POSITIVE = [[1.8021, 1.9506, -0.6078], [-0.1537, -0.2082, -0.6502]]
NEGATIVE = [[-0.9203, 0.4674, -0.6659], [-1.3081, -1.0276, 0.9357]]


@pytest.mark.parametrize(
    ("loss", "arguments", "expected"),
    [
        pytest.param(nn.MSELoss(), (MSE_INPUT, MSE_TARGET), 2.6409, id="MSELoss"),
        pytest.param(
            nn.BCELoss(), ([0.2943, 0.4337, 0.3497], [0.0, 1.0, 1.0]), 0.7449, id="BCELoss"
        ),
        pytest.param(
            nn.BCEWithLogitsLoss(),
            ([0.1406, 0.4081, 1.5632], [1.0, 1.0, 0.0]),
            0.9628,
            id="BCEWithLogitsLoss",
        ),
        pytest.param(nn.CrossEntropyLoss(), (LOGITS, [2, 3, 4]), 1.9986, id="CrossEntropyLoss"),
        pytest.param(
            nn.TripletMarginLoss(margin=1.0, p=2),
            (ANCHOR, POSITIVE, NEGATIVE),
            1.1822,
            id="TripletMarginLoss",
        ),
    ],
)
def test_value(loss: nn.Module, arguments: tuple[list, ...], expected: float) -> None:
    first, *rest = (torch.tensor(a) for a in arguments)
    first.requires_grad_()
    value = loss(first, *rest)
    value.backward()
    assert f"{value.item():.4f}" == f"{expected:.4f}"
    assert first.grad is not None and first.grad.isfinite().all() and first.grad.any()
