"""Where exps are subnormal, and logits far from 0: results keep the digits that their type has."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import mpmath
import numpy as np
import pytest
import torch
from conftest import formula_path, name_of
from torch import Generator, Tensor

from fusedloss import cross_entropy, kl_div, linear_cross_entropy, linear_kl_div

WIDE = np.finfo(np.longdouble).minexp < -2000 and np.finfo(np.longdouble).nmant > 60
pytestmark = pytest.mark.skipif(not WIDE, reason="long double is no wider than double here")

DTYPES = (torch.float32, torch.float64)
EDGE = {torch.float32: (80, 108), torch.float64: (700, 750)}  # gaps around which exp is subnormal
PATHS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "kernel": nullcontext,
    "formula": formula_path,
}
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
each_path = pytest.mark.parametrize("path", PATHS)
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t.clone(),
    "transposed": lambda t: t.t().contiguous().t(),
    "strided": lambda t: torch.stack([t, t], -1)[..., 0],
}


def certain(rows: int, classes: int, dtype: torch.dtype, generator: Generator) -> Tensor:
    """Logits whose class 0 is ahead of all others, by about the same in a row."""
    low, high = EDGE[dtype]
    gaps = low + (high - low) * torch.rand(rows, 1, generator=generator, dtype=torch.float64)
    x = torch.rand(rows, classes, generator=generator, dtype=torch.float64) - gaps
    x[:, 0] = 0.25
    return x.to(dtype)


def wide(tensor: Tensor) -> np.ndarray:
    return tensor.detach().double().numpy().astype(np.longdouble)


def assert_digits(
    found: Tensor, exact: np.ndarray, steps: int = 16, terms: np.ndarray | None = None
) -> None:
    """Within some ulps of what a rounding of the terms does, and of the smallest numbers."""
    info = torch.finfo(found.dtype)
    step = np.longdouble(info.smallest_normal) * info.eps
    allowed = 16 * info.eps * np.abs(200 * exact if terms is None else terms) + steps * step
    error = np.abs(wide(found) - exact)
    assert (error <= allowed).all(), f"{found.flatten()[:3]} is not {exact.flatten()[:3]}"


def exact_rows(x: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Loss and gradient of class 0."""
    e = np.exp(wide(x[:, 1:]) - wide(x[:, :1]))
    others = e.sum(1, keepdims=True)
    p = e / (1 + others)
    return np.log1p(others[:, 0]), np.concatenate([-p.sum(1, keepdims=True), p], 1)


@each_dtype
@each_path
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("classes", [2, 70, 300, 3000])
def test_cross_entropy_near_certainty(
    classes: int, layout: str, path: str, dtype: torch.dtype, generator: Generator
) -> None:
    x = certain(9, classes, dtype, generator)
    value, slope = exact_rows(x)
    y = torch.zeros(9, dtype=torch.long)
    q = torch.eye(classes, dtype=dtype)[y]
    weight = torch.linspace(2, 3, classes, dtype=dtype)
    with PATHS[path]():
        for target, w in ((y, None), (q, None), (y, weight), (q, weight)):
            leaf = LAYOUTS[layout](x).detach().requires_grad_()
            losses = cross_entropy(leaf, target, weight=w, reduction="none")
            (grad,) = torch.autograd.grad(losses.sum(), leaf)
            factor = 1 if w is None else 2
            assert_digits(losses, factor * value)
            # Autograd adds the others' gradients for the own class's, rounded.
            assert_digits(grad, factor * slope, 16 if path == "kernel" else 16 + 2 * classes)


@each_dtype
@each_path
def test_smoothing_near_certainty(path: str, dtype: torch.dtype, generator: Generator) -> None:
    """The gradient of classes that have no share themselves, since their weight is 0."""
    x = certain(5, 40, dtype, generator)
    _, slope = exact_rows(x)
    weight = torch.cat([torch.ones(1), torch.zeros(39)]).to(dtype)
    x.requires_grad_()
    with PATHS[path]():
        losses = cross_entropy(
            x, torch.zeros(5, dtype=torch.long), weight, label_smoothing=0.4, reduction="sum"
        )
        (grad,) = torch.autograd.grad(losses, x)
    assert_digits(grad[:, 1:], np.longdouble(0.6 + 0.4 / 40) * slope[:, 1:])


