"""Compiles what calls would launch, for GPUs that need not be there.

`python tests/engines/gpu_kernels.py [sm_90 ...]` compiles every specialisation of the table, which takes long.
"""

from __future__ import annotations

import itertools
import random
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from fusedloss import engines
from fusedloss.engines.gpu import launch, linear
from fusedloss.front.definition import REGISTRY
from fusedloss.kinds.heads import LinearCall, Rows

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
POINTERS = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int16: "*i16",
    torch.int8: "*i8",
    torch.uint8: "*u8",
}


@dataclass(frozen=True)
class Specialisation:
    """A kernel with the types and the constants of one launch."""

    kernel: Any
    signature: tuple[tuple[str, Any], ...]
    constants: tuple[tuple[tuple[int, ...], Any], ...]
    aligned: tuple[tuple[int, ...], ...]
    warps: int

    def __str__(self) -> str:
        constants = ", ".join(
            f"{name} = {getattr(value, '__name__', value)}"
            for (k, *rest), value in self.constants
            if not rest and value is not None and (name := self.kernel.arg_names[k]).isupper()
        )
        types = ", ".join(f"{n}: {t}" for n, t in self.signature if str(t).startswith("*"))
        return f"{self.kernel.__name__}({types}; {constants}; {self.warps} warps)"


def specialise(kernel: Any, arguments: dict[str, Any]) -> Specialisation:
    """As Triton does at a launch."""
    constants: list[tuple[tuple[int, ...], Any]] = []
    aligned: list[tuple[int, ...]] = []

    def visit(value: Any, path: tuple[int, ...], name: str, fixed: bool, plain: bool) -> Any:
        if isinstance(value, tuple) and not fixed:
            return tuple(visit(v, (*path, k), name, fixed, plain) for k, v in enumerate(value))
        if fixed or value is None or (isinstance(value, int) and value == 1 and not plain):
            constants.append((path, value))
            return "constexpr"
        if isinstance(value, torch.Tensor):
            aligned.append(path)
            return POINTERS[value.dtype]
        if isinstance(value, float):
            return "fp64"
        if value % 16 == 0 and not plain:
            aligned.append(path)
        return "i32" if -(2**31) <= value < 2**31 else "i64"

    signature = []
    for k, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        plain = bool(parameter.do_not_specialize)
        found = visit(value, (k,), parameter.name, parameter.is_constexpr, plain)
        signature.append((parameter.name, found))
    return Specialisation(
        kernel, tuple(signature), tuple(constants), tuple(aligned), arguments["num_warps"]
    )


@contextmanager
def recorded() -> Iterator[dict[Specialisation, None]]:
    """Inside, calls with CPU tensors launch nothing, and what they would is gathered."""
    found: dict[Specialisation, None] = {}

    def note(kernel: Any, programs: int, arguments: dict[str, Any]) -> None:
        assert programs > 0
        found[specialise(kernel, arguments)] = None

    original, launch.run = launch.run, note
    try:
        with engines.interpreted():
            yield found
    finally:
        launch.run = original


@dataclass(frozen=True)
class Compiled:
    binary: bytes
    assembly: str
    registers: int
    spills: int  # accesses to local memory, which holds what the registers do not
    shared: int  # bytes

    def __str__(self) -> str:
        return f"{self.registers} registers, {self.spills} spills, {self.shared} B shared"


def compiled(what: Specialisation, target: GPUTarget) -> Compiled:
    source = triton.compiler.ASTSource(
        what.kernel,
        signature=dict(what.signature),
        constexprs=dict(what.constants),
        attrs={path: [["tt.divisibility", 16]] for path in what.aligned},
    )
    options = {"num_warps": what.warps, "enable_fp_fusion": True}
    kernel = triton.compile(source, target=target, options=options)
    if target.backend == "hip":
        text = kernel.asm["amdgcn"]
        registers, spills = (
            int(re.findall(rf"\.{key}:\s+(\d+)", text)[0])
            for key in ("vgpr_count", "vgpr_spill_count")
        )
        return Compiled(kernel.asm["hsaco"], text, registers, spills, kernel.metadata.shared)
    binary = kernel.asm["cubin"]
    usage = cuobjdump(binary, "--dump-resource-usage")
    registers, stack = (int(re.findall(rf"{key}:(\d+)", usage)[0]) for key in ("REG", "STACK"))
    spills = len(re.findall(r"\b(?:STL|LDL)\b", cuobjdump(binary, "-sass"))) if stack else 0
    return Compiled(binary, kernel.asm["ptx"], registers, spills, kernel.metadata.shared)


