"""What was probably meant by a call that is refused: how its message ends, or nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

CASTS = {
    torch.float32: "float",
    torch.float64: "double",
    torch.float16: "half",
    torch.bfloat16: "bfloat16",
}
Shape = Sequence[int]


def cast(name: str, dtype: torch.dtype) -> str:
    """`target.float()`"""
    return f"{name}.{CASTS[dtype]}()" if dtype in CASTS else f"{name}.to({dtype})"


def swapped(input: Tensor, target: Tensor) -> str:
    """Of an integer input."""
    other = target.is_floating_point() and not input.is_floating_point()
    return " (are input and target in the wrong order?)" if other else ""


def class_target(
    input: Shape, target: Tensor, probabilities: bool, of_head: bool, of_images: bool
) -> str:
    """Of class indices whose shape does not fit that of the logits: (N, C), (N, C, d1, ...).

    Those of a head are no argument that could be changed.
    """
    shape, given = tuple(input), tuple(target.shape)
    fits = shape[:1] + shape[2:]
    if not of_head and len(shape) > 2 and shape[:-1] == given:
        move = "transpose(1, 2)" if len(shape) == 3 else "movedim(-1, 1)"
        return f": the classes are dimension 1 of the input, pass input.{move}"
    for k, size in enumerate(given):
        if size == 1 and given[:k] + given[k + 1 :] == fits:
            return f": pass target.squeeze({k})"
    for axis in (1, -1):
        if given == (shape if axis == 1 else (*fits, shape[1])):
            if probabilities and target.is_floating_point():
                return f": pass target.movedim({axis}, 1)"
            return f": a class for each place, no one-hot vector: pass target.argmax({axis})"
    if len(shape) == 2 and math.prod(given) == shape[0] and given:
        return ": pass target.flatten()"
    if of_head:
        return ""
    if given and given == shape[1:]:
        if len(shape) == 2 and not of_images:
            return ": the classes are dimension 1 of the input, pass input.t()"
        return ": of one image pass input.unsqueeze(0) and target.unsqueeze(0)"
    if len(shape) > 2 and given == (math.prod(shape[:-1]),):
        return ": with the classes last, pass input.flatten(0, -2)"
    return ""


def like_input(input: Tensor, target: Tensor) -> str:
    """Of a target that must have the input's shape."""
    shape, given = tuple(input.shape), tuple(target.shape)
    if [n for n in shape if n != 1] == [n for n in given if n != 1]:
        for k, size in enumerate(shape):
            if size == 1 and shape[:k] + shape[k + 1 :] == given:
                return f" (pass target.unsqueeze({k}) or input.squeeze({k}))"
        for k, size in enumerate(given):
            if size == 1 and given[:k] + given[k + 1 :] == shape:
                return f" (pass target.squeeze({k}))"
        return " (pass target.reshape(input.shape))"
    if not target.is_floating_point() and len(shape) > 1 and given == shape[:1] + shape[2:]:
        last = "" if len(shape) == 2 else ".movedim(-1, 1)"
        return (
            " (class indices are for cross_entropy; for each class by itself pass "
            f"torch.nn.functional.one_hot(target, {shape[1]}){last}.float())"
        )
    return ""


def weight_of(name: str, own: Shape, shape: Shape) -> str:
    """Of a vector that belongs to another dimension than the last."""
    places = [k for k, size in enumerate(shape) if size == own[0]] if len(own) == 1 else []
    if not places:
        return ""
    place = 1 if 1 in places else places[0]
    return f": for dimension {place} pass {name}.view({', '.join(['-1', *['1'] * (len(shape) - 1 - place)])})"


def not_a_tensor(name: str, value: object) -> str:
    of_numpy = type(value).__module__ == "numpy"
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return f": pass torch.tensor({float(value)})"
    if of_numpy and not hasattr(value, "__setitem__"):  # one of its numbers
        return f": pass torch.tensor({value!s})"
    if hasattr(value, "logits"):
        return f": pass {name}.logits"
    if isinstance(value, (list, tuple)):
        if any(isinstance(v, Tensor) for v in value):
            return f": pass one of its tensors, such as {name}[0]"
        return f": pass torch.tensor({name})"
    return f": pass torch.from_numpy({name})" if of_numpy else ""


def class_index(value: int, classes: int) -> str:
    """Of a class index that is out of range."""
    if classes == 1:
        return " One logit for two classes is for binary_cross_entropy_with_logits."
    if value == classes:
        return " Classes are numbered from 0."
    if value < 0 or value == 255:
        return f" If such rows are not to count, pass ignore_index={value}."
    return ""
