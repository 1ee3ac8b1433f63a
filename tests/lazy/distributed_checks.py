"""Three steps of SGD with a lazy head under DDP and FSDP2 on two processes: test_distributed.py runs this."""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
import warnings
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, init_device_mesh
from torch.nn import functional as F  # noqa: N812
from torch.nn.parallel import DistributedDataParallel

from fusedloss import lazy_heads

WORLD, CLASSES, FEATURES = 2, 101, 16


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(CLASSES, FEATURES)
        self.layer = nn.Linear(FEATURES, FEATURES)
        self.lm_head = nn.Linear(FEATURES, CLASSES)

    def forward(self, tokens: Tensor, labels: Tensor | None = None) -> Any:
        x = self.lm_head(torch.tanh(self.layer(self.embedding(tokens))))
        return x if labels is None else (loss_of(x, labels), x)


def loss_of(x: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(x.view(-1, CLASSES), labels.reshape(-1))


def trained(model: nn.Module, inside: bool, part: slice) -> set[str]:
    """The types of the logits; with the loss `inside` of the model's forward, or after it."""
    optimizer, seen = torch.optim.SGD(model.parameters(), 0.5), set()
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        tokens, labels = (
            torch.randint(CLASSES, (4, 6), generator=generator)[part] for _ in range(2)
        )
        if inside:
            loss, x = model(tokens, labels)
        else:
            x = model(tokens)
            loss = loss_of(x, labels)
        seen.add(type(x).__name__)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return seen


def made() -> Model:
    torch.manual_seed(0)
    return Model().double()


def wrapped(model: Model, kind: str) -> nn.Module:
    if kind.startswith("ddp"):
        return DistributedDataParallel(model, find_unused_parameters=kind == "ddp, unused")
    mesh = init_device_mesh("cpu", (WORLD,))
    again = {"fsdp": None, "fsdp, kept": False, "fsdp, freed": True}[kind]
    if again is not None:
        fully_shard(model.lm_head, mesh=mesh, reshard_after_forward=again)
    return fully_shard(model, mesh=mesh, reshard_after_forward=again)  # type: ignore[return-value]


def check(rank: int, kind: str, inside: bool) -> None:
    expected = made()
    trained(expected, inside, slice(None))
    model = made()
    lazy_heads(model, min_bytes=0)
    seen = trained(wrapped(model, kind), inside, slice(rank, None, WORLD))
    # Where its weight is gone before the loss comes, the head computes at once.
    assert seen == {"Tensor" if kind == "fsdp, freed" else "LazyLogits"}, seen
    for name, parameter in model.named_parameters():
        whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        torch.testing.assert_close(whole, expected.get_parameter(name), rtol=0, atol=1e-12)


KINDS = ("ddp", "ddp, unused", "fsdp", "fsdp, kept", "fsdp, freed")


def rank_of(rank: int, store: str) -> None:
    timeout = timedelta(seconds=20)
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, WORLD), rank=rank, world_size=WORLD, timeout=timeout
    )
    for kind in KINDS:
        for inside in (True, False):
            try:
                check(rank, kind, inside)
            except Exception:
                print(f"{kind}, loss inside: {inside}\n{traceback.format_exc()}", flush=True)
                os._exit(1)
    os._exit(0)


def main() -> int:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        ranks = []
        for rank in range(WORLD):
            if not (pid := os.fork()):
                rank_of(rank, f"{folder}/store")
            ranks.append(pid)
        return max(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in ranks)


if __name__ == "__main__":
    sys.exit(main())