def cuobjdump(binary: bytes, option: str) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        done = subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True)
    return done.stdout


@dataclass(frozen=True)
class Call:
    """A loss at a shape; a hot one is among those that training spends its time in."""

    loss: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    option: str = ""
    reduction: str = "mean"
    hot: bool = False

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape))
        dtype = str(self.dtype).removeprefix("torch.")
        return " ".join(filter(None, (self.loss, self.option, dtype, shape, self.reduction)))

    def forward(self) -> torch.Tensor:
        """The tensors are not filled: the pages of large ones are never touched."""
        row = REGISTRY[self.loss]
        generator = torch.Generator().manual_seed(0)
        if row.kind == "sequences":  # whose lengths are read
            tensors = list(row.example(self.shape, self.dtype, generator))
        else:
            small = row.example((3, 4, 2)[: len(self.shape)], self.dtype, generator)
            sizes = {3: self.shape[0], 4: self.shape[1], 2: self.shape[2:]}
            shapes = ([n for s in t.shape for n in flat(sizes[s])] for t in small)
            tensors = [torch.empty(s, dtype=t.dtype) for s, t in zip(shapes, small, strict=True)]
        for k in row.differentiable:
            tensors[k].requires_grad_()
        options = row.options[self.option or next(iter(row.options))](tuple(tensors), generator)
        return row.function(*tensors, **options, reduction=self.reduction)

    def both(self) -> None:
        value = self.forward()
        value.backward(torch.empty_like(value))


STEPS: dict[str, dict[str, Any]] = {
    "plain": {},
    "all": {"smoothing": 0.1, "softcap": 30.0, "z_loss": 1e-4, "logit_scale": 0.5},
    "statistics": {"statistics": True},
}


@dataclass(frozen=True)
class Step:
    """The row step of linear losses over a chunk of logits."""

    shape: tuple[int, int]
    dtype: torch.dtype
    option: str = "plain"
    hot: bool = False

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape))
        return f"linear {self.option} {str(self.dtype).removeprefix('torch.')} {shape}"

    def forward(self) -> None:
        """With the gradient; `both` adds the step without it, of a forward alone."""
        self._run(True)

    def both(self) -> None:
        self._run(True)
        self._run(False)

    def _run(self, differentiate: bool) -> None:
        settings = {"smoothing": 0.0, "z_loss": 0.0, "softcap": 0.0, "logit_scale": 1.0}
        settings = {**settings, "statistics": False, **STEPS[self.option]}
        logits, compute = torch.empty(self.shape, dtype=self.dtype), wide_dtype(self.dtype)
        call = LinearCall(
            "linear_cross_entropy", False, "none", -100, **settings,
            memory_budget=0, chunk_rows=0, exact_logits=False, dtype=compute,
        )  # fmt: skip
        one = torch.empty(self.shape[0], dtype=compute)
        many = Rows(one, one, one, one) if call.statistics else Rows(one)
        incoming = Rows(one, one, one) if call.statistics else Rows(one)
        target = torch.empty(self.shape[0], 1, dtype=torch.int64)
        weight = torch.empty(self.shape[1], dtype=compute) if self.option == "all" else None
        given = incoming if differentiate else None
        linear.step(call, logits, target[:, 0], weight, many, given, 0, target.shape)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


def flat(sizes: int | tuple[int, ...]) -> tuple[int, ...]:
    return (sizes,) if isinstance(sizes, int) else sizes


BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
LOGITS = "binary_cross_entropy_with_logits"
CE, SOFT = "cross_entropy", "cross_entropy[probabilities]"
FOCAL = "softmax_focal_loss"
DICE = [key for key, row in REGISTRY.items() if row.kind == "dice"]
WIDE, VOCABULARY, LARGEST = (4096, 1024), (4096, 32768), (1024, 128256)
PIXELS, MANY = (4, 21, 256, 256), (4, 1000, 32, 32)

