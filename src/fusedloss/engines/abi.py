"""What Python and the kernels both must know, said once: `python abi.py > args.h` prints it as C++.

It runs at build time, so it needs neither torch nor the package. All that an argument block has is 8 bytes
wide: a word (an integer or a pointer), a double, or a struct of these.
"""

from __future__ import annotations

import itertools
import runpy
import struct
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

# As torch and as C++ name them, in the order of their numbers.
DTYPES = {
    "float32": "F32",
    "float64": "F64",
    "bfloat16": "BF16",
    "float16": "F16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "uint16": "U16",
    "uint32": "U32",
    "uint64": "U64",
}
# What a kernel returns if no input is wrong; if one is, it returns where.
FINE = -1
NO_MEMORY = -2  # for its scratch
UNREADABLE = -3  # a pointer is that of a tensor without memory: null, or an offset from it
SOME = -4  # less m where m rows of a head count, but not all
MAX_DIMS = 16
LIMITS = runpy.run_path(str(Path(__file__).parents[1] / "kinds" / "names.py"))  # of formulas
FORMULA_OPERANDS, FORMULA_NUMBERS = LIMITS["OPERANDS"], LIMITS["NUMBERS"]
LINEAR_SUMS = LIMITS["HEAD_SUMS"]  # doubles
# Doubles that are known of a row of two heads: of their softmaxes, of the divergence, of a small one.
DIVERGENCE_SUMS, SOFTMAX_SUMS = LIMITS["DIVERGENCE_SUMS"], 12
SMALL_SUMS = SOFTMAX_SUMS + 2  # what is before the last
# Of the rows of a head that count and are not weighed with 0, array after array: labels, which rows they are,
# what each counts in the sum and in its gradient, losses, which are beyond what is ordinary; then the divisor.
HEAD_WORDS = 6
# Of a divergence: all at once, or what a shard of the classes is asked for in turn.
PHASES = ("WHOLE", "GATHER", "COMPARE", "REFINE", "FINISH")
NUMBERS = (
    *("FINE", "NO_MEMORY", "UNREADABLE", "SOME"),
    *("MAX_DIMS", "FORMULA_OPERANDS", "FORMULA_NUMBERS", "LINEAR_SUMS", "HEAD_WORDS"),
    *("DIVERGENCE_SUMS", "SOFTMAX_SUMS"),
)


class Field(NamedTuple):
    name: str
    type: str
    inner: Struct | None
    length: int | None  # of an array; 0: as many as the caller has

    @property
    def format(self) -> str:
        one = self.inner.format if self.inner else "d" if self.type == "double" else "q"
        return one * (1 if self.length is None else self.length)


class Pointers(NamedTuple):
    """Which words of an argument block differ from call to call: they are pointers."""

    inputs: tuple[int, ...]
    grads: tuple[int, ...]
    incoming: int  # where the gradient is computed in backward
    losses: int  # unreduced
    total: int


class Struct:
    """A struct by its declarations in C++."""

    def __init__(self, name: str, *declarations: str) -> None:
        self.name, self.declarations = name, declarations
        self.fields = [field for d in declarations for field in _fields(d)]
        self.format = "".join(field.format for field in self.fields)
        self.absent = (0,) * len(self.format)
        self.places: dict[str, int] = {}  # in words
        at = 0
        for field in self.fields:
            width = len(field.format) // (field.length or 1)
            for k in range(field.length or 1):
                self.places[f"{field.name}[{k}]"] = at + k * width
            self.places[field.name] = at
            at += len(field.format)
        STRUCTS[name] = self

    def packer(self, more: int = 0) -> Callable[..., bytes]:
        """Packs what is given by name, structs and arrays as tuples; the last field has `more` words."""
        runs = ((kind, len(list(run))) for kind, run in itertools.groupby(self.format + "q" * more))
        pack = struct.Struct("=" + "".join(f"{n}{kind}" for kind, n in runs)).pack
        names = ", ".join(field.name for field in self.fields)
        values = ", ".join(
            f"*{field.name}" if field.inner or field.length is not None else field.name
            for field in self.fields
        )
        made: Callable[..., bytes] = eval(f"lambda *, {names}: pack({values})", {"pack": pack})
        return made

    def pointers(
        self, inputs: tuple[str, ...], grads: tuple[str, ...], incoming: str = "incoming"
    ) -> Pointers:
        at = self.places
        found, of_grads = (tuple(map(at.__getitem__, names)) for names in (inputs, grads))
        return Pointers(found, of_grads, at[incoming], at["loss"], at["total"])

    def place(self, name: str) -> int:
        """The word of a field, or of one `outer.inner`."""
        outer, _, inner = name.partition(".")
        within = next(f.inner for f in self.fields if f.name == outer)
        return self.places[outer] + (within.places[inner] if within and inner else 0)

    def printed(self) -> str:
        """With its layout, which the compiler checks."""
        lines = [f"struct {self.name} {{"]
        for declaration in self.declarations:
            code, _, comment = declaration.partition("  //")
            lines.append(f"    {code};" + (f"  //{comment}" if comment else ""))
        checks = [f"sizeof({self.name}) == {8 * len(self.format)}"]
        checks += [
            f"offsetof({self.name}, {f.name}) == {8 * self.places[f.name]}" for f in self.fields
        ]
        return "\n".join([*lines, "};", *(f"static_assert({check});" for check in checks)])


