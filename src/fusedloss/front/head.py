"""A linear head as its caller gives it, checked: the tensors of its products, the settings of its logits."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core import errors, plain, sharded, torch_state
from ..core.plain import PLAIN
from ..core.reduce import autocasts, resolve, result_dtype
from ..core.shards import ClassShard
from ..kinds.heads import LinearCall, Ready, Slots
from .classes import check_indices, check_weight
from .settings import DENOMINATOR, divisor

SOFTMAX = "log_softmax_lastdim_kernel_impl"  # PyTorch's name for what a type is lacking


# What the matrix products take, and a teacher's logits: DTensors, all or none; all else counts as replicated.
MULTIPLIED = (
    "input",
    "linear_weight",
    "linear_bias",
    "teacher_input",
    "teacher_weight",
    "teacher_bias",
    "teacher_logits",
)


RAISES = (
    "IndexError: a class index out of range; its position is named",
    "ValueError: unknown `reduction`; batch sizes that differ",
    "RuntimeError: other shapes that do not fit; dtypes or devices that differ",
    "RuntimeError: a tensor whose storage was freed; DTensors beside others",
    "NotImplementedError: integer or complex input",
    "TypeError: an argument that is no tensor",
)


def reduction_of(name: str, reduction: str, denominator: Tensor | float | None) -> str:
    reduction = resolve(name, reduction)
    divisor(name, denominator, reduction)
    return reduction


def the_only(results: Sequence[Tensor]) -> Tensor:
    return results[0]


class Head:
    """A checked head: its tensors in the shapes of `kinds/heads.py`, and the settings of its logits."""

    def __init__(
        self,
        name: str,
        input: Tensor,
        linear_weight: Tensor,
        linear_bias: Tensor | None,
        softcap: Tensor | float | None,
        logit_scale: Tensor | float,
        memory_budget: int | None,
        exact_logits: bool = False,
        shard: ClassShard | None = None,
        prefix: str = "",  # of a teacher's arguments
    ) -> None:
        self.name, self.prefix, self.shard = name, prefix, shard
        names = [f"{prefix}input", f"{prefix or 'linear_'}weight", f"{prefix or 'linear_'}bias"]
        tensors = zip(names, (input, linear_weight, linear_bias), strict=True)
        given = {key: tensor for key, tensor in tensors if tensor is not None}
        errors.tensors(name, TypeError, **given)
        errors.same_device(name, **given)
        self._check_shapes(names, input, linear_weight, linear_bias)
        if not input.is_floating_point():
            errors.not_floating(name, NotImplementedError, "addmm_impl_cpu_", **{names[0]: input})
        errors.not_narrow(name, SOFTMAX, **given)
        scale = setting(name, "logit_scale", logit_scale, folds=True)
        if isinstance(scale, Tensor):
            # It learns, as a factor of what is multiplied: s (h W^T + b) = (s h) W^T + s b.
            size = _size(scale) if _multiplied_in(input) is torch.float16 else 1.0
            rest = scale / size
            given = {key: t if key == names[1] else _times(t, rest) for key, t in given.items()}
            scale = size
        self.logit_scale = scale
        self.dtype = result_dtype(input.dtype, input)
        if autocasts(input.device.type):
            given = {key: _as_autocast(t) for key, t in given.items()}
            self.dtype = torch.promote_types(self.dtype, torch.float32)
        for key, tensor in given.items():
            if tensor.dtype != given[names[0]].dtype:
                errors.fail(
                    RuntimeError,
                    name,
                    f"{key} is of {tensor.dtype}, {names[0]} of {input.dtype}: expected mat1 and mat2 to have "
                    "the same dtype. Convert one, or run under torch.autocast",
                )
        self.input, self.linear_weight = given[names[0]], given[names[1]]
        self.linear_bias = given.get(names[2])
        self.batch, self.out = input.shape[:-1], linear_weight.shape[1:-1]
        self.classes, self.features = linear_weight.shape[0], input.shape[-1]
        self.softcap = 0.0 if softcap is None else setting(name, "softcap", softcap, above=0.0)
        if memory_budget is not None:
            memory_budget = errors.integer(name, "memory_budget", memory_budget)
            if memory_budget <= 0:
                errors.fail(ValueError, name, f"memory_budget must be above 0, got {memory_budget}")
        self.memory_budget, self.exact_logits = memory_budget or 0, exact_logits

    def _check_shapes(
        self, names: list[str], input: Tensor, weight: Tensor, bias: Tensor | None
    ) -> None:
        name, (of_input, of_weight, of_bias) = self.name, names
        both = f"{of_input} {list(input.shape)} and {of_weight} {list(weight.shape)}"
        if not input.dim():
            errors.fail(
                RuntimeError,
                name,
                f"expected {of_input} with dimensionality 1 or 2 or more, got {input.dim()}",
            )
        if weight.dim() < 2:
            errors.fail(
                RuntimeError,
                name,
                f"expected {of_weight} with dimensionality at least 2, got {weight.dim()}",
            )
        if input.shape[-1] != weight.shape[-1]:
            errors.fail(
                RuntimeError,
                name,
                f"expected equal {of_input} and {of_weight} last dimensions (in_features), got "
                f"{input.shape[-1]} and {weight.shape[-1]}, respectively: {both}",
            )
        if bias is not None and bias.shape != weight.shape[:-1]:
            errors.fail(
                RuntimeError,
                name,
                f"expected {of_bias} shape {tuple(weight.shape[:-1])}, got {tuple(bias.shape)}",
            )
        if weight.dim() > 2 and input.dim() < 2:
            errors.fail(
                RuntimeError,
                name,
                f"K-dimensional loss defined by {of_weight} shape {tuple(weight.shape)} requires "
                f"batched input, (N, {input.shape[-1]}), got unbatched input with shape "
                f"{tuple(input.shape)}",
            )

    def check_target(self, target: Tensor, weight: Tensor | None, ignore_index: int | None) -> bool:
        """Whether the target holds probabilities."""
        name = self.name
        errors.tensors(name, TypeError, target=target)
        if weight is not None:
            errors.tensors(name, TypeError, weight=weight)
        errors.same_device(name, input=self.input, target=target, weight=weight)
        shape = (*self.batch, self.classes, *self.out)
        if target.shape != shape:
            self._check_index_target(target, weight)
            return False
        if ignore_index is not None:
            errors.fail(
                RuntimeError,
                name,
                "ignore_index cannot be specified when target contains probabilities, got "
                f"{ignore_index}",
            )
        if not target.is_floating_point():
            errors.fail(
                RuntimeError,
                name,
                "Expected floating point type for target with class probabilities, got "
                f"{target.dtype}: a target of the logits' shape {list(shape)} holds probabilities",
            )
        errors.not_narrow(name, SOFTMAX, input=self.input, target=target)
        if weight is not None:
            errors.not_narrow(name, SOFTMAX, input=self.input, weight=weight)
            check_weight(name, self._logits(), weight)
        for other in (target, weight):
            if other is not None:
                self.dtype = torch.promote_types(self.dtype, other.dtype)
        return True

    def _logits(self) -> Tensor:
        """Of the shape that cross entropy would see, without memory."""
        batch = (math.prod(self.batch),) if self.batch else ()
        classes = self.classes if self.shard is None else self.shard.classes
        shape = (*batch, classes, *self.out)
        return torch.empty(shape, dtype=self.input.dtype, device="meta")

    def _check_index_target(self, target: Tensor, weight: Tensor | None) -> None:
        fits, wanted = (*self.batch, *self.out), target.shape
        if len(self.batch) > 1:
            if wanted != fits:
                errors.fail(
                    RuntimeError,
                    self.name,
                    f"expected input with dimensionality 1 or 2, got {len(self.batch) + 1}, or a target "
                    f"of shape {list(fits)} ({[*self.batch, self.classes, *self.out]} for "
                    f"probabilities), got {list(wanted)}",
                )
            target = target.flatten(0, len(self.batch) - 1)
        check_indices(self.name, self._logits(), target, weight, self.dtype)

    def check_sample_weight(self, sample_weight: Tensor | None) -> Tensor | None:
        name, fits = self.name, (*self.batch, *self.out)
        if sample_weight is None:
            return None
        errors.tensors(name, TypeError, sample_weight=sample_weight)
        errors.same_device(name, input=self.input, sample_weight=sample_weight)
        if sample_weight.shape != fits:
            errors.fail(
                RuntimeError,
                name,
                f"sample_weight must have the shape of the losses, {list(fits)}, got "
                f"{list(sample_weight.shape)}",
            )
        errors.not_narrow(name, "mul", sample_weight=sample_weight)
        if sample_weight.is_complex():
            errors.not_floating(name, RuntimeError, "mul", sample_weight=sample_weight)
        return sample_weight

    def chunk_rows(self, options: Any) -> int:
        """The rows that torch's options ask for; 0 where they leave it open."""
        if options is None:
            return 0
        if not hasattr(options, "batch_chunk_size"):
            words = "argument 'options' must be torch.nn.LinearCrossEntropyOptions"
            errors.fail(AttributeError, self.name, f"{words}, not {type(options).__name__}")
        if options.batch_chunk_size is None and options.chunking_method in (None, "auto"):
            return 0
        sizes = {
            "num_batches": math.prod(self.batch),
            "in_features": self.features,
            "num_classes": self.classes,
        }
        return options._adjust(
            **sizes, dtype=self.input.dtype, device=self.input.device
        ).batch_chunk_size

    def teacher(
        self,
        input: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        logits: Tensor | None,
    ) -> Slots:
        """The checked tensors of a teacher, as in `kinds/distill.py`."""
        name = self.name
        if (logits is None) == (input is None or weight is None) or (
            logits is not None and not (input is weight is bias is None)
        ):
            errors.fail(
                ValueError,
                name,
                "the teacher is either teacher_input and teacher_weight (and teacher_bias) or "
                "teacher_logits",
            )
        if logits is None:
            assert input is not None and weight is not None
            head = Head(name, input, weight, bias, None, 1.0, None, prefix="teacher_")
            batch, classes = head.batch, (head.classes, *head.out)
            found: Slots = (head.input, head.linear_weight, head.linear_bias)
        else:
            errors.tensors(name, TypeError, teacher_logits=logits)
            if not logits.is_floating_point():
                errors.not_floating(name, NotImplementedError, "softmax", teacher_logits=logits)
            errors.not_narrow(name, SOFTMAX, teacher_logits=logits)
            batch, classes = logits.shape[:-1], logits.shape[-1:]
            found = (None, None, None)
        errors.same_device(name, input=self.input, teacher=logits if logits is not None else input)
        if batch != self.batch or classes != (self.classes,):
            errors.fail(
                RuntimeError,
                name,
                f"the teacher's logits are of shape {[*batch, *classes]}, the student's of "
                f"{[*self.batch, self.classes]}",
            )
        n = math.prod(batch)
        teacher_input, teacher_weight, teacher_bias = (
            t if t is None else t.detach() for t in found
        )
        return (
            None if teacher_input is None else teacher_input.reshape(n, teacher_input.shape[-1]),
            None if teacher_weight is None else teacher_weight.unsqueeze(1),
            None if teacher_bias is None else teacher_bias.unsqueeze(1),
            None if logits is None else logits.detach().reshape(n, self.classes),
        )

    def run(
        self,
        kind: type[LinearCall],
        target: Tensor | None,
        weight: Tensor | None = None,
        sample_weight: Tensor | None = None,
        denominator: Tensor | None = None,
        teacher: Slots = (),
        finish: Callable[..., Any] = the_only,
        **settings: Any,
    ) -> Any:
        """The call, ready to run; `finish` makes the loss of its results, of rows in the caller's shape."""
        call = kind(
            **{
                "loss": self.name,
                "statistics": False,
                "chunk_rows": 0,
                "softcap": self.softcap,
                "logit_scale": self.logit_scale,
                "memory_budget": self.memory_budget,
                "exact_logits": self.exact_logits,
                "dtype": self.dtype,
                "shard": self.shard,
                **settings,
            }
        )
        n, k = math.prod(self.batch), math.prod(self.out)
        of_target = (n, self.classes, k) if call.probabilities else (n, k)
        tensors: Slots = (
            self.input.reshape(n, self.features),
            self.linear_weight.reshape(self.classes, k, self.features),
            None if self.linear_bias is None else self.linear_bias.reshape(self.classes, k),
            None if target is None else target.reshape(of_target),
            weight,
            None if sample_weight is None else sample_weight.reshape(n, k),
            denominator,
            *teacher,
        )
        if not torch_state.is_compiling():
            # Zeros without memory, which autograd makes, get some.
            tensors = tuple(
                t.clone() if t is not None and t._is_zerotensor() else t for t in tensors
            )
        shape = torch.Size((*self.batch, *self.out)) if call.reduction == "none" else None
        return Ready(call, tensors, target, shape, finish)


