"""The printer of formulas as C++: what it prints, and what it refuses, by file and line."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from fusedloss.engines.cpu import printer

TINY = """
def tiny(x, t, *, beta):
    \"\"\"The docstring is not printed.\"\"\"
    gap = m.abs(x - t)
    return m.where(gap < beta, gap * 2, m.inf)


def tiny_grad(x, t, *, beta):
    return -m.exp(x), t / 3.0


def tiny_domain(x, t, *, beta):
    return (x >= 0.0) & (t != 1)


TINY = Pointwise(tiny, tiny_grad, domain=tiny_domain)
"""

PRINTED = """
template <class T>
struct tiny {
    static constexpr int operands = 2;
    static constexpr int derivatives = 2;
    static constexpr int numbers = 1;
    static constexpr int stages = 1;
    static constexpr bool has_domain = true;
    static constexpr bool of_parts = false;
    // The stages of the value and of each derivative, as bits.
    static constexpr int needs[] = {0, 1, 0};
    T beta;
    explicit tiny([[maybe_unused]] const double* numbers) {
        beta = T(numbers[0]);
    }
    template <int k>
    inline T stage(T x, T t, T, T, T s0, T, T, T) const {
        if constexpr (k == 0) return math::exp(x);
    }
    inline T value(T x, T t, T, T, T s0, T, T, T) const {
        const T gap = math::abs((x - t));
        return math::where((gap < beta), (gap * T(2)), std::numeric_limits<T>::infinity());
    }
    inline void grad(T x, T t, T, T, T s0, T, T, T, T& d0, T& d1, T&, T&) const {
        d0 = (-s0);
        d1 = (t / T(3.0));
    }
    inline auto domain(T x, T t, T, T) const {
        return ((x >= T(0.0)) & (t != T(1)));
    }
};
"""


def text_of(sources: dict[str, str]) -> str:
    return "\n".join(printer.printed(sources).values())


def test_prints_a_formula() -> None:
    files = printer.printed({"losses/tiny.py": TINY, "losses/none.py": "m = 1"})
    assert files.keys() == {"formulas_tiny.cpp", "formulas.h"}
    assert PRINTED.strip() in files["formulas_tiny.cpp"]
    assert files["formulas.h"].rstrip().endswith("#define FUSEDLOSS_FORMULAS(X) X(tiny, 2, 2)")


@pytest.mark.parametrize(("ending", "found"), [(", domain=f_domain)", "true"), (")", "false")])
def test_finds_logarithms_of_both_parts(ending: str, found: str) -> None:
    source = """
def f(x, t):
    return m.log(x) + m.log1p(-x)
def f_grad(x, t):
    return x, t
def f_domain(x, t):
    return (x >= 0.0) & (x <= 1.0)