STRUCTS: dict[str, Struct] = {}


def _fields(declaration: str) -> list[Field]:
    """Of `type a, b[2]  // comment`."""
    code = declaration.partition("  //")[0]
    first, *rest = code.split(", ")
    type, _, first = first.rpartition(" ")
    found = []
    for name in (first, *rest):
        name, bracket, count = name.rstrip("]").partition("[")
        found.append(Field(name, type, STRUCTS.get(type), int(count or 0) if bracket else None))
    return found


# Tensors. Null data means absent.
ARRAY = Struct("Array", "void* data", "int64_t dtype")
GRID = Struct(
    "Grid",  # seen as (n, c, d); for one value a row the class stride is unused
    "void* data",
    "int64_t dtype",
    "int64_t stride[3]",
)
MATRIX = Struct("Matrix", "void* data", "int64_t dtype", "int64_t row_stride, stride")
LOGITS = Struct(
    "Logits",  # rows of them
    "void* data",
    "const void* low  // of the same type and strides or null: what rounding took from them",
    "const void* bias  // of each class, in the type that is computed in, or null",
    "int64_t dtype",
    "int64_t stride  // from row to row",
)

POINTWISE = Struct(
    "PointwiseArgs",
    "int64_t formula, numel, ndim",
    f"Array operand[{FORMULA_OPERANDS}]",
    "Array multiplier[2]  // the weight, which multiplies value and gradient; the incoming gradient",
    "Array loss  // the unreduced losses",
    "Array total  // their sum over `denominator`",
    f"Array grad[{FORMULA_OPERANDS}]",
    "double denominator, grad_scale",
    f"double numbers[{FORMULA_NUMBERS}]",
    "int64_t layout[]  // sizes[ndim], then strides[ndim] of each: operand, multiplier, loss, grad",
)
ROWS = Struct(
    "RowsArgs",
    "int64_t n, c, d",
    "int64_t probabilities  // the target holds them, else class indices",
    "int64_t mean  // divide by the weights of the counted rows (indices) or by their number,",
    "double denominator  // or by this, where it is not 0",
    "int64_t ignore_index",
    "double smoothing",
    "double gamma  // of the focal loss; 0 is cross entropy",
    "Grid input, target",
    "Grid weight  // of the type that the kernel computes in, dense",
    "Grid incoming  // a gradient for each row",
    "Grid loss  // unreduced",
    "Grid total, grad, grad_target",
)
REDUCTION = Struct(
    "ReductionArgs",
    "int64_t definition, rows, features",
    "double denominator, grad_scale",
    "double numbers[4]",
    "Matrix input[3]  // the operands, then the label if there is one: a number for each row",
    "Matrix incoming  // a gradient for each row",
    "Matrix loss  // unreduced",
    "Matrix total",
    "Matrix grad[3]",
)
CTC = Struct(
    "CtcArgs",
    "int64_t t, n, c  // frames, sequences, classes",
    "int64_t most  // labels of a sequence",
    "int64_t blank, zero_infinity",
    "int64_t mean  // divide by the labels of each sequence, and all by `denominator`",
    "double denominator",
    "const int64_t* lengths  // of the sequences, of their labels, and where in `target` these begin",
    "Array target",
    "int64_t label_stride",
    "Grid input  // (t, n, c)",
    "Array incoming  // a gradient for each sequence",
    "int64_t incoming_stride",
    "Array loss  // unreduced",
    "Array total",
    "Grid grad",
)
MARGINS = Struct(
    "MarginArgs",
    "int64_t rows, classes",
    "int64_t labels  // columns of the target",
    "int64_t sets  // the first -1 of a row is the end of its labels; else there is one",
    "int64_t squared",
    "double margin, denominator, grad_scale",
    "Matrix input, target",
    "Array weight  // of each class, dense",
    "Matrix incoming  // a gradient for each row",
    "Matrix loss  // unreduced",
    "Matrix total, grad",
)
DICE = Struct(
    "DiceArgs",
    "int64_t n, c, d",
    "int64_t activation  // 0: softmax, 1: sigmoid, 2: the input holds probabilities",
    "int64_t masks  // the target has the input's shape, else it holds class indices",
    "int64_t batch  // the sums are over all n",
    "int64_t first  // of the classes that count",
    "int64_t weighting  // 0: each class by itself; or all in one, by 1: 1 / t^2, 2: 1 / t, 3: 1",
    "int64_t skip_absent, mean, threads",
    "int64_t ignore_index",
    "double alpha, beta, smooth_nr, smooth_dr",
    "double by_overlap, by_rows, gamma  // what the parts weigh; of the rows'",
    "Grid input, target",
    "Grid weight  // of the type that the rows are computed in, dense",
    "Grid incoming, loss  // (n, c) of the classes that count, or (n), of which n may be 1",
    "Grid total, grad",
)
LINEAR = Struct(
    "LinearArgs",
    "int64_t n, c  // rows, classes in all",
    "int64_t first, columns  // the classes that are given: [first, first + columns)",
    "int64_t origin  // the first of this process: `target` holds the probabilities from it on",
    "int64_t begin, finish  // these are the first ones, the last ones",
    "int64_t given  // `sums` are of all classes already, and it finishes",
    "int64_t differentiate  // the logits become their gradient",
    "double smoothing, z_loss, softcap, logit_scale",
    "Logits logits",
    "const int64_t* label  // or null, and `target` holds probabilities",
    "Grid target",
    "const void* weight  // of each class, in the type that is computed in",
    # Of each row, or null:
    "const double* incoming  // the gradients of the three results",
    "const double* incoming_lse",
    "const double* incoming_entropy",
    "double* sums",
    "double* loss",
    "double* lse",
    "double* entropy",
    "double* correct  // 1 where no class is above the target's",
    "Grid grad_target",
    "double ordinary  // a row whose largest logit is larger in size stays as it is",
    "int64_t* beyond  // of each row, whether it does (`given`: did); or null, and none does",
)
MERGE = Struct(
    "MergeArgs",  # what several processes gathered of rows, each of its own classes
    "int64_t n, ranks",
    "int64_t labelled  // of one head: the own class is the target's; else the largest",
    "double temperature  // of two heads",
    "const double* parts  // the sums of n rows of each process, one after another; of two heads SOFTMAX_SUMS",
    "double* sums",
)
ACCUMULATE = Struct(
    "AccumulateArgs",  # the sums of the products of chunks
    "int64_t rows, columns",
    "int64_t stride  // of the sums, from row to row",
    "int64_t add  // or the terms take the place of what was there",
    "float* sums",
    "const void* terms  // bfloat16",
)
DISTILL = Struct(
    "DistillArgs",
    "int64_t n, c",
    "int64_t phase",
    "int64_t first  // of its classes",
    "int64_t of_teacher, of_student  // whose probabilities weigh the logs: of one, or of both, to the mixture",
    "int64_t differentiate  // the student's logits become their gradient",
    "double beta, temperature, soft_weight, hard_weight, softcap, teacher_softcap",
    "Logits student, teacher",
    "const int64_t* label  // of the hard term, or null",
    "const double* incoming",
    "double* sums  // of each row, those of all processes but for what the phase adds; or null",
    "double* loss",
    "double ordinary, teacher_ordinary  // as above",
    "int64_t* beyond  // as above; or of the phase `refine`, which divergences are small",
)
HEAD_ROWS = Struct(
    "HeadRowsArgs",
    "int64_t n, classes, ignore_index",
    "int64_t divide  // by the class weights of the rows that count",
    "double sign",
    "Array label  // class indices, or null: all rows count",
    "Array weight  // of each class",
    "Array share  // of each row",
    "Array incoming",
    "int64_t incoming_stride",
    "int64_t* rows  // what is known of them, as HEAD_WORDS says",
)
HEAD_RESULTS = Struct(
    "HeadResultsArgs",
    "int64_t n, count  // rows, and how many of them are kept",
    "int64_t reduced",
    "double sign",
    "const int64_t* rows",
    "Array out",
)
# In the order of their numbers.
KERNELS = {
    "pointwise": POINTWISE,
    "cross_entropy": ROWS,
    "nll_loss": ROWS,
    "dice": DICE,
    "reduction": REDUCTION,
    "ctc_loss": CTC,
    "margins": MARGINS,
    "linear": LINEAR,
    "distill": DISTILL,
    "merge": MERGE,
    "merge_divergences": MERGE,
    "accumulate": ACCUMULATE,
    "head_rows": HEAD_ROWS,
    "head_results": HEAD_RESULTS,
}


def header() -> str:
    numbers = [f"constexpr int64_t {name.lower()} = {globals()[name]};" for name in NUMBERS]
    kernels = [f"int64_t {name}(const {args.name}&);" for name, args in KERNELS.items()]
    table = " ".join(f"X({name}, {args.name})" for name, args in KERNELS.items())
    return "\n".join(
        [
            "// Printed by engines/abi.py; edit that instead.",
            "#pragma once",
            "#include <cstddef>",
            "#include <cstdint>",
            "",
            "namespace fusedloss {",
            f"enum DType : int64_t {{ {', '.join(DTYPES.values())} }};",
            f"enum Phase : int64_t {{ {', '.join(PHASES)} }};",
            f"enum Number : int64_t {{ {', '.join(KERNELS).upper()} }};",
            *numbers,
            *(s.printed() for s in STRUCTS.values()),
            "namespace kernels {",
            *kernels,
            "}  // namespace kernels",
            "}  // namespace fusedloss",
            f"#define FUSEDLOSS_KERNELS(X) {table}",
            '#define FUSEDLOSS_EXPORT extern "C" __attribute__((visibility("default")))\n',
        ]
    )


if __name__ == "__main__":
    print(header(), end="")