def index(name: str, ignore_index: int | None) -> int | None:
    return None if ignore_index is None else errors.integer(name, "ignore_index", ignore_index)


def check_tensors(name: str, **arguments: Any) -> None:
    """Refuses tensors without memory, sparse ones, and distributed ones beside plain ones."""
    if torch_state.is_compiling():
        return
    given = {key: t for key, t in arguments.items() if isinstance(t, Tensor)}
    plain.check(name, **given)
    odd = [k for k, t in given.items() if type(t) not in PLAIN or t.layout is not torch.strided]
    if odd:
        _check_odd(name, odd, given)


def _check_odd(name: str, odd: list[str], given: dict[str, Tensor]) -> None:
    for key in odd:
        if type(given[key]) in PLAIN:
            words = f"{key} has layout {given[key].layout}, which no linear loss takes: to_dense()"
            errors.fail(RuntimeError, name, words)
    spread = [key for key in odd if key != DENOMINATOR and sharded.is_sharded(given[key])]
    local = [key for key in given if key in MULTIPLIED and key not in spread]
    if spread and local:
        errors.fail(
            RuntimeError,
            name,
            f"{spread[0]} is a DTensor, {local[0]} is not: got mixed torch.Tensor and DTensor. If FSDP divided "
            f"{spread[0]}, take the loss inside of the module's forward, or after its unshard(): full_tensor() "
            "alone gives a gradient that is not reduced over the processes. If tensor parallelism did, pass "
            f"DTensor.from_local({local[0]}, {spread[0]}.device_mesh, [Replicate()]), or "
            f"{spread[0]}.to_local() beside class_group={spread[0]}.device_mesh. distribute_tensor() makes a "
            "DTensor of what every process has in full",
        )


