"""What the CPU's engines share: a plan is packed into the arguments of a kernel."""

from __future__ import annotations

import struct
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, NoReturn

from torch import Tensor

from ...core import torch_state
from ...kinds import Call
from ..abi import Pointers
from ..again import common
from ..plan import Slot, Slots
from ..protocol import Engine, P
from .again import AgainOnCpu, Launch, Values, launch, launch_of_values, present
from .load import NUMBERS, repeater, run

_storage = torch_state.storage


class CpuEngine(Engine[P]):
    pointers: ClassVar[Pointers | None] = None  # None: what is packed depends on values
    # Where arguments hold what a mean is over; and 1 over it.
    divisors: ClassVar[tuple[int, ...]] = ()

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

    def places(self, call: Call) -> tuple[int, ...]:
        """Where arguments hold the pointers of the tensors that there are."""
        assert self.pointers is not None
        return self.pointers.inputs

    def prepare(
        self,
        call: Call,
        tensors: tuple[Slot, ...],
        needed: Sequence[bool],
        stores: bool,
        over: bool = False,
    ) -> AgainOnCpu | None:
        """How to repeat this call, if that can be: the kernel reads and writes the tensors themselves."""
        if self.pointers is None or (over and not self.divisors):
            return None
        inputs = [t for t in tensors if t is not None]
        plan = self.plan(call, tensors, needed if stores else ())
        result, place = plan.result(), self.pointers.total
        if plan.losses is not None:
            place = self.pointers.losses
        launch = self.keep(plan, [], [*self.gradients(plan), (place, result)], over)
        if launch is None:
            return None
        learning = [t for t, need in zip(tensors, needed, strict=False) if need and t is not None]
        summed = any(plan.gradient(t).shape != t.shape for t in learning)
        shapes = tuple(t.shape for t in learning) if summed else None
        return AgainOnCpu(
            engine=self,
            forward=launch,
            **common(call, inputs, len(tensors), needed, stores, result, shapes),
        )

    def keep_backward(
        self,
        call: Call,
        tensors: Slots,
        needed: Sequence[bool],
        incoming: Tensor,
        over: bool = False,
    ) -> Launch | None:
        """The launch that computes the gradients for what arrives, if it can be kept."""
        assert self.pointers is not None
        plan = self.plan(call, tensors, needed)
        plan.arrives(incoming)
        return self.keep(plan, [(self.pointers.incoming, incoming)], self.gradients(plan), over)

    def gradients(self, plan: P) -> list[tuple[int, Tensor]]:
        """Where arguments hold their pointers, and they."""
        assert self.pointers is not None
        pairs = zip(self.pointers.grads, plan.grads, strict=False)
        return [(place, grad) for place, grad in pairs if grad is not None]

    def keep(
        self,
        plan: P,
        given: list[tuple[int, Tensor]],
        made: list[tuple[int, Tensor]],
        over: bool = False,
    ) -> Launch | None:
        """The launch of a plan but for pointers: of its tensors, of what else is `given` and what is `made`.

        And but for what a mean is `over`.
        """
        kernel, _, arguments, elements = self.pack(plan)
        words = struct.unpack(f"={len(arguments) // 8}q", arguments)
        read = present(plan.read())
        pairs = [*zip(self.places(plan.call), read, strict=False), *given, *made]
        if any(words[place] != t.data_ptr() for place, t in pairs):
            return None  # a copy of what arrives
        written = tuple((tuple(t.shape), t.stride(), t.dtype) for _, t in made)
        places, call = [place for place, _ in pairs], plan.call
        divisors = self.divisors if over or call.counts else ()
        head = (NUMBERS[kernel], len(words), len(pairs) + len(divisors), *places, *divisors)
        packed = struct.pack(f"={len(head)}q", *head) + arguments
        pack = struct.Struct(f"={len(pairs)}q{len(divisors)}d").pack
        run, inputs = repeater(elements), present(plan.tensors)
        itself = all(a.data_ptr() == b.data_ptr() for a, b in zip(read, inputs, strict=True))
        if itself and not divisors:
            return launch(run, packed, pack, written)
        absent, count, whole = (None,) * (len(plan.tensors) - len(inputs)), len(inputs), plan.shape

        def values(tensors: Sequence[Tensor], number: float) -> Values:
            quotients = (number, 1.0 / number)[: len(divisors)] if over else ()
            if itself and over:
                return tensors, quotients
            if not all(map(_storage, tensors)):
                return None  # torch's operations would read them, and end the process
            given, rest = (*tensors[:count], *absent), tensors[count:]
            copies = present(self.plan(call, given, ()).read())
            if divisors and not over:
                quotients = self.quotients(call, given, whole.numel())
            return (*copies, *rest), quotients

        return launch_of_values(run, packed, pack, written, values, over)

    def quotients(self, call: Any, tensors: Slots, numel: int) -> tuple[float, float]:
        """What arguments hold of a divisor that depends on values: it, and 1 over it."""
        raise NotImplementedError
