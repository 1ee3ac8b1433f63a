"""Checks of arguments. Every message names the function, the argument, the rule and the value.

The exception types are PyTorch's, and the messages contain PyTorch's own words where its test suites
look for them. Warnings begin with PyTorch's own words, which filters match from their start.
"""

from __future__ import annotations

import operator
import sys
import warnings
from collections.abc import Sequence
from types import FrameType
from typing import Any, NoReturn, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import advice, torch_state


def fail(kind: type[Exception], function: str, message: str) -> NoReturn:
    raise kind(f"{function}: {message}")


def scalar_type(dtype: torch.dtype) -> str:
    """`Float` for torch.float32: the name that PyTorch's messages use."""
    return torch.empty(0, dtype=dtype).type().split(".")[-1].removesuffix("Tensor")


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warns at the place of the user's call, but not under torch.compile, which cannot trace a warning."""
    if not torch_state.is_compiling():
        warnings.warn(message, category, stacklevel=_user_level())


def _user_level() -> int:
    """The `stacklevel` of the first frame that is neither ours nor PyTorch's, seen from our caller."""
    frame, level = sys._getframe(1), 1
    while _between(frame) and frame.f_back:
        frame = frame.f_back
        level += not _uncounted(frame)
    return level


def _between(frame: FrameType) -> bool:
    """Whether the frame is ours, PyTorch's, or of a `with` on the way to us."""
    return str(frame.f_globals.get("__name__")).split(".")[0] in (
        "fusedloss",
        "torch",
        "contextlib",
    )


def _uncounted(frame: FrameType) -> bool:
    """As `warnings` has it: importlib's frames, and those of patched functions."""
    return "importlib" in frame.f_code.co_filename and "_bootstrap" in frame.f_code.co_filename


def not_tensors(function: str, kind: type[Exception], **arguments: object) -> NoReturn:
    """Refuses the first argument that is no tensor."""
    for name, value in arguments.items():
        if not isinstance(value, Tensor):
            words = f"argument '{name}' must be Tensor, not {type(value).__name__}"
            fail(kind, function, words + advice.not_a_tensor(name, value))
    raise AssertionError("all arguments are tensors")


def tensors(function: str, kind: type[Exception], **arguments: object) -> None:
    """Each must be a tensor."""
    for value in arguments.values():
        if not isinstance(value, Tensor):
            not_tensors(function, kind, **arguments)


def integer(function: str, argument: str, value: Any) -> int:
    """An integer of 64 bits: all that Python takes for an index, numpy's and tensors too, but no bool."""
    if isinstance(value, torch.SymInt):
        return cast(int, value)
    if isinstance(value, bool) or (isinstance(value, Tensor) and value.dtype is torch.bool):
        _not_of(int, function, argument, value)
    try:
        number = operator.index(value)
    except TypeError:
        _not_of(int, function, argument, value)
    if not -(2**63) <= number < 2**63:
        fail(ValueError, function, f"{argument} = {number} does not fit into 64 bits")
    return number


def number(function: str, argument: str, value: Any) -> float:
    """A real number: Python's, numpy's, or a 0-dim tensor that no gradient flows to."""
    if isinstance(value, (float, int, torch.SymFloat, torch.SymInt)) or _is_of_numpy(value):
        try:
            return float(value)
        except OverflowError:
            words = f"argument '{argument}' is an integer that no float holds, of {value.bit_length()} bits"
            fail(OverflowError, function, words)
    if not isinstance(value, Tensor) or value.is_complex():
        _not_of(float, function, argument, value)
    if learns(value):
        words = f"that requires a gradient, which {function} does not have by it"
    elif value.dim():
        words = f"of shape {list(value.shape)}"
    else:
        return float(value.item())
    fail(
        TypeError,
        function,
        f"argument '{argument}' must be float, not Tensor {words}: pass {argument}.item()",
    )