@each_dtype
@pytest.mark.parametrize("classes", [10, 70, 3000])
@pytest.mark.parametrize("by_columns", [False, True])
def test_small_gradients_arrive(
    classes: int, by_columns: bool, dtype: torch.dtype, generator: Generator
) -> None:
    """Exps wait as larger numbers: that costs a small incoming gradient nothing."""
    x = torch.randn(20, classes, generator=generator, dtype=torch.float64).to(dtype)
    x[:, ::3] -= 40
    q = torch.randn(20, classes, generator=generator, dtype=torch.float64).softmax(1).to(dtype)
    incoming = torch.full((20,), 1e-33 if dtype is torch.float32 else 1e-301, dtype=dtype)
    incoming[::2] = 1
    for target in (torch.arange(20) % classes, q):
        for soft in (0.0, 0.1):
            leaf = (LAYOUTS["transposed"](x) if by_columns else x.clone()).detach().requires_grad_()
            losses = cross_entropy(leaf, target, label_smoothing=soft, reduction="none")
            (grad,) = torch.autograd.grad(losses, leaf, incoming)
            p = np.exp(wide(x) - wide(x.max(1, keepdim=True)[0]))
            p /= p.sum(1, keepdims=True)
            b = (1 - np.longdouble(soft)) * (
                wide(target) if target.is_floating_point() else np.eye(classes)[target]
            ) + np.longdouble(soft) / classes
            g = wide(incoming)[:, None]
            assert_digits(grad, g * (p - b), terms=g * (60 * p + b))


@each_dtype
@each_path
@pytest.mark.parametrize("classes", [5, 1500])
def test_heads_near_certainty(
    classes: int, path: str, dtype: torch.dtype, generator: Generator
) -> None:
    bias = certain(1, classes, dtype, generator)[0].requires_grad_()
    value, slope = exact_rows(bias.detach()[None])
    zeros = torch.zeros(1, 1, dtype=dtype), torch.zeros(classes, 1, dtype=dtype)
    with PATHS[path]():
        for reduction in ("none", "sum"):
            loss = linear_cross_entropy(
                *zeros, torch.tensor([0]), linear_bias=bias, reduction=reduction
            )
            (grad,) = torch.autograd.grad(loss.sum(), bias)
            assert_digits(loss.reshape(1), value)
            steps = 16 if path == "kernel" else 16 + 2 * classes
            assert_digits(grad[None], slope, steps)


def test_target_gradients_of_heads_under_an_offset(generator: Generator) -> None:
    """-log p of each class, whatever all logits have in common."""
    q = torch.rand(1, 30, generator=generator).softmax(1).requires_grad_()
    bias = torch.randint(-9, 9, (30,), generator=generator).float()
    zeros = torch.zeros(1, 1), torch.zeros(30, 1)
    grads = [
        torch.autograd.grad(linear_cross_entropy(*zeros, q, linear_bias=b, reduction="sum"), q)[0]
        for b in (bias, bias + 2.0**20)
    ]
    torch.testing.assert_close(*grads, rtol=1e-6, atol=0)


@each_dtype
@each_path
def test_kl_div_of_small_log_probabilities(
    path: str, dtype: torch.dtype, generator: Generator
) -> None:
    low, high = EDGE[dtype]
    t = -(low + (high - low) * torch.rand(500, generator=generator, dtype=torch.float64)).to(dtype)
    x = torch.full_like(t, -1.0)
    leaves = x.requires_grad_(), t.requires_grad_()
    with PATHS[path]():
        terms = kl_div(*leaves, log_target=True, reduction="none")
        by_x, by_t = torch.autograd.grad(terms.sum(), leaves)
    p, gap = np.exp(wide(t)), wide(t) - wide(x)
    assert_digits(terms, p * gap)
    assert_digits(by_x, -p)
    assert_digits(by_t, p * (gap + 1))


# Divergences of heads


def exact_divergence(
    s: list[float], t: list[float], kind: str, beta: float
) -> tuple[mpmath.mpf, list[mpmath.mpf]]:
    """The divergence and its gradient by the student's logits."""
    exp, log, fsum = mpmath.exp, mpmath.log, mpmath.fsum

    def log_softmax(x: list[float]) -> list[mpmath.mpf]:
        top = max(x)
        away = [mpmath.mpf(v) - top for v in x]
        return [v - log(fsum(map(exp, away))) for v in away]

    ls, lt = log_softmax(s), log_softmax(t)
    ps, pt = [exp(v) for v in ls], [exp(v) for v in lt]

    def mean(p: list[mpmath.mpf], a: list[mpmath.mpf], b: list[mpmath.mpf]) -> mpmath.mpf:
        return fsum(w * (u - v) for w, u, v in zip(p, a, b, strict=True))

    if kind == "forward":
        return mean(pt, lt, ls), [p - q for p, q in zip(ps, pt, strict=True)]
    weight, other = mpmath.mpf(1), lt
    if kind == "js":
        weight = 1 - mpmath.mpf(beta)
        other = [log(beta * q + weight * p) for p, q in zip(ps, pt, strict=True)]
    reverse = mean(ps, ls, other)
    slope = [weight * p * (a - b - reverse) for p, a, b in zip(ps, ls, other, strict=True)]
    return reverse if kind == "reverse" else beta * mean(pt, lt, other) + weight * reverse, slope


