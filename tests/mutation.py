"""Errors planted into formulas and kernels, one at a time; the suite must fail on each.

A mutant is a text that occurs once in a file, and what to put in its place. Each is applied to a copy of
this checkout, built anew where it concerns the kernels, and a part of the suite is run against it.
`make mutation` tries all of them; `make test` those of the Python files that need no build.
"""

# ruff: noqa: E501 - a row of the table is a line

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import elsewhere

PROCESSES = 2
AGAINST_TORCH = "equals_torch"
KERNELS = "(kernel_at or equals_torch or any_incoming)"


@dataclass(frozen=True)
class Mutant:
    file: str
    old: str
    new: str
    tests: str  # what pytest's -k selects
    files: tuple[str, ...] = elsewhere.LOSSES
    build: bool = False  # formulas are kernels too

    @property
    def builds(self) -> bool:
        return self.build or self.file.startswith("csrc/")

    def __str__(self) -> str:
        return f"{self.file}: {self.old!r} -> {self.new!r}"

    def occurrences(self) -> int:
        return (elsewhere.ROOT / self.file).read_text().count(self.old)

    def fails(self) -> bool:
        """Whether the tests fail on a copy that has it."""
        with tempfile.TemporaryDirectory() as folder:
            root = elsewhere.copy(Path(folder) / "copy", kernels=not self.builds)
            path = root / self.file
            path.write_text(path.read_text().replace(self.old, self.new))
            if self.builds:
                elsewhere.build(root, "-O0", "-w")
            done = elsewhere.pytest_there(root, ["-x", "-k", self.tests, *self.files])
        if done.returncode > 1:
            raise RuntimeError(
                f"{self}: the tests do not run\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
            )
        return done.returncode != 0  # below 0 for a crash, which nobody overlooks


def formula(file: str, old: str, new: str, loss: str, **more: Any) -> Mutant:
    return Mutant(f"src/fusedloss/{file}", old, new, f"{AGAINST_TORCH} and {loss}", **more)


def kernel(file: str, old: str, new: str, tests: str, **more: Any) -> Mutant:
    return Mutant(f"csrc/{file}", old, new, tests, **more)


REGRESSION, BINARY = "losses/regression.py", "losses/binary.py"
DIVERGENCE, METRIC = "losses/divergence.py", "losses/metric.py"
LINEAR: dict[str, Any] = {
    "files": tuple(f"tests/heads/test_{n}.py" for n in ("formula", "log_prob", "divergence"))
}
HEADS = "loop_is_the_formula or log_prob or divergence"
DIVIDED: dict[str, Any] = {"files": ("tests/losses/test_denominator.py",)}
SHARDS: dict[str, Any] = {"files": ("tests/distributed/test_class_groups.py",)}
SHARDED, OF_SHARDS = "matrix and kernels and float64", "src/fusedloss/engines/chunks/shards.py"
PLACED = "src/fusedloss/route/shards_again.py"
PLACED_AGAIN: dict[str, Any] = {"files": ("tests/distributed/test_again.py",)}
ERRORS: dict[str, Any] = {"files": ("tests/front/test_errors.py",)}
REPEAT: dict[str, Any] = {"files": ("tests/route/test_repeat.py",)}
SHORT: dict[str, Any] = {"files": ("tests/route/test_short_way.py",)}
OPERATORS = "src/fusedloss/autograd/operators.py"
COMPILED: dict[str, Any] = {"files": ("tests/autograd/test_compiled.py",)}
AGAIN = "src/fusedloss/engines/cpu/engine.py"
OVERLAPS = ("tests/losses/test_overlaps.py",)
CE, NLL, TRIPLET = "cross_entropy", "nll_loss", "triplet_margin_loss"

