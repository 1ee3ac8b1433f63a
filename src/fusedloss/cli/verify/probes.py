"""The fixed inputs of `fusedloss verify`: random bulk, and the hard places of each loss."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Generator, Tensor

from ...front.definition import REGISTRY, Loss, normal, uniform
from ...losses.heads import CLASSES

Tensors = tuple[Tensor, ...]
Draw = Callable[[int, torch.dtype, Generator], Iterator[Tensors]]

INF = math.inf
TINY = 2.0**-149  # the least positive float32
BELOW_ONE = 1 - 2.0**-24
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "rows": lambda t: t.clone(),
    "columns": lambda t: t.t().clone().t() if t.dim() == 2 else t.clone(),
    "dims": lambda t: _batched(t).movedim(2, 1).contiguous() if t.dim() == 2 else _batched(t),
}


def _batched(tensor: Tensor) -> Tensor:
    return tensor.clone().unflatten(0, (2, -1))


@dataclass(frozen=True)
class Probe:
    """Tensors and options of one call; losses over rows of classes run in several layouts."""

    loss: str  # its key in the registry
    option: str
    kind: str
    tensors: Tensors
    options: dict[str, Any] = field(default_factory=dict)
    layouts: tuple[str, ...] = ("rows",)

    @property
    def registered(self) -> Loss:
        return REGISTRY[self.loss]

    @property
    def dtype(self) -> torch.dtype:
        return self.tensors[0].dtype

    def arranged(self, layout: str) -> Probe:
        """The same rows in another layout; `flat` undoes it."""
        return replace(self, tensors=tuple(LAYOUTS[layout](t) for t in self.tensors))


def flat(tensor: Tensor, layout: str, classes: bool) -> Tensor:
    """A result in the order of the "rows" layout."""
    if layout != "dims":
        return tensor
    return (tensor.movedim(1, -1) if classes else tensor).flatten(0, 1)


def probes(key: str, dtype: torch.dtype, count: int) -> Iterator[Probe]:
    """About `count` elements of bulk over all options, and the hard ones of the loss."""
    loss = REGISTRY[key]
    generator = Generator().manual_seed(7)
    classes = loss.kind == "rows"
    options_of = {**loss.options, **loss.extensions}
    count = math.ceil(count / len(options_of))
    for option, make in options_of.items():

        def probe(kind: str, tensors: Tensors, option: str = option, make: Any = make) -> Probe:
            layouts = tuple(LAYOUTS) if classes else ("rows",)
            options = make(tensors, generator)
            if "ignore_index" in options and kind == "hard" and classes:
                input, target = tensors
                ignored = (target == options["ignore_index"]).unsqueeze(1)
                tensors = input.masked_fill(ignored, math.nan), target
            return Probe(key, option, kind, tensors, options, layouts)

        for shape in _shapes(loss, classes, count):
            yield probe("bulk", loss.example(shape, dtype, generator))
        for tensors in HARD.get(key, _none)(count, dtype, generator):
            yield probe("hard", tuple(t.to(dtype) if t.is_floating_point() else t for t in tensors))


def _shapes(loss: Loss, classes: bool, count: int) -> Sequence[tuple[int, ...]]:
    if classes:
        long = max(count, 100)  # past one block of the kernels, where many are wanted
        return (2 * math.ceil(count / 20), 10), (2, long)
    if loss.kind == "sequences":
        return (math.ceil(count / 60), 5, 4), (math.ceil(count / 60), 8), (2, 7, 100)
    if loss.kind == "heads":
        return ((math.ceil(count / 48), 8), (3, 200))
    return ((math.ceil(count / 24), 8),) if loss.rows else ((count,),)


def _none(*_: Any) -> Iterator[Tensors]:
    return iter(())


def _grid(*axes: Sequence[float]) -> Tensors:
    """Every combination."""
    columns = zip(*itertools.product(*axes), strict=True)
    return tuple(torch.tensor(column, dtype=torch.float64) for column in columns)


def _powers(count: int, generator: Generator, low: float, high: float) -> Tensor:
    """Numbers whose logarithms are spread evenly."""
    return 10 ** uniform((count,), torch.float64, generator, low, high)


def _edge(shape: tuple[int, ...], dtype: torch.dtype, generator: Generator) -> Tensor:
    """Numbers x around which exp(-x) is subnormal in the type that is computed in, and ends."""
    info = torch.finfo(torch.float64 if dtype is torch.float64 else torch.float32)
    least = -math.log(info.smallest_normal)
    return uniform(shape, torch.float64, generator, least - 4, least - math.log(info.eps) + 4)


def _targets(count: int, generator: Generator) -> Tensor:
    """A third each at 0, at 1 and between."""
    third = torch.arange(count) % 3
    between = uniform((count,), torch.float64, generator, 0, 1)
    return torch.where(third == 0, 0.0, torch.where(third == 1, 1.0, between))


def _mse(count: int, dtype: torch.dtype, generator: Generator) -> Iterator[Tensors]:
    edges = (0.0, 1.0, -1.0, TINY, 1e-20, 1e19, -1e38, 60000.0)
    yield _grid(edges, edges)
    x = normal((count // 4,), dtype, generator)
    steps = torch.randint(-3, 4, x.shape, generator=generator)
    yield x, x * (1 + steps * torch.finfo(dtype).eps)  # differences that cancel


def _bce(count: int, dtype: torch.dtype, generator: Generator) -> Iterator[Tensors]:
    edges = (0.0, 1.0, TINY, 1e-30, 1e-12, 1e-6, 0.5, 1 - 1e-6, BELOW_ONE)
    yield _grid(edges, (0.0, 1.0, TINY, 1e-3, 0.5, BELOW_ONE))
    n = count // 2
    near = torch.cat([_powers(n, generator, -38, 0), 1 - _powers(n, generator, -7.2, 0)])
    yield near, _targets(2 * n, generator)


def _logits(count: int, dtype: torch.dtype, generator: Generator) -> Iterator[Tensors]:
    edges = (0.0, TINY, 17.0, 20.0, 88.0, 104.0, 700.0, 1e4, 6e4)
    targets = (0.0, 1.0, TINY, 1e-3, 0.5, BELOW_ONE)
    yield _grid([*edges, *(-x for x in edges)], targets)
    yield _grid((INF, -INF), (0.25, 0.5))
    n = count // 2
    yield uniform((n,), torch.float64, generator, -120, 120), _targets(n, generator)
    x = _edge((n,), dtype, generator)
    yield torch.where(torch.arange(n) % 2 == 0, x, -x), _targets(n, generator)


def _marked(count: int, dtype: torch.dtype, generator: Generator) -> Iterator[Tensors]:
    """Some targets are -1, which is ignored whatever the logit is."""
    for x, t in _logits(count, dtype, generator):
        some = torch.arange(len(x)) % 5 == 0
        yield x.masked_fill(some, math.nan), t.masked_fill(some, -1.0)


def _labelled(count: int, dtype: torch.dtype, generator: Generator) -> Iterator[Tensors]:
    """Of -1 and 1, and now and then of something else."""
    edges = (0.0, TINY, 0.3, 1.0, 17.0, 88.0, 104.0, 700.0, 6e4)
    yield _grid([*edges, *(-x for x in edges)], (1.0, -1.0, 0.5))
    x = uniform((count // 2,), torch.float64, generator, -120, 120)
    labels = 2 * torch.randint(2, x.shape, generator=generator) - 1.0
    yield x, labels
    x = _edge(x.shape, dtype, generator)
    yield torch.where(torch.arange(len(x)) % 2 == 0, x, -x), labels


def _ranked(count: int, dtype: torch.dtype, generator: Generator) -> Iterator[Tensors]:
    for x, t in _mse(count, dtype, generator):
        yield x, t, 2 * torch.randint(2, x.shape, generator=generator) - 1.0


def _gaussian(count: int, dtype: torch.dtype, generator: Generator) -> Iterator[Tensors]:
    variances = (0.0, TINY, 1e-20, 1e-6, 1e-3, 1.0, 1e4)
    yield _grid((0.0, 0.9, -1.1, 60.0), (0.0, 0.7), variances)
    x, t = normal((2, count // 4), dtype, generator).unbind()
    d = (x - t).double()
    yield x, t, d * d * (1 + 1e-3 * normal(d.shape, torch.float64, generator))  # slopes that cancel
    yield x, t, _powers(len(x), generator, -5, 4)


def _kl(count: int, dtype: torch.dtype, generator: Generator) -> Iterator[Tensors]:
    yield _grid((0.0, -1.0, -30.0, -1e4, 0.5), (0.0, 1.0, TINY, 1e-30, 0.5, BELOW_ONE))
    yield _grid((-INF,), (0.0,))
    t = _powers(count // 2, generator, -30, 0).to(dtype)
    yield t.double().log() * (1 + 1e-6 * normal(t.shape, torch.float64, generator)), t
    yield t.double().log(), t  # a divergence that cancels


def _kl_log(count: int, dtype: torch.dtype, generator: Generator) -> Iterator[Tensors]:
    yield _grid((0.0, -1.0, -30.0, -1e4, 0.5), (-INF, -1e4, -80.0, -1.0, -TINY, 0.0, 3.0))
    yield _grid((-INF,), (-INF,))
    t = -_powers(count // 2, generator, -3, 2).to(dtype)
    yield t * (1 + torch.finfo(dtype).eps), t
    t = -_edge((count // 4,), dtype, generator).to(dtype)
    yield torch.full_like(t, -1.0), t
    yield t * (1 + torch.finfo(dtype).eps), t


def _cross_entropy(count: int, dtype: torch.dtype, generator: Generator) -> Iterator[Tensors]:
    return _hard_rows(count, dtype, generator)


def _soft_rows(count: int, dtype: torch.dtype, generator: Generator) -> Iterator[Tensors]:
    for x, y in _hard_rows(count, dtype, generator):
        one_hot = torch.nn.functional.one_hot(y, x.shape[1]).double()
        soft = 0.7 * one_hot + 0.3 * normal(x.shape, torch.float64, generator).softmax(1)
        certain = torch.arange(len(y)) % 2 == 0
        # A class that is masked has no probability.
        yield x, torch.where(certain[:, None] | x.isinf().any(1, True), one_hot, soft)


def _head(count: int, dtype: torch.dtype, generator: Generator) -> Iterator[Tensors]:
    """Each logit is a state of its own; half types hold no sums of large ones."""
    most = math.inf if dtype in (torch.float32, torch.float64) else 1000.0
    for x, y in _hard_rows(count // 2, dtype, generator, (CLASSES,)):
        if x.isfinite().all() and x.abs().max() < most:
            yield x, torch.eye(CLASSES), y


def _soft_head(count: int, dtype: torch.dtype, generator: Generator) -> Iterator[Tensors]:
    """No target is certain: p - q of a head cancels there."""
    for x, w, y in _head(count, dtype, generator):
        one_hot = torch.nn.functional.one_hot(y, CLASSES).double()
        yield x, w, 0.7 * one_hot + 0.3 * normal(x.shape, torch.float64, generator).softmax(1)


def _distilled(count: int, dtype: torch.dtype, generator: Generator) -> Iterator[Tensors]:
    """Not to where no exp is left, or the formula's slope of 'js' has no digits either."""
    w = torch.eye(CLASSES)
    for x, _, _ in _head(count, dtype, generator):
        if x.max() - x.min() < 70:
            yield x, w, x.flip(0), w
    x = normal((max(2, count // 48), CLASSES), dtype, generator).double()
    for step in (1e-1, 1e-3, 1e-5):  # divergences of about its square
        yield x, w, x + step * normal(x.shape, torch.float64, generator), w


def _hard_rows(
    count: int, dtype: torch.dtype, generator: Generator, sizes: Sequence[int] = (10, 70)
) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits and the class of each row: certain, offset, huge, tied, masked."""
    for classes in sizes:  # short rows and long ones take different kernels
        n = 2 * math.ceil(count / 8 / classes)
        x = normal((n, classes), torch.float64, generator)
        y = torch.randint(classes, (n,), generator=generator)
        own = torch.nn.functional.one_hot(y, classes).double()
        gaps = uniform((n, 1), torch.float64, generator, 5, 60)
        yield x + gaps * own, y  # certain: down to one in 10^26
        yield (x + gaps * own).round(), y
        yield x / 8 + _edge((n, 1), dtype, generator) * own, y  # to where no exp is left
        yield x - gaps * own, y
        yield 3 * x + 1e4, y
        yield 1e4 * x.sign(), y
        yield torch.full_like(x, 0.3), y
        yield x.masked_fill((x > 0) & (own == 0), -INF), y


def _nll(count: int, dtype: torch.dtype, generator: Generator) -> Iterator[Tensors]:
    for x, y in _hard_rows(count, dtype, generator):
        yield x.log_softmax(1), y


def _ctc(count: int, dtype: torch.dtype, generator: Generator) -> Iterator[Tensors]:
    """Of labels 1, 2, 2: certain, and nearly; large, masked, not normalised; without an alignment."""
    frames, n, classes = 12, 2 * math.ceil(count / 300), 4
    x = normal((frames, n, classes), torch.float64, generator)
    targets = torch.tensor([1, 2, 2]).expand(n, 3)
    lengths = torch.full((n,), frames), torch.full((n,), 3)
    path = torch.tensor([0, 1, 1, 0, 0, 2, 2, 2, 0, 2, 0, 0])
    own = torch.nn.functional.one_hot(path, classes).unsqueeze(1).double()
    gaps = uniform((1, n, 1), torch.float64, generator, 5, 60)
    for scores in (x + gaps * own, x - gaps * own, 300 * x):
        yield scores.log_softmax(2), targets, *lengths
    yield _edge((frames, n, 1), dtype, generator).neg() * own, targets, *lengths
    yield x.log_softmax(2).masked_fill((x > 1) & (own == 0), -INF), targets, *lengths
    yield x + 3, targets, *lengths
    yield (
        x.log_softmax(2),
        targets,
        torch.arange(n) % 7,
        lengths[1],
    )  # 4 frames at least have an alignment


def _triplet(count: int, dtype: torch.dtype, generator: Generator) -> Iterator[Tensors]:
    n = max(2, count // 100)
    a, b, c = (normal((n, 8), dtype, generator).double() for _ in range(3))
    yield a, a, a + c
    yield a, a * (1 + 1e-3 * b.to(dtype)), a + c  # distances near 0
    yield a + 1e4, b + 1e4, c + 1e4
    yield a, b, a + (b - a) * (1 + 1e-5)  # distances that cancel
    large = min(1e18, torch.finfo(dtype).max / 16)
    yield large * a, large * b, large * c


def _cosine(count: int, dtype: torch.dtype, generator: Generator) -> Iterator[Tensors]:
    """Small and large vectors, and those that are nearly parallel or orthogonal."""
    n = max(2, count // 100)
    a, b = (normal((n, 8), dtype, generator).double() for _ in "ab")
    similar = (2 * (torch.arange(n) % 2) - 1).double()
    ones = torch.ones(n, dtype=torch.float64)
    yield a * (1 + 1e-3 * b), a, ones
    yield -a, b - a * ((a * b).sum(1) / (a * a).sum(1)).unsqueeze(1), similar
    yield 1e-4 * a, 1e4 * b, similar
    yield torch.zeros_like(a), b, similar


def _soft_margin(count: int, dtype: torch.dtype, generator: Generator) -> Iterator[Tensors]:
    for x, t in _logits(count // 4, dtype, generator):
        n = max(1, len(x) // 8)
        yield x.repeat(8)[: 8 * n].reshape(n, 8), t.repeat(8)[: 8 * n].reshape(n, 8)


def _margin(count: int, dtype: torch.dtype, generator: Generator) -> Iterator[Tensors]:
    """Offset, tied; and gaps that are 0 exactly."""
    n = max(2, count // 100)
    x = normal((n, 8), dtype, generator).double()
    y = torch.randint(8, (n,), generator=generator)
    for each in (x + 1e4, x.round(), 1e3 * x, torch.full_like(x, 0.3)):
        yield each, y


def _margins(count: int, dtype: torch.dtype, generator: Generator) -> Iterator[Tensors]:
    for x, y in _margin(count, dtype, generator):
        sets = torch.full(x.shape, -1)
        sets[:, 0], sets[:, 1], sets[::2, 2] = y, (y + 3) % 8, y[::2]
        yield x, sets


def _images(count: int, dtype: torch.dtype, generator: Generator) -> Iterator[Tensors]:
    """Four classes, and where they are: near certain, right and wrong."""
    n, places = max(1, count // 300), 12
    x = normal((n, 4, places), torch.float64, generator)
    y = torch.randint(4, (n, places), generator=generator)
    own = torch.nn.functional.one_hot(y, 4).movedim(-1, 1).double()
    gaps = uniform((n, 1, places), torch.float64, generator, 3, 40)
    yield x + gaps * own, y
    yield x + gaps * own.flip(1), y
    yield x / 8 + _edge((n, 1, 1), dtype, generator) * own, y
    yield 3 * x + 1e3, y


def _masked(count: int, dtype: torch.dtype, generator: Generator) -> Iterator[Tensors]:
    for x, y in _images(count, dtype, generator):
        yield x, torch.nn.functional.one_hot(y, 4).movedim(-1, 1).double()


HARD: dict[str, Draw] = {
    "dice_loss": _images,
    "dice_loss[masks]": _masked,
    "mse_loss": _mse,
    "smooth_l1_loss": _mse,
    "soft_margin_loss": _labelled,
    "hinge_embedding_loss": _labelled,
    "margin_ranking_loss": _ranked,
    "gaussian_nll_loss": _gaussian,
    "sigmoid_focal_loss": _logits,
    "sigmoid_focal_loss[marked]": _marked,
    "binary_cross_entropy": _bce,
    "binary_cross_entropy_with_logits": _logits,
    "binary_cross_entropy_with_logits[marked]": _marked,
    "kl_div": _kl,
    "kl_div[log_target]": _kl_log,
    "cross_entropy": _cross_entropy,
    "cross_entropy[probabilities]": _soft_rows,
    "softmax_focal_loss": _cross_entropy,
    "nll_loss": _nll,
    "ctc_loss": _ctc,
    "triplet_margin_loss": _triplet,
    "cosine_embedding_loss": _cosine,
    "multilabel_soft_margin_loss": _soft_margin,
    "multi_margin_loss": _margin,
    "multilabel_margin_loss": _margins,
    "linear_cross_entropy": _head,
    "linear_cross_entropy[probabilities]": _soft_head,
    "linear_log_prob": _head,
    "linear_kl_div": _distilled,
}