def learns(value: object) -> bool:
    """Whether something is differentiated by a tensor that is given for a number, or mapped over it."""
    if not isinstance(value, Tensor):
        return False
    if value.requires_grad or torch_state.is_compiling():
        return value.requires_grad
    if torch_state.is_wrapped(value):
        return True
    return torch_state.forward_mode() and forward_ad.unpack_dual(value).tangent is not None


def boolean(function: str, argument: str, value: Any) -> bool:
    """A bool and nothing else: a string such as "False" would count as true."""
    if not isinstance(value, (bool, torch.SymBool)):
        _not_of(bool, function, argument, value)
    return cast(bool, value)


def truth(function: str, argument: str, value: Any) -> bool:
    """Whatever Python takes for true or false, as PyTorch does; several numbers are neither."""
    if isinstance(value, Tensor) and value.numel() != 1:
        words = f"argument '{argument}' must be bool, not Tensor of shape {list(value.shape)}"
        why = "Boolean value of Tensor with more than one value is ambiguous"
        fail(RuntimeError, function, f"{words}: {why}")
    return bool(value)


def function(name: str, argument: str, value: object) -> None:
    """It must be callable."""
    if not callable(value):
        words = f"'{type(value).__name__}' object is not callable"
        fail(TypeError, name, f"argument '{argument}' must be a function or module: {words}")


def _not_of(kind: type, function: str, argument: str, value: object) -> NoReturn:
    got = type(value)
    name = (
        got.__name__
        if got.__module__ in ("builtins", "torch")
        else f"{got.__module__}.{got.__name__}"
    )
    fail(TypeError, function, f"argument '{argument}' must be {kind.__name__}, not {name}")


def _is_of_numpy(value: object) -> bool:
    """Whether it is a real number of numpy's, which need not be installed."""
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, (numpy.integer, numpy.floating, numpy.bool_))


def not_floating(
    function: str, kind: type[Exception], words: str, hint: str = "", /, **tensors: Tensor
) -> NoReturn:
    """Refuses the tensor that is not real floating point, with the cast or the `hint` that mends it."""
    name, tensor = next(
        ((n, t) for n, t in tensors.items() if t.is_complex()), next(iter(tensors.items()))
    )
    if not tensor.is_complex():
        hint = hint or f": pass {name}.float()"
    fail(
        kind,
        function,
        f'{name} must be real floating point, got {tensor.dtype} ("{words}" not implemented for '
        f"'{scalar_type(tensor.dtype)}'){hint}",
    )


def not_narrow(
    function: str, words: str, mixed: type[Exception] = RuntimeError, /, **tensors: Tensor
) -> None:
    """No floating point type of 8 bits or fewer: they are for storage, torch has no arithmetic for them."""
    for name, tensor in tensors.items():
        dtype = tensor.dtype
        if dtype.itemsize > 1 or not tensor.is_floating_point():
            continue
        if len({t.dtype for t in tensors.values() if t.is_floating_point()}) == 1:
            mixed = NotImplementedError
        why = "Promotion for Float8 Types is not supported"
        if mixed is NotImplementedError:
            why = f"\"{words}\" not implemented for '{scalar_type(dtype)}'"
        rule = f"{name} is of {dtype}, in which nothing is computed ({why}): pass {name}.float()"
        fail(mixed, function, rule)


def same_device(function: str, **tensors: Tensor | None) -> None:
    first_name, first = None, None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if first is None:
            first_name, first = name, tensor.device
        elif tensor.device != first:
            fail(
                RuntimeError,
                function,
                f"{name} is on {tensor.device}, {first_name} on {first}: Expected all tensors to be "
                f"on the same device. Move it with {name}.to({first_name}.device)",
            )