F = Pointwise(f, f_grad"""
    assert f"bool of_parts = {found};" in text_of({"f.py": source + ending})


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_prints_the_derivatives_that_there_are(count: int) -> None:
    slopes = "".join(f"{k}.0 * x, " for k in range(count))
    source = f"""
def f(x, t, w, v):
    return x
def f_grad(x, t, w, v):
    return {slopes}
F = Pointwise(f, f_grad)
"""
    text = text_of({"f.py": source})
    given = ", ".join(f"T& d{k}" if k < count else "T&" for k in range(4))
    assert f"inline void grad(T x, T t, T w, T v, T, T, T, T, {given}) const" in text
    assert f"int derivatives = {count};" in text
    assert f"d{count - 1} = (T({count - 1}.0) * x);" in text and f"d{count} =" not in text


@pytest.mark.parametrize(
    "x", ["x * t", "-x * t", "x * -t", "-(x * t)", "-x / (1.0 / t)", "m.abs(x) * t"]
)
def test_what_differs_in_signs_alone_shares_a_stage(x: str) -> None:
    other = "x / (1.0 / t)" if "/" in x else "x * t"
    source = f"""
def f(x, t):
    return m.sigmoid({x}) + m.log_sigmoid({other})
def f_grad(x, t):
    product = {x}
    return m.sigmoid(product), m.exp(-m.abs({other}))
F = Pointwise(f, f_grad)
"""
    text = text_of({"f.py": source})
    assert "int stages = 2;" in text and "needs[] = {3, 1, 1};" in text


def test_prints_conditions_that_are_set_first() -> None:
    source = """
def f(x, t):
    apart = (x != t) | (x > 1.0)
    return m.where(apart, x, 0.0)
def f_grad(x, t):
    return x, t
F = Pointwise(f, f_grad)
"""
    text = text_of({"f.py": source})
    assert "const auto apart = ((x != t) | (x > T(1.0)));" in text


FORMULA = "def f(x, t): return x{}\ndef g(x, t): return x, t\nF = Pointwise(f, g)\n"


def test_prints_a_formula_once() -> None:
    text = text_of({"one.py": FORMULA.format(""), "two.py": "\n" + FORMULA.format("")})
    assert text.count("struct f {") == 1 and text.endswith("X(f, 2, 2)\n")


def test_where_a_formula_stands_does_not_count() -> None:
    moved = text_of({"two.py": "\n\n# Moved.\n" + FORMULA.format("")})
    assert moved == text_of({"one.py": FORMULA.format("")})


def test_stages_what_is_shared_once() -> None:
    """sigmoid and log_sigmoid share exp(-|x|); a local variable is put in; a fifth call stays."""
    source = """
def f(x, t):
    twice = 2.0 * x
    return m.log_sigmoid(twice) + m.exp(t) + m.exp(x)
def f_grad(x, t):
    return m.sigmoid(-(2.0 * x)), m.log(t)
F = Pointwise(f, f_grad)
"""
    text = text_of({"f.py": source})
    assert "if constexpr (k == 0) return math::exp_minus_abs((T(2.0) * x));" in text
    assert "if constexpr (k == 1) return math::log1p_unit(s0);" in text
    assert "return ((math::log_sigmoid(twice, s1) + s2) + s3);" in text
    assert "d0 = math::sigmoid((-(T(2.0) * x)), s0);" in text
    assert "d1 = math::log(t);" in text
    assert "needs[] = {15, 1, 0};" in text


def test_names_every_formula_of_the_losses(tmp_path: Path) -> None:
    """The build runs `python printer.py FOLDER FILES...`, which needs neither torch nor the package."""
    folder = Path(printer.__file__).parents[2] / "losses"
    files = sorted(str(path) for path in folder.glob("[a-z]*.py"))
    subprocess.run([sys.executable, "-I", "-S", printer.__file__, tmp_path, *files], check=True)
    defined = set()
    for path in files:
        own = set(re.findall(r"^\w+ = Pointwise\((\w+),", Path(path).read_text(), re.M))
        unit = tmp_path / f"formulas_{Path(path).stem}.cpp"
        assert unit.exists() is bool(own)
        assert all(f"struct {name} {{" in unit.read_text() for name in own)
        defined |= own
    assert len(defined) >= 5
    listed = re.findall(r"X\((\w+), \d, \d\)", (tmp_path / "formulas.h").read_text())
    assert set(listed) == defined and len(listed) == len(defined)


def test_writes_what_changed(tmp_path: Path) -> None:
    """For a formula that changes to rebuild no other, and a docstring none."""
    sources = [tmp_path / "one.py", tmp_path / "two.py"]
    for source, name in zip(sources, "fh", strict=True):
        source.write_text(
            FORMULA.format("").replace("def f", f"def {name}").replace("(f,", f"({name},")
        )
    to = tmp_path / "to"
    to.mkdir()
    assert printer.main(str(to), *map(str, sources)) == 0
    before = {path: path.stat().st_mtime_ns for path in to.iterdir()}
    sources[0].write_text(sources[0].read_text().replace("return x\n", "return x + t\n"))
    assert printer.main(str(to), *map(str, sources)) == 0
    changed = {path.name for path in to.iterdir() if path.stat().st_mtime_ns != before[path]}
    assert changed == {"formulas_one.cpp"}


REFUSED = [
    ("return x ** 2", r"cannot print `x \*\* 2`"),
    ("return x // t", "cannot print `x // t`"),
    ("return x % t", "cannot print `x % t`"),
    ("return x @ t", "cannot print `x @ t`"),
    ("return not x", "cannot print `not x`"),
    ("return +x", r"cannot print `\+x`"),
    ("return x and t", "cannot print `x and t`"),
    ("return x if t else t", "cannot print `x if t else t`"),
    ("return 0.0 < x < 1.0", "cannot print `0.0 < x < 1.0`"),
    ("return x is t", "cannot print `x is t`"),
    ("return True", "cannot print `True`"),
    ("return 'x'", "cannot print `'x'`"),
    ("return None", "cannot print `None`"),
    ("return", "cannot print `return`"),
    ("return 1j", "cannot print `1j`"),
    (
        "return m.tan(x)",
        r"cannot print `m.tan\(x\)` as C\+\+: m has no tan, but abs, at_least, exp, .*inf",
    ),
    ("return m.pi", "cannot print `m.pi` as C\\+\\+: m has no pi, but"),
    ("return m.exp", "cannot print `m.exp` as C\\+\\+: m.exp takes 1 arguments"),
    ("return m.where(x > t, x)", r"cannot print `m.where\(x > t, x\)` .* takes 3 arguments"),
    ("return m.where(x, x, t)", "cannot print `x` .* it is a value where a condition belongs"),
    ("return x > t", "cannot print `x > t` .* it is a condition where a value belongs"),
    ("return x + (x > t)", "cannot print `x > t` .* it is a condition where a value belongs"),
    ("return (x > t) & x", "cannot print `x` .* it is a value where a condition belongs"),
    ("return -(x > t)", "cannot print `x > t` .* it is a condition where a value belongs"),
    ("return m.log(2.0) * x", r"cannot print `m.log\(2.0\)` .* let the loss compute it"),
    ("return m.maximum(1.0, 2.0)", r"cannot print `m.maximum\(1.0, 2.0\)` .* no operand"),
    ("return x + other", "cannot print `other` .* it is no parameter, and no variable"),
    ("x = t", "cannot print `x = t` .* x is set already: take another name"),
    ("gap = x", "cannot print `gap = x` .* gap is set already"),
    ("return torch.exp(x)", r"cannot print `torch.exp\(x\)`"),
    ("return exp(x)", r"cannot print `exp\(x\)`"),
    ("return m.maximum(x, b=0.0)", r"cannot print `m.maximum\(x, b=0.0\)`"),
    ("return x.exp()", r"cannot print `x.exp\(\)`"),
    ("return x[0]", r"cannot print `x\[0\]`"),
    ("return lambda: x", "cannot print `lambda: x`"),
    ("return [x]", r"cannot print `\[x\]`"),
    ("return x, t", r"cannot print `\(x, t\)`"),
    ("return 1.0 + m.sum(x)", r"cannot print `m.sum\(x\)`"),
    ("x += 1.0", r"cannot print `x \+= 1.0`"),
    ("a = b = x", "cannot print `a = b = x`"),
    ("a, b = x, t", r"cannot print `a, b = \(x, t\)`"),
    ("if x > t: return x", "cannot print `if x > t:`"),
    ("for _ in x: pass", "cannot print `for _ in x:`"),
    ("while x: pass", "cannot print `while x:`"),
    ("m.exp(x)", r"cannot print `m.exp\(x\)`"),
    ("pass", "cannot print `pass`"),
    ("import math", "cannot print `import math`"),
    ("assert x", "cannot print `assert x`"),
    ("def g(): return x", r"cannot print `def g\(\):`"),
]


@pytest.mark.parametrize(("statement", "message"), REFUSED, ids=[s for s, _ in REFUSED])
def test_names_the_line_that_it_cannot_print(statement: str, message: str) -> None:
    source = f"""
def value(x, t):
    gap = x - t
    {statement}


def grad(x, t):
    return x, t


LOSS = Pointwise(value, grad)
"""
    with pytest.raises(printer.CannotPrint, match=f"^losses/bad.py:4: {message}"):
        printer.printed({"losses/bad.py": source})


@pytest.mark.parametrize(
    ("source", "message"),
    [
        pytest.param(
            "def f(x, t): return x\ndef g(x, y): return x, y\nF = Pointwise(f, g)",
            "^bad.py:2: g and f take different operands",
            id="grad",
        ),
        pytest.param(
            "def f(x, t): return x\ndef g(x, t): return x, t\ndef d(x): return x > 0\n"
            "F = Pointwise(f, g, domain=d)",
            "^bad.py:3: d and f take different operands",
            id="domain",
        ),
        pytest.param(
            "def f(x): return x\ndef g(x): return x, x\nF = Pointwise(f, g)",
            "^bad.py:1: f takes 1 operands, not 2 to 4: its positional parameters",
            id="one operand",
        ),
        pytest.param(
            "def f(a, b, c, d, e): return a\ndef g(a, b, c, d, e): return a, b\nF = Pointwise(f, g)",
            "^bad.py:1: f takes 5 operands, not 2 to 4",
            id="five operands",
        ),
        pytest.param(
            "def f(x, t, *, a, b, c, d, e): return x\ndef g(x, t, *, a, b, c, d, e): return x, t\n"
            "F = Pointwise(f, g)",
            "^bad.py:1: f takes 5 numbers, not up to 4: its keyword-only parameters",
            id="five numbers",
        ),
        pytest.param(
            "def f(x, t, *, a): return x\ndef g(x, t): return x, t\nF = Pointwise(f, g)",
            r"^bad.py:2: g and f take different numbers: give it the parameters \(x, t, \*, a\)",
            id="a number of the value alone",
        ),
        pytest.param(
            "def f(x, t): return x\ndef g(x, t): return x, t, t\nF = Pointwise(f, g)",
            "^bad.py:2: g gives 3 derivatives by 2 operands: return one for each, in their order",
            id="three derivatives of two operands",
        ),
        pytest.param(
            "def f(x, t): return x\ndef g(x, t): return x, t\ndef d(x, t): return x\n"
            "F = Pointwise(f, g, domain=d)",
            "^bad.py:3: cannot print `x` .* it is a value where a condition belongs",
            id="domain without a condition",
        ),
        pytest.param(
            "def f(x, t): return x\ndef g(x, t): return x, t\nF = Pointwise(f, g)\n"
            "def h(x, t): return t, x\nG = Pointwise(f, h)",
            "^bad.py:5: f names another formula at bad.py:3: rename one",
            id="two formulas of one name",
        ),
        pytest.param(
            "def f(x, t): return x\nF = Pointwise(f, elsewhere)",
            "^bad.py:2: `elsewhere` is not a function of this file",
            id="no such function",
        ),
        pytest.param(
            "def f(x, t): return x\nF = Pointwise(f, lambda x, t: (x, t))",
            "^bad.py:2: `lambda x, t: .*` is not a function of this file",
            id="lambda",
        ),
        pytest.param(
            "def f(x, t): return x\ndef g(x, t): return x\nF = Pointwise(f, g)",
            "^bad.py:2: cannot print `return x`",
            id="grad without a pair",
        ),
        pytest.param(
            "def f(x, t): return x\ndef g(x, t): return ()\nF = Pointwise(f, g)",
            r"^bad.py:2: cannot print `return \(\)` .* a gradient is a tuple",
            id="grad of no operand",
        ),
        pytest.param(
            "def f(x, t): a = x\ndef g(x, t): return x, t\nF = Pointwise(f, g)",
            "^bad.py:1: ",
            id="no return",
        ),
        pytest.param("def f(x, t): return x\nF = Pointwise(f)", "^bad.py:2: ", id="grad forgotten"),
    ],
)
def test_names_what_does_not_fit(source: str, message: str) -> None:
    with pytest.raises(printer.CannotPrint, match=message):
        printer.printed({"bad.py": source})


def test_fails_the_build(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bad.py"
    path.write_text("def f(x, t): return x ** 2\ndef g(x, t): return x, t\nF = Pointwise(f, g)")
    assert printer.main(str(tmp_path), str(path)) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("bad.py:1: ") and not captured.out