def _multiplied_in(tensor: Tensor) -> torch.dtype:
    """The type of the products: of autocast, or of what is given."""
    device = tensor.device.type
    wide = tensor.dtype is torch.float64 or not autocasts(device)
    return tensor.dtype if wide else torch.get_autocast_dtype(device)


def _size(scale: Tensor) -> float:
    """The power of two above a scale beyond 1, by which float16 may overflow; 1 where no look is free."""
    if torch_state.is_compiling() or not (scale.is_cpu and plain.is_plain(scale.detach())):
        return 1.0
    return math.ldexp(1.0, min(max(math.frexp(scale.item())[1], 0), 1023))


def _as_autocast(tensor: Tensor) -> Tensor:
    """In the type that autocast multiplies in; it leaves float64 alone, and integers."""
    if tensor.dtype is torch.float64 or not tensor.is_floating_point():
        return tensor
    return tensor.to(torch.get_autocast_dtype(tensor.device.type))


def finite(name: str, argument: str, value: float, above: float = -math.inf) -> float:
    value = errors.number(name, argument, value)
    # torch.compile traces no math.isfinite of a number that varies.
    if not above < value < math.inf:
        rule = "finite" if above == -math.inf else f"finite and greater than {above:g}"
        errors.fail(ValueError, name, f"{argument} must be {rule}, got {value}")
    return value