def broadcast(function: str, **tensors: Tensor) -> torch.Size:
    """The shape that the tensors broadcast to."""
    try:
        return torch.broadcast_shapes(*(t.shape for t in tensors.values()))
    except RuntimeError:
        pass
    shapes = " and ".join(f"{name} {list(t.shape)}" for name, t in tensors.items())
    sizes = {name: t.shape for name, t in tensors.items()}
    longest = max(len(s) for s in sizes.values())
    for back in range(1, longest + 1):
        here = {n: s[-back] for n, s in sizes.items() if len(s) >= back and s[-back] != 1}
        if len(set(here.values())) > 1:
            a, b = list(dict.fromkeys(here.values()))[:2]
            fail(
                RuntimeError,
                function,
                f"shapes do not broadcast: {shapes}. The size of tensor a ({a}) must match the "
                f"size of tensor b ({b}) at non-singleton dimension {longest - back}",
            )
    raise AssertionError("the shapes broadcast")


def broadcasts(function: str, input: Tensor, target: Tensor) -> str:
    """PyTorch's warning, and after it what is computed and the fix."""
    common = list(torch.broadcast_shapes(input.shape, target.shape))
    same = input.numel() == target.numel()
    fix = "target.reshape(input.shape)" if same else "expand the smaller one yourself"
    return (
        f"Using a target size ({target.size()}) that is different to the input size ({input.size()}). "
        "This will likely lead to incorrect results due to broadcasting. Please ensure they have the "
        f"same size. {function}: the loss is taken over {common}; {fix}"
    )


def position(linear: int, sizes: Sequence[int]) -> str:
    """`[2, 3]` for a linear position; nothing for a scalar."""
    index: list[int] = []
    for size in reversed(sizes):
        index.append(linear % size)
        linear //= size
    return f"[{', '.join(map(str, reversed(index)))}]" if index else ""


def out_of_range(
    function: str, target: Tensor, linear: int, classes: int, ignore_index: int
) -> NoReturn:
    """Refuses the class index at a linear position of the target."""
    value = _value_at(target, linear)
    index_out_of_range(function, target.shape, linear, value, classes, ignore_index)


def _value_at(target: Tensor, linear: int) -> int:
    unsigned = target.dtype is torch.uint64  # whose larger values torch cannot hand over
    value = int((target.view(torch.int64) if unsigned else target).flatten()[linear])
    return value % 2**64 if unsigned else value


def label_out_of_range(
    function: str, target: Tensor, linear: int, classes: int, sets: bool
) -> NoReturn:
    """Refuses the label at a linear position of the target."""
    not_a_label(function, target.shape, linear, _value_at(target, linear), classes, sets)


def not_a_label(
    function: str, shape: Sequence[int], linear: int, value: int, classes: int, sets: bool
) -> NoReturn:
    where = f"target{position(linear, shape)} = {value} is "
    if sets:
        words = f"no class of {classes}, nor the -1 that ends a set: argument #2 'target' is out of range"
    else:
        words = f"out of range for {classes} classes: target out of range"
    fail(RuntimeError, function, where + words)


def index_out_of_range(
    function: str, shape: Sequence[int], linear: int, value: int, classes: int, ignore_index: int
) -> NoReturn:
    fail(
        IndexError,
        function,
        f"target{position(linear, shape)} = {value} is out of range for {classes} classes "
        f"(ignore_index = {ignore_index}): Target {value} is out of bounds."
        + advice.class_index(value, classes),
    )


def expands(function: str, shape: torch.Size, **tensors: Tensor) -> None:
    """Each tensor must broadcast to `shape` without enlarging it."""
    for name, tensor in tensors.items():
        own = tensor.shape
        if len(own) == len(shape) and own == shape:
            continue
        if len(own) > len(shape) or any(
            a not in (1, b) for a, b in zip(reversed(own), reversed(shape), strict=False)
        ):
            fail(
                RuntimeError,
                function,
                f"{name} of shape {list(own)} does not broadcast to the input's shape "
                f"{list(shape)}" + advice.weight_of(name, own, shape),
            )
