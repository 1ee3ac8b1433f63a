"""What the CPU's engines share: a plan is packed into the arguments of a kernel."""

from __future__ import annotations

import struct
from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar, NoReturn

import torch
from torch import Tensor

from ...kinds import Call
from ..abi import Pointers
from ..again import common
from ..plan import Slot
from ..protocol import Engine, P
from .again import AgainOnCpu, Launch, present
from .load import NUMBERS, library, run

LACKING = ("weight", "absent")  # arguments that a call may be repeated without


class CpuEngine(Engine[P]):
    pointers: ClassVar[Pointers]

    @abstractmethod
    def pack(self, plan: P) -> tuple[str, str, bytes, int]:
        """The kernel, the loss, the arguments, and how many elements there are; `plan` keeps them alive."""

    def refuse(self, plan: P, position: int) -> NoReturn:
        """Raises for the first position where the kernel found an input wrong."""
        raise NotImplementedError

    def launch(self, plan: P) -> None:
        found = run(*self.pack(plan))
        if found >= 0:
            self.refuse(plan, found)

    def prepare(
        self, call: Call, tensors: tuple[Slot, ...], needed: Sequence[bool], stores: bool
    ) -> AgainOnCpu | None:
        """How to repeat this call, if that can be: one without weights."""
        inputs = [t for t in tensors if t is not None]
        places, learned = self.pointers, sum(needed)
        if len(inputs) != sum(name not in LACKING for name in call.arguments):
            return None

        def launch(plan: P, place: int, output: Tensor) -> Launch | None:
            kernel, _, arguments, elements = self.pack(plan)
            words = struct.unpack(f"={len(arguments) // 8}q", arguments)
            grads = present(plan.grads)
            if any(g.shape != t.shape for g, t in zip(grads, inputs, strict=False)):
                return None  # it is summed over what was broadcast
            given = (*inputs, output, *grads)
            at = (*places.inputs[: len(inputs)], place, *places.grads)[: len(given)]
            if any(words[k] != t.data_ptr() for k, t in zip(at, given, strict=True)):
                return None  # the kernel was given a copy
            head = (NUMBERS[kernel], len(words), len(at), *at)
            packed = struct.pack(f"={len(head)}q", *head) + arguments
            pack = struct.Struct(f"={len(at)}q").pack
            return Launch(library(elements).fusedloss_again, packed, pack)

        stored = learned if stores else 0
        plan = self.plan(call, tensors, needed if stored else ())
        plan.total = result = inputs[0].new_empty((), dtype=call.dtype)
        forward, backward = launch(plan, places.total, result), None
        if learned and not stored:
            arriving = torch.ones_like(result)
            plan = self.plan(call, tensors, needed)
            plan.arrives(arriving)
            backward = launch(plan, places.incoming, arriving)
        if forward is None or (learned and not stored and backward is None):
            return None
        known = common(call, inputs, len(tensors), learned, stored, result)
        return AgainOnCpu(engine=self, launch=forward, launch_backward=backward, **known)