def _times(tensor: Tensor, scale: Tensor) -> Tensor:
    """The product. Infinities (masked classes, ignored rows) have no part in its derivative by the scale."""
    finite = tensor.isfinite()
    rest = torch.where(finite, 0, tensor * scale.detach())
    return torch.where(finite, tensor, 0) * scale + rest


def setting(
    name: str, argument: str, value: Any, above: float = -math.inf, folds: bool = False
) -> Any:
    """A finite number, or the 0-dim tensor of one that learns; or, where it `folds`, of one that is traced.

    On the meta device there is no number to read.
    """
    traced = isinstance(value, Tensor) and (value.is_meta or (folds and torch_state.is_compiling()))
    if not (traced or errors.learns(value)):
        return finite(name, argument, value, above)
    if value.dim() or value.is_complex():
        got = f"{value.dtype} of shape {list(value.shape)}"
        words = f"argument '{argument}' must be float or a real 0-dim tensor, not {got}"
        errors.fail(TypeError, name, words)
    # Where it can be looked at, and no queue stops for it.
    if not torch_state.is_compiling() and value.is_cpu and plain.is_plain(value.detach()):
        finite(name, argument, value.item(), above)
    return value


def scalar(name: str, value: Tensor | float | None, input: Tensor) -> Tensor | None:
    """What 'mean' shall divide by, as a tensor."""
    found = divisor(name, value, "mean", input=input)
    if isinstance(found, Tensor) and sharded.is_sharded(found):
        placed: Tensor = sharded.beside(name, DENOMINATOR, found, input)
        return placed
    if found is None or isinstance(found, Tensor):
        return found
    return torch.full((), found, dtype=torch.float64)
