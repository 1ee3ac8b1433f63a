"""Loads the kernel library that was built for this CPU's capability, by torch's own word for it."""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ...core import errors, torch_state
from .. import abi

DTYPES = {getattr(torch, name): number for number, name in enumerate(abi.DTYPES)}
NUMBERS = {name: number for number, name in enumerate(abi.KERNELS)}
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# After one 512-bit addition an Intel core runs slower for microseconds, which is what a small loss takes: up to
# so many elements, kernels of half that width run, which give the same bits.
SMALL = 4096
MANY = SMALL + 1


def capability() -> str:
    """`default`, `avx2` or `avx512`; set ATEN_CPU_CAPABILITY before importing torch to force it."""
    name = torch.backends.cpu.get_cpu_capability().lower()
    return name if name in ("avx2", "avx512") else "default"


def path(small: bool = False) -> Path:
    # An editable install has two folders: the sources and the built files.
    folders = sys.modules[__name__.rpartition(".")[0]].__path__
    narrow = "_narrow" if small and capability() == "avx512" else ""
    name = f"libfusedloss_{capability()}{narrow}.so"
    found = [Path(folder) / "lib" / name for folder in folders]
    return next((p for p in found if p.exists()), found[0])


@functools.cache
def _load(small: bool = False) -> tuple[ctypes.CDLL | None, str | None, str | None]:
    """The library, why there is none, and why it runs on one thread (if it does)."""
    try:
        lib = ctypes.CDLL(str(path(small)))
    except OSError as error:
        at = path(small)
        return (
            None,
            f"cannot load {at}: {error}" if at.exists() else f"not built: there is no {at}",
            None,
        )
    lib.fusedloss_run.argtypes = [ctypes.c_int64, ctypes.c_char_p]
    lib.fusedloss_run.restype = ctypes.c_int64
    for names in (lib.fusedloss_formula, lib.fusedloss_reduction):
        names.argtypes, names.restype = [ctypes.c_int64], ctypes.c_char_p
    lib.fusedloss_again.argtypes = [ctypes.c_char_p, ctypes.c_char_p]
    lib.fusedloss_again.restype = ctypes.c_int64
    lib.fusedloss_set_parallel_for.argtypes = [ctypes.c_void_p]
    lib.fusedloss_advise_huge_pages.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    return lib, None, _share_threads(lib)


def _share_threads(lib: ctypes.CDLL) -> str | None:
    """Hands torch's own pool to the library, so that torch.set_num_threads holds for it too."""
    folder = Path(torch.__file__).parent / "lib"
    names = ("libtorch_cpu.so", "libtorch_cpu.dylib")
    try:
        torch_cpu = ctypes.CDLL(str(next(folder / n for n in names if (folder / n).exists())))
        function = torch_cpu.torch_parallel_for
    except (OSError, StopIteration, AttributeError):
        return f"torch {torch.__version__} does not export torch_parallel_for (it came with 2.10)"
    lib.fusedloss_set_parallel_for(ctypes.cast(function, ctypes.c_void_p))
    return None


def library(elements: int = MANY) -> ctypes.CDLL:
    """The kernels for inputs of so many elements."""
    lib, why, _ = _load(elements <= SMALL)
    if lib is None:
        raise RuntimeError(f"fusedloss: {why}")
    return lib


@functools.cache
def _runner(small: bool) -> Callable[[int, bytes], int]:
    found: Callable[[int, bytes], int] = library(SMALL if small else MANY).fusedloss_run
    return found


@functools.cache
def _repeater(small: bool) -> Callable[[bytes, bytes], int]:
    found: Any = library().fusedloss_again
    if small:  # few elements are done sooner than the interpreter's lock changes hands
        found = ctypes.PyDLL(str(path(True))).fusedloss_again
        found.argtypes, found.restype = [ctypes.c_char_p, ctypes.c_char_p], ctypes.c_int64
    return found


def repeater(elements: int) -> Callable[[bytes, bytes], int]:
    """Runs calls like an earlier one, of so many elements."""
    return _repeater(elements <= SMALL)


def run(kernel: str, loss: str, arguments: bytes, elements: int = MANY) -> int:
    """What the kernel returns. RuntimeError where it finds no memory."""
    found = _runner(elements <= SMALL)(NUMBERS[kernel], arguments)
    if found == abi.NO_MEMORY:
        errors.fail(RuntimeError, loss, "can't allocate memory for the kernel")
    return found


def address(loss: str, name: str, tensor: torch.Tensor) -> int:
    """Where the tensor's elements are. Null stands for an absent one, and never for this."""
    found = tensor.data_ptr()
    if not found and tensor.numel():
        errors.fail(RuntimeError, loss, f"{name} {list(tensor.shape)} has no memory to read")
    return found


def array(loss: str, name: str, tensor: torch.Tensor) -> tuple[int, int]:
    """Pointer and dtype, as kernels take them."""
    return tensor.data_ptr() or address(loss, name, tensor), DTYPES[tensor.dtype]


def matrix(
    loss: str, name: str, tensor: torch.Tensor | None, rows: int, columns: int
) -> tuple[int, ...]:
    """The same with the strides of the tensor as so many rows."""
    if tensor is None:
        return abi.MATRIX.absent
    if tensor.dim() != 2:
        tensor = tensor.reshape(rows, columns)
    return (*array(loss, name, tensor), *tensor.stride())


@torch_state.constant
def problem() -> str | None:
    """Why there are no CPU kernels, or None."""
    return _load()[1]


def one_thread() -> str | None:
    """Why the kernels run on one thread, or None."""
    return _load()[2]


def _numbered(names: Callable[[int], bytes | None]) -> dict[str, int]:
    """The numbers that a library gives, by name."""
    numbers: dict[str, int] = {}
    while name := names(len(numbers)):
        numbers[name.decode()] = len(numbers)
    return numbers


@functools.cache
def formula_numbers() -> dict[str, int]:
    """The number of each pointwise kernel in the library, by the name of its formula."""
    return _numbered(library().fusedloss_formula)


@functools.cache
def reduction_numbers() -> dict[str, int]:
    """The number of each loss of rows in the library, by the name of its definition."""
    return _numbered(library().fusedloss_reduction)