# fmt: off
MUTANTS = [
    # formulas
    formula(REGRESSION, "return (x - t) * (x - t)", "return (x - t) * (x + t)", "mse_loss"),
    formula(REGRESSION, "slope = 2.0 * (x - t)", "slope = x - t", "mse_loss"),
    formula(REGRESSION, "(x - t)\n    return slope, -slope", "(x - t)\n    return slope, slope", "mse_loss"),
    formula(BINARY, "is 0 or 1.\n    return -(t *", "is 0 or 1.\n    return -((1.0 - t) *", "binary_cross_entropy"),
    formula(BINARY, "slope = m.where(x > 0.0, 1.0 - t, -t)", "slope = m.where(x > 0.0, 1.0 + t, -t)", "logits"),
    formula(BINARY, "(1.0 - t) - tail, tail - t), -x", "(1.0 - t) - tail, tail - t), x", "logits"),
    formula(BINARY, "rest = (1.0 - t + w * t)", "rest = (1.0 - t)", "logits"),
    formula(BINARY, "head, tail) - w * t", "head, tail) + w * t", "logits"),
    formula(BINARY, "m.log_sigmoid(-x) - w * m.log_sigmoid(x)", "m.log_sigmoid(-x) - m.log_sigmoid(x)", "logits"),
    formula("losses/focal.py", "p * q * (other - one) / some", "p * q / some", "sigmoid_focal", build=True),
    formula("losses/gaussian.py", "0.5 * (1.0 - d * slope) / v", "0.5 * (1.0 - slope) / v", "gaussian", build=True),
    formula("losses/labels.py", "m.where(margin - x >= 0.0, -1.0, 0.0)", "m.where(margin - x >= 0.0, 0.0, -1.0)", "hinge", build=True),
    Mutant(f"src/fusedloss/{BINARY}", "(x - t) / m.maximum((1.0 - x) * x, 1e-12)", "(x - t) / m.maximum((1.0 - x) * x, 1e-3)", "towards_the_edges", build=True),
    Mutant(f"src/fusedloss/{BINARY}", "(x >= 0.0) & (x <= 1.0)", "(x > 0.0) & (x <= 1.0)", "towards_the_edges", build=True),
    Mutant(f"src/fusedloss/{BINARY}", "(t >= 0.0) & (t <= 1.0)", "(t >= 0.0)", "binary_cross_entropy and target", **ERRORS, build=True),
    formula(DIVERGENCE, "t * (m.log_or_zero(t) - x)", "t * (m.log_or_zero(t) + x)", "kl_div"),
    formula(DIVERGENCE, "m.log_or_zero(t) - x + 1.0", "m.log_or_zero(t) - x", "kl_div"),
    formula(DIVERGENCE, "finite)) * (finite - x)", "finite)) * (finite + x)", "kl_div"),
    formula(DIVERGENCE, "raised = p * (finite - x + 1.0)", "raised = p * (finite - x)", "kl_div"),
    formula(METRIC, "return m.maximum(margin + near - far, 0.0)", "return m.maximum(margin - near + far, 0.0)", "distance_loss"),
    formula(METRIC, "slope = m.where(margin + near - far < 0.0, 0.0, 1.0)", "slope = m.where(margin + near - far < 0.0, 1.0, 0.0)", "distance_loss"),
    formula(METRIC, "by_dot * input2 + 2.0 * by_first * input1", "by_dot * input2 + by_first * input1", "cosine"),
    formula(METRIC, "m.maximum(cosine - margin, 0.0), 0.0)", "m.maximum(cosine, 0.0), 0.0)", "cosine"),
    formula("losses/multilabel.py", "return weight * head, -weight * m.log_sigmoid(m.abs(input))", "return weight * head, -m.log_sigmoid(m.abs(input))", "soft_margin"),
    formula("losses/multilabel.py", "by_target = m.where(by_head == 0.0, 0.0, -by_head * input)\n    return", "by_target = m.where(by_head == 0.0, 0.0, by_head * input)\n    return", "soft_margin"),
    formula("kinds/margins.py", "+ passing * (self.margin - own)", "+ passing * (self.margin + own)", "multilabel_margin"),
    formula("kinds/margins.py", "(gaps <= 0) | own, 0)", "(gaps <= 0), 0)", "multi_margin"),
    formula("kinds/rows.py", "(1 - self.smoothing) * target +", "(1 + self.smoothing) * target +", CE),
    formula("kinds/rows.py", "losses = -slope * own", "losses = slope * own", CE),
    formula("kinds/rows.py", "reduce.sum_of(torch.where(counted, own_weight, 0))", "reduce.sum_of(own_weight)", CE),
    Mutant("src/fusedloss/core/indices.py", "(index < 0) | (index >= classes)", "(index < 0) | (index > classes)", "index and formula", **ERRORS),
    formula("kinds/rows.py", "flat = self.smoothing / max(log_p.shape[1], 1)", "flat = self.smoothing / max(log_p.shape[1] - 1, 1)", CE),
    formula("kinds/ctc.py", "labels[:, 1:] != labels[:, :-1]", "labels[:, 1:] == labels[:, :-1]", "ctc_loss"),
    kernel("ctc.h", "nle[j] = top + ye[j];", "nle[j] = top;", "equals_torch and ctc_loss"),
    kernel("ctc.h", "-scale * sums_", "scale * sums_", "equals_torch and ctc_loss"),
    kernel("ctc.h", "if (span + 1 < spans()) walk(span);", "", "long_sequences", files=("tests/kinds/test_ctc.py",)),
    formula("kinds/reduction.py", "difference = gap + eps", "difference = gap", TRIPLET),
    formula(METRIC, "return m.maximum(margin + near - least, 0.0)", "return m.maximum(near - least, 0.0)", TRIPLET),
    formula("core/reduce.py", "return losses.mean() if denominator is None else losses.sum() / denominator", "return losses.mean()", "(batchmean or weight)"),
    formula("kinds/formula.py", "grads[0] * s if need", "s if need", "mse_loss"),
    # the loop of pointwise losses
    kernel("pointwise.h", "if (a.grad[d].data) multiply(b.grad[d], m, n);", ";", KERNELS + " and mse_loss"),
    kernel("pointwise.h", "total_sum(sums) / a.denominator", "total_sum(sums)", KERNELS + " and mse_loss"),
    kernel("pointwise.h", "std::min(block_size, a.numel - start)", "std::min(block_size - 1, a.numel - start)", KERNELS + " and mse_loss"),
    kernel("pointwise.h", "- size(d) * stride(slot, d);", "- (size(d) - 1) * stride(slot, d);", KERNELS + " and mse_loss"),
    kernel("parallel.h", "position < seen &&", "position > seen &&", "input", **ERRORS),
    kernel("formula.h", "inside = inside & lie(i)", "inside = lie(i)", "input", **ERRORS),
    kernel("formula.h", "add_to_lanes(b.values, count, b.lanes);", "", KERNELS + " and mse_loss"),
    kernel("formula.h", "at += turn", "at += 2 * turn", KERNELS + " and kl_div"),
    # sums
    kernel("parallel.h", "for (int64_t i = whole; i < n; ++i) sums[i - whole]", "for (int64_t i = whole; i + 1 < n; ++i) sums[i - whole]", KERNELS + " and mse_loss"),
    kernel("parallel.h", "(u[j + 2 * lanes] + u[j + 3 * lanes])", "u[j + 2 * lanes]", KERNELS + f" and {CE}"),
    kernel("parallel.h", "        add_group(rest, sums);", "", KERNELS + f" and {CE}"),
    # rows
    kernel("transpose.h", "side + j - half : j", "side + j : j", KERNELS + f" and {CE}"),
    kernel("cross_entropy_tiles.h", "++c) to(c)[i] = T(0);", "++c) to(c)[i] *= T(0);", "an_ignored_row"),
    kernel("labels.h", "(y < 0 || y >= classes)", "(y < 0 || y > classes)", "index and function", **ERRORS),
    kernel("labels.h", "a.denominator != 0 ? a.denominator : count", "count", "divides_by_it and cross_entropy", **DIVIDED),
    kernel("ctc.h", "arrives / (parts * a.denominator)", "arrives / (parts * double(a.n))", "divides_by_it and ctc", **DIVIDED),
    Mutant("src/fusedloss/route/dispatch.py", "return (total / denominator).to(call.dtype)", "return total.to(call.dtype)", "divides_by_it and learned", **DIVIDED),
    Mutant("src/fusedloss/distributed.py", "if averaged else total", "if not averaged else total", "processes", files=("tests/distributed/test_count.py",)),
    Mutant("src/fusedloss/distributed.py", "all_reduce(found, group=group)", "broadcast(found, 0, group=group)", "processes", files=("tests/distributed/test_count.py",)),
    kernel("labels.h", "return a.mean ? g / denominator : g;", "return g;", KERNELS + f" and {CE}"),
    kernel("cross_entropy_rows.h", "s.others = brought(s.others, double(max) - double(top));", "", KERNELS + f" and {CE}"),
    kernel("cross_entropy_rows.h", "s.dot += s.mass * (s.max - double(origin));", "s.dot -= s.mass * (s.max - double(origin));", KERNELS + f" and {CE}"),
    kernel("softmax.h", "return mass * log_sum() - dot;", "return mass * log_sum() + dot;", KERNELS + f" and {CE}"),
    kernel("cross_entropy_rows.h", "scale * std::exp(origin - s.max);", "scale;", KERNELS + f" and {CE}"),
    kernel("dice.h", "of[p.y[i]].missed += rest[i];", "of[p.y[i]].missed += own[i];", "equals_what_users and dice", files=OVERLAPS),
    kernel("dice.h", "losses[i] * p.others[i]);", "losses[i]);", "equals_what_users and cross_entropy", files=OVERLAPS),
    kernel("dice_masks.h", "slope * (less * (1 - less))", "slope * less", "equals_what_users and masks", files=OVERLAPS),
    kernel("dice.h", "(inside[i] - wrong_slope[i]) + beyond[i]", "inside[i] + beyond[i]", "certain_and_wrong", files=OVERLAPS),
    kernel("dice_masks.h", "of_largest[i]) + beyond[i]", "of_largest[i])", "certain_and_wrong", files=OVERLAPS),
    kernel("overlap.h", "by_apart = r.share / r.below", "by_apart = r.above / r.below", "certain_and_wrong", files=OVERLAPS),
    kernel("overlap.h", "below == 0 ? 0.0 : above / below", "above / below", "empty_mask", files=OVERLAPS),
    kernel("overlap.h", "by_both - a.beta * by_apart", "by_both - a.alpha * by_apart", "equals_what_users and tversky", files=OVERLAPS),
    kernel("positions.h", "p.weight[i] *= f.slope;", "p.weight[i] *= f.value;", KERNELS + " and softmax_focal"),
    kernel("positions.h", "largest[i] == c ? p.dots[i]", "is_own ? p.dots[i]", "another_class_is_certain", files=("tests/losses/test_focal.py",)),
    kernel("focal.h", "rest == 0 ? 1.0", "rest == 0 ? 0.0", KERNELS + " and softmax_focal"),
    kernel("positions.h", "p.masses[i] * log_sum - p.dots[i]", "p.masses[i] * log_sum", KERNELS + f" and {CE}"),
    kernel("positions.h", "scale * (mass * own - own_weight * others)", "scale * (mass * own + own_weight * others)", KERNELS + f" and {CE}"),
    # the negative log likelihood
    kernel("nll.h", "-rows.class_weight(y) * convert", "rows.class_weight(y) * convert", KERNELS + f" and {NLL}"),
    kernel("nll.h", "(-rows.class_weight(y) * g)", "(-rows.class_weight(y))", KERNELS + f" and {NLL}"),
    kernel("nll.h", "a.grad.stride[2] == a.c &&", "a.grad.stride[2] == a.c ||", KERNELS + f" and {NLL}"),
    # reductions
    kernel("reduction.h", "out[i] = f * v[i] + g * w[i];", "out[i] = f * v[i] - g * w[i];", KERNELS + f" and {TRIPLET}"),
    kernel("reduction.h", "scale /= double(ties);", "", "share_the"),
    Mutant(f"src/fusedloss/{METRIC}", "m.where(other < far, 0.0, 0.5)", "m.where(other < far, 0.0, 0.0)", "share_the", build=True),
    kernel("reduction.h", "by[k] == 0 ? 0 : g * by[k]", "by[k]", KERNELS + f" and {TRIPLET}"),
    # margins
    kernel("margins.h", "if (g) g[y] -= T(found.slope);", ";", KERNELS + " and multi_margin"),
    kernel("margins.h", "live_[size_t(y_[size_t(k)])] = T(1);", ";", KERNELS + " and multi_margin"),
    kernel("margins.h", "while (count < a_.labels && y_[size_t(count)] >= 0) ++count;", "count = 1;", KERNELS + " and multilabel_margin"),
    # heads without logits
    kernel("linear.h", "loss += a.z_loss * lse * lse;", "loss += a.z_loss * lse;", HEADS, **LINEAR),
    kernel("linear.h", "g[i] *= (T(1) - t) * (T(1) + t);", "g[i] *= T(1) - t;", HEADS, **LINEAR),
    kernel("linear.h", "s.own = brought(s.own, gap);", "", HEADS, **LINEAR),
    kernel("linear.h", "brought(products + gap * this->raised_sum(), gap)", "brought(products, gap)", HEADS, **LINEAR),
    kernel("linear.h", "- slope * mean_x +", "+", HEADS, **LINEAR),
    kernel("linear.h", "if (kept && !a.begin) s = *kept;", "", HEADS, **LINEAR),
    kernel("head_rows.h", "rows.scale()[k] /= divisor;", ";", HEADS, **LINEAR),
    kernel("head_rows.h", "rows.loss()[k] * rows.share()[k]", "rows.loss()[k]", HEADS, **LINEAR),
    kernel("divergence_sums.h", "moved(raised_sum(), (max - largest) * by);", "raised_sum();", HEADS, **LINEAR),
    kernel("distill.h", "(a.of_teacher && a.of_student ? 1 - a.beta : 1.0)", "1.0", HEADS, **LINEAR),
    kernel("distill.h", "T(mean() + double(own_gap)), out", "own_gap, out", HEADS, **LINEAR),
    kernel("distill.h", "s[y - c] = T(-hard_scale * (hard.others / hard.raised_sum()));", "", HEADS, **LINEAR),
    # shards of the classes
    kernel("linear.h", "all.others += brought(s.others, gap)", "all.others += s.others", SHARDED, **SHARDS),
    kernel("linear.h", "s.dot + (s.mass != 0 ? s.mass * gap : 0.0)", "s.dot", SHARDED, **SHARDS),
    kernel("linear.h", "a.label ? a.label[n] - a.first : -1;\n        const bool", "a.label ? a.label[n] : -1;\n        const bool", SHARDED, **SHARDS),
    Mutant(OF_SHARDS, "stretch = kernel.Stretch(shard.first + first,", "stretch = kernel.Stretch(first,", SHARDED, **SHARDS),
    Mutant(OF_SHARDS, "self.shard.all_reduce(self.grads[0])", "pass", SHARDED, **SHARDS),
    kernel("divergence_sums.h", "others += moved(s.raised_sum(), (s.max - max) * by);", "others += s.raised_sum();", SHARDED, **SHARDS),
    kernel("divergence_sums.h", "moved(all.hard_own, before - now) + ", "", SHARDED, **SHARDS),
    kernel("divergence_sums.h", "if (s.student.max > all.student.max) all.at = s.at;", "all.at = s.at;", SHARDED, **SHARDS),
    kernel("distill.h", "all.student.top += double(a.first);", "", SHARDED, **SHARDS),
    Mutant(OF_SHARDS, "total += each", "pass", SHARDED, **SHARDS),
    # counts of all processes
    Mutant("src/fusedloss/route/shards.py", "count = sums[1]", "count = self.counted", "derivatives", **PLACED_AGAIN),
    Mutant("src/fusedloss/route/shards.py", "total + row[0], count + row[1]", "total + row[0], count", "derivatives", **PLACED_AGAIN),
    # calls of DTensors like earlier ones
    Mutant(PLACED, "if own is not place and own != place:", "if False:", "other_tensors", **PLACED_AGAIN),
    Mutant(PLACED, "arrived.to(torch.float64) * ctx.factor", "arrived.to(torch.float64)", "derivatives", **PLACED_AGAIN),
    Mutant(PLACED, "again.over(*number) if number else again", "again", "over_denominators", **PLACED_AGAIN),
    Mutant(PLACED, "replace(of.whole.call, denominator=ctx.number[0]) if of.over else of.whole.call", "of.whole.call", "over_denominators", **PLACED_AGAIN),
    Mutant(PLACED, "local._version != version", "False", "tensors_that_change", **PLACED_AGAIN),
    Mutant(PLACED, "factor == 1.0 and arrived", "factor != 2.0 and arrived", "derivatives", **PLACED_AGAIN),
    # repeated calls
    Mutant(AGAIN, "(number, 1.0 / number)[: len(divisors)]", "(7.0, 1.0 / 7)[: len(divisors)]", "over_denominators", **SHORT),
    Mutant("src/fusedloss/engines/cpu/again.py", "replace(self.call, denominator=number), number=number", "self.call, number=number", "only_checks_know", **SHORT),
    Mutant(AGAIN, "if summed else None", "if False else None", "broadcast", **REPEAT),
    Mutant(AGAIN, "zip(self.pointers.grads, plan.grads", "zip(self.pointers.grads[::-1], plan.grads", "packs_no", **REPEAT),
    Mutant(AGAIN, "if itself and not divisors:", "if itself:", "no_value_is_kept", **SHORT),
    Mutant("src/fusedloss/route/memo.py", "if it.alike(*tensors):", "if True:", "strides_make", **REPEAT),
    Mutant("src/fusedloss/autograd/functions.py", "        if scales_exactly(stored, incoming):\n", "        if True:\n", "do_not_depend", **REPEAT),
    Mutant("src/fusedloss/autograd/gradients.py", "if not plain or _keeps_graph():", "if not plain:", "given_away", **REPEAT),
    # torch.compile
    Mutant(OPERATORS, "if incoming.item() != 1.0:", "if incoming.item() == 1.0:", "default_backend and mse_loss", **COMPILED),
    Mutant(OPERATORS, "if scales_exactly((gradient,), incoming):", "if True:", "rounded_once and mse_loss", **COMPILED),
    Mutant("src/fusedloss/core/inductor.py", "isinstance(inputs.get(source.target), DonatedBuffer)", "True", "given_away and mse_loss", **COMPILED),
    Mutant("src/fusedloss/kinds/pointwise.py", "self.reduction != \"none\"\n", "self.reduction == \"none\"\n", "large_tensors_take", **COMPILED),
    kernel("abi.cpp", "arguments[places[i]] = pointers[i];", "arguments[places[0]] = pointers[0];", "do_not_depend", **REPEAT),
    # types
    kernel("convert.h", "(u + 0x7fffu + ((u >> 16) & 1u)) >> 16", "u >> 16", "ties_round"),
    kernel("convert.h", "0xfffu + ((magnitude >> 13) & 1u)", "0xfffu", "ties_round"),
]
# fmt: on
SAMPLE = [m for m in MUTANTS if m.file.endswith(("regression.py", "divergence.py"))][::3][:3]


def survivors(mutants: Sequence[Mutant]) -> list[Mutant]:
    def tried(mutant: Mutant) -> bool:
        start = time.monotonic()
        seen = mutant.fails()
        word = "seen" if seen else "SURVIVES"
        print(f"{word} ({time.monotonic() - start:.0f} s) {mutant}", flush=True)
        return seen

    with ThreadPoolExecutor(PROCESSES) as pool:
        return [m for m, seen in zip(mutants, pool.map(tried, mutants), strict=True) if not seen]


def main() -> int:
    words = sys.argv[1:]  # of the mutants to try
    chosen = [m for m in MUTANTS if all(word in str(m) for word in words)]
    left = survivors(chosen)
    print(f"mutation: {len(chosen) - len(left)} of {len(chosen)} mutants seen")
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