SPREADS = ("tiny", "close", "far", "certain")


def logits(spread: str, generator: Generator) -> tuple[Tensor, Tensor]:
    """A student's and a teacher's, with log-probabilities down to -120."""
    s = torch.randn(12, generator=generator, dtype=torch.float64)
    t = torch.randn(12, generator=generator, dtype=torch.float64)
    if spread in ("tiny", "close"):
        return s, s + (2e-3 if spread == "tiny" else 0.04) * t
    if spread == "far":
        return s.abs() * -60, t.abs() * -60
    s[3], t[3] = s[3] + 50, t[3] + 30
    return s, t


KINDS = [("forward", 0.5), ("reverse", 0.5), ("js", 0.5), ("js", 1e-6), ("js", 1 - 1e-6)]


@each_dtype
@each_path
@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_divergences_keep_their_digits(
    kind: str, beta: float, path: str, dtype: torch.dtype, generator: Generator
) -> None:
    for spread in SPREADS:
        for offset in (0.0, 100.0, 1e4):
            s, t = logits(spread, generator)
            s, t = ((s + offset).to(dtype), (t - offset / 4).to(dtype))
            s.clamp_(min=s.max() - 119), t.clamp_(min=t.max() - 119)
            with mpmath.workdps(150):
                value, slope = exact_divergence(s.tolist(), t.tolist(), kind, beta)
                s.requires_grad_()
                with PATHS[path]():
                    loss = linear_kl_div(
                        torch.zeros(1, 1, dtype=dtype),
                        torch.zeros(12, 1, dtype=dtype),
                        linear_bias=s,
                        teacher_logits=t[None],
                        divergence=kind,
                        beta=beta,
                    )
                    (grad,) = torch.autograd.grad(loss, s)
                assert abs(loss.item() / value - 1) < 1e-3, (spread, offset)
                most = max(map(abs, slope))
                worst = max(abs(a - b) for a, b in zip(grad.tolist(), slope, strict=True))
                assert worst < 1e-3 * most, (spread, offset)


@each_path
@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16], ids=name_of)
def test_js_is_at_most_log_2(path: str, dtype: torch.dtype, generator: Generator) -> None:
    """Also where a probability of the mixture underflows."""
    for _ in range(3):
        s, t = (8 * torch.randn(4, 3000, generator=generator) for _ in range(2))
        s = s[:1].expand(4, -1)
        bias = s[0].to(dtype).requires_grad_()
        with PATHS[path]():
            losses = linear_kl_div(
                torch.zeros(4, 1, dtype=dtype),
                torch.zeros(3000, 1, dtype=dtype),
                linear_bias=bias,
                teacher_logits=t.to(dtype),
                divergence="js",
                temperature=0.5,
                reduction="none",
            )
            (grad,) = torch.autograd.grad(losses.sum(), bias)
        assert (losses > 0.3).all() and (losses <= np.log(2) * (1 + 1e-2)).all()
        if dtype is not torch.bfloat16:
            assert (losses <= np.log(2) * (1 + 1e-6)).all()
        assert grad.isfinite().all() and grad.any()


@each_path
@pytest.mark.parametrize("kind", ["forward", "reverse", "js"])
def test_what_a_divergence_of_no_probability_is(kind: str, path: str) -> None:
    """Infinite, or within its bound, where PyTorch's kl_div says so; never NaN."""
    student = torch.tensor([0.0, 1.0, -torch.inf])
    teacher = torch.tensor([[0.0, -torch.inf, 1.0]])
    with PATHS[path]():
        loss = linear_kl_div(
            torch.zeros(1, 1),
            torch.zeros(3, 1),
            linear_bias=student,
            teacher_logits=teacher,
            divergence=kind,
        )
    assert loss.item() < np.log(2) if kind == "js" else loss.item() == torch.inf