CALLS: list[Call | Step] = [
    *(Call(f, (4096, 4096), F32, hot=True) for f in ("mse_loss", "kl_div")),
    *(Call(f, (4096, 4096), BF16, hot=True) for f in ("binary_cross_entropy", LOGITS, "kl_div")),
    Call(LOGITS, (4096, 4096), F32, "pos_weight", hot=True),
    *(Call(CE, shape, BF16, hot=True) for shape in (VOCABULARY, LARGEST, PIXELS)),
    *(Call(CE, shape, F32, hot=True) for shape in (WIDE, (4096, 5))),
    Call(CE, VOCABULARY, BF16, "label_smoothing", hot=True),
    Call(SOFT, VOCABULARY, F32, hot=True),
    Call(FOCAL, PIXELS, F32, hot=True),
    *(Call(key, PIXELS, F32, hot=True) for key in DICE),
    Call("nll_loss", VOCABULARY, F32, hot=True),
    Call("triplet_margin_loss", (65536, 512), F32, hot=True),
    Call("ctc_loss", (32, 80, 500), F32, hot=True),
    *(
        Call("ctc_loss", shape, dtype, option, reduction)
        for option in REGISTRY["ctc_loss"].options
        for shape in ((32, 80, 500), (4, 5000, 400))
        for dtype in (F32, F64, BF16, F16)
        for reduction in ("mean", "none")
    ),
    Call("cosine_embedding_loss", (65536, 512), F32, hot=True),
    *(
        Call(key, shape, F32, hot=True)
        for key in ("multi_margin_loss", "multilabel_margin_loss")
        for shape in (WIDE, (1024, 10000))
    ),
    *(Step((512, classes), BF16, hot=True) for classes in (32000, 128256)),
    Step((256, 32000), F32, hot=True),
    *(
        Step((64, classes), dtype, option)
        for classes in (1000, 32000, 128256)
        for dtype in (F32, F64, BF16, F16)
        for option in STEPS
    ),
    *(
        Call(key, (4096, 4096), dtype, option, reduction)
        for key, row in REGISTRY.items()
        if not row.rows
        for option in row.options
        for dtype in (F32, F64, BF16, F16)
        for reduction in ("mean", "none")
    ),
    *(
        Call(key, shape, dtype, option, reduction)
        for key in (CE, SOFT, FOCAL, "nll_loss")
        for option in REGISTRY[key].options
        for shape in (WIDE, VOCABULARY, LARGEST, PIXELS, MANY)
        for dtype in (F32, F64, BF16, F16)
        for reduction in ("mean", "none")
    ),
    *(
        Call(key, shape, dtype, option, reduction)
        for key in DICE
        for option in REGISTRY[key].options
        for shape in (PIXELS, MANY, (2000, 100, 7, 7), (4096, 21))  # shared by programs, and not
        for dtype in (F32, F64, BF16, F16)
        for reduction in REGISTRY[key].reductions[:2]
    ),
    *(
        Call(key, shape, dtype, option, reduction)
        for key in ("multi_margin_loss", "multilabel_margin_loss")
        for option in REGISTRY[key].options
        for shape in (WIDE, (1024, 10000), (4096, 5))
        for dtype in (F32, F64, BF16, F16)
        for reduction in ("mean", "none")
    ),
    *(
        Call(key, shape, dtype, option, reduction)
        for key in ("triplet_margin_loss", "cosine_embedding_loss", "multilabel_soft_margin_loss")
        for option in REGISTRY[key].options
        for shape in ((1024, 128), (1024, 512), (64, 10000))
        for dtype in (F32, F64, BF16)
        for reduction in ("mean", "none")
    ),
]


def everything() -> list[Specialisation]:
    """What the table launches, in an order by which any part of it is a sample."""
    with recorded() as found:
        for call in CALLS:
            call.both()
    kernels = list(found)
    random.Random(0).shuffle(kernels)
    return kernels


def main(arguments: list[str]) -> int:
    """Compiles for the targets named, or for all: a line for each specialisation."""
    targets = arguments or list(TARGETS)
    kernels, spilling, distinct = everything(), 0, set()
    for target, kernel in itertools.product(targets, kernels):
        numbers = compiled(kernel, TARGETS[target])
        spilling += numbers.spills > 0
        distinct.add((target, numbers.assembly))
        print(f"{target} {kernel}: {numbers}", flush=True)
    print(
        f"{len(kernels)} kernels for {len(targets)} targets, {len(distinct)} of them distinct, "
        f"{spilling} with spills"
    )
    return 0


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    sys.exit(main(sys.argv[1:]))
