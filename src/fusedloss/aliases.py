"""The submodules of `torch.nn` under the names of `fusedloss.nn`: the same objects, not second copies.

A second copy's `Parameter` is none to `torch.nn.Module`. So each name is found here, before importlib
looks into PyTorch's folder, and leads to the module that `torch.nn` itself has.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Iterable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

OURS, THEIRS = "fusedloss.nn", "torch.nn"


def namesake(name: str) -> str:
    return THEIRS + name.removeprefix(OURS)


class Finder:
    """Finds `fusedloss.nn.x` wherever there is a `torch.nn.x`, and loads it as that."""

    @classmethod
    def find_spec(
        cls, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not name.startswith(f"{OURS}."):
            return None
        theirs = namesake(name)
        if theirs in sys.modules:
            return ModuleSpec(name, cls)  # type: ignore[arg-type]
        found = importlib.util.find_spec(theirs)
        return found and ModuleSpec(name, cls, origin=found.origin)  # type: ignore[arg-type]

    @staticmethod
    def create_module(spec: ModuleSpec) -> ModuleType:
        """What stands in until `exec_module`: importlib writes the spec into what it is given."""
        stand_in = ModuleType(spec.name)
        theirs = importlib.import_module(namesake(spec.name))
        vars(stand_in)["__getattr__"] = functools.partial(getattr, theirs)
        return stand_in

    @staticmethod
    def exec_module(stand_in: ModuleType) -> None:
        ours = stand_in.__name__
        theirs = namesake(ours)
        for name, module in list(sys.modules.items()):
            # Found there, importlib sets no attribute: in torch.nn.utils a function has its file's name.
            if name.startswith(f"{theirs}.") and not _loading(module):
                sys.modules.setdefault(ours + name.removeprefix(theirs), module)
        sys.modules[ours] = sys.modules[theirs]


def _loading(module: ModuleType) -> bool:
    return getattr(getattr(module, "__spec__", None), "_initializing", False)


def install() -> None:
    if Finder not in sys.meta_path:
        sys.meta_path.insert(0, Finder)


def public(theirs: ModuleType, own: Iterable[str]) -> list[str]:
    """What a star import takes: all of theirs, and our own."""
    every = getattr(theirs, "__all__", None) or [n for n in dir(theirs) if not n.startswith("_")]
    return sorted({*every, *own})
