"""The training of `fusedloss demo`, side by side with PyTorch's, and how far rounding lets the curves part."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ... import nn as fused
from .tasks import Problem, Task

Floats = np.ndarray[Any, np.dtype[np.float64]]
OnStep = Callable[[int, int], None]

WARM_UP = 10
# Rounding otherwise than PyTorch may cost this multiple of what PyTorch's own rounding costs.
ROUNDING_FACTOR = 4.0
# Of the loss: where PyTorch happens to round to the exact value.
FLOOR_ULPS = 8.0


class Run:
    """One training of a problem's model, with one library's module of the loss, in one dtype."""

    def __init__(self, task: Task, problem: Problem, module: Any, dtype: torch.dtype) -> None:
        self.problem = problem
        self.model = copy.deepcopy(problem.model).to(dtype)
        self.criterion = module(**problem.options).to(dtype)
        self.judge = task.reference(**problem.options).double()
        # SGD and not Adam: Adam would hide a gradient that is wrong by a factor.
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=task.rate, momentum=0.9)
        self.inputs = problem.inputs.to(dtype)
        floating = problem.targets.is_floating_point()
        self.targets = problem.targets.to(dtype) if floating else problem.targets
        self.losses: list[float] = []
        self.errors: list[float] = []
        self.seconds: list[float] = []

    def step(self, rows: Tensor) -> None:
        """Train on one batch; the clock runs in the loss and its backward, not in the model."""
        outputs = self.model(self.inputs[rows])
        several = rows.ndim == 2 or self.problem.parts
        predictions = outputs.detach().unbind(0) if several else (outputs.detach(),)
        for each in predictions:
            each.requires_grad_()
        arguments = self.problem.arguments(predictions, self.targets[rows])
        start = time.perf_counter()
        loss = self.criterion(*arguments)
        loss.backward()
        self.seconds.append(time.perf_counter() - start)
        gradient = torch.stack([each.grad for each in predictions])
        self.optimizer.zero_grad()
        outputs.backward(gradient.view_as(outputs))
        self.optimizer.step()
        self.losses.append(loss.item())
        if loss.dtype is torch.float32:
            self.errors.append(self.error_of(predictions, self.targets[rows], loss, gradient))

    def error_of(
        self, predictions: tuple[Tensor, ...], targets: Tensor, loss: Tensor, gradient: Tensor
    ) -> float:
        """The relative error of a loss and its gradient against the same in float64."""
        exact = tuple(each.detach().double().requires_grad_() for each in predictions)
        arguments = self.problem.arguments(exact, targets)
        value = self.judge(*(a.double() if a.is_floating_point() else a for a in arguments))
        slopes = torch.stack(torch.autograd.grad(value, exact))
        pairs = ((loss.detach(), value.detach()), (gradient, slopes))
        tiny = torch.finfo(torch.float32).tiny
        errors = [(a - b).abs().max() / (b.abs().max() + tiny) for a, b in pairs]
        return torch.stack(errors).max().item()


@dataclass(frozen=True)
class Result:
    """Both libraries' curves on one task, and how far rounding lets them part."""

    task: Task
    before: float
    scores: tuple[float, float]
    microseconds: tuple[float, float]
    torch: Floats
    fusedloss: Floats
    float64: Floats
    torch_error: Floats
    fusedloss_error: Floats

    @property
    def difference(self) -> Floats:
        return np.abs(self.fusedloss - self.torch)

    @property
    def bound(self) -> Floats:
        """What rounding explains: a multiple of PyTorch's own departure from float64 so far."""
        scale = np.maximum.accumulate(np.abs(self.torch))
        return allowance(np.abs(self.torch - self.float64), scale)

    @property
    def parts(self) -> int | None:
        """The step from which the curves differ by more than the bound."""
        return first(self.difference, self.bound)

    @property
    def wrong(self) -> int | None:
        """The step from which rounding cannot explain the difference of the curves.

        A hinge that rounding closes in one run alone sets two curves apart though neither library
        errs. So where there is a hinge, a loss or a gradient must also have been wrong for the
        predictions that it was given.
        """
        parts = self.parts
        if parts is None or self.task.draw is None:
            return parts
        erring = first(self.fusedloss_error, allowance(self.torch_error, np.float64(1.0)))
        return None if erring is None else max(parts, erring)


def allowance(errors: Floats, scale: Floats | np.float64) -> Floats:
    ulp = float(np.finfo(np.float32).eps)
    return ROUNDING_FACTOR * np.maximum.accumulate(errors) + FLOOR_ULPS * ulp * scale


def first(values: Floats, bound: Floats) -> int | None:
    """The first step at which a value is not within the bound, as NaN never is."""
    steps = np.flatnonzero(~(values <= bound))
    return int(steps[0]) if len(steps) else None


def train(task: Task, seed: int, epochs: int, on_step: OnStep = lambda done, total: None) -> Result:
    """Train side by side, step by step, from the same weights on the same batches."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        problem = task.build(seed)
    theirs = Run(task, problem, task.reference, torch.float32)
    ours = Run(task, problem, getattr(fused, task.loss), torch.float32)
    exact = Run(task, problem, task.reference, torch.float64)
    total = task.steps(problem.targets, epochs)
    for step, rows in enumerate(task.batches(problem.targets, epochs, seed)):
        # Whoever goes second finds warmer caches, so they take turns.
        for run in (theirs, ours) if step % 2 else (ours, theirs):
            run.step(rows)
        exact.step(rows)
        on_step(step + 1, total)
    with torch.no_grad():
        before, *scores = [problem.score(m) for m in (problem.model, theirs.model, ours.model)]
    warm = min(WARM_UP, total // 2)
    medians = [float(np.median(run.seconds[warm:])) * 1e6 for run in (theirs, ours)]
    return Result(
        task=task,
        before=before,
        scores=(scores[0], scores[1]),
        microseconds=(medians[0], medians[1]),
        torch=np.array(theirs.losses),
        fusedloss=np.array(ours.losses),
        float64=np.array(exact.losses),
        torch_error=np.array(theirs.errors),
        fusedloss_error=np.array(ours.errors),
    )
