"""The house: floors that nothing climbs, rooms of a size to read, one room for torch's private names."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
HOME = ROOT / "src" / "fusedloss"
# From the ground up. A file belongs to the first entry that its name begins with; a floor's rooms may import
# each other, but for those that stand side by side.
FLOORS = (
    ("core",),
    ("kinds",),
    ("engines.abi", "engines.plan", "engines.protocol", "engines.again"),
    ("engines.cpu", "engines.gpu"),
    ("engines",),
    ("autograd",),
    ("route",),
    ("front",),
    ("losses",),
    ("lazy",),
    (
        *("functional", "nn", "patch", "aliases", "distributed", ""),
        *("_functions", "_modules"),
    ),
    ("cli", "__main__"),
)
APART = {"engines.cpu", "engines.gpu"}
MOST_LINES, MOST_LINES_OF_A_FUNCTION = 450, 80
# Who may know torch's private names: `cli/bench` times what lies under torch's own losses.
PRIVATE_NAMES = ("core/torch_state.py", "core/inductor.py", "cli/bench/")
# And the public one whose word is wrong before torch 2.13.
PRIVATE = re.compile(
    r"\btorch(\.\w+)*\._[A-Za-z]\w*|\bforward_ad\._|\b_dynamo_marked_constant\b"
    r"|\btorch\.compiler\.is_compiling\b"
)


def module(path: Path) -> str:
    parts = path.relative_to(HOME).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


# And what is there for type checkers alone.
STUBS = [p for p in HOME.rglob("*.pyi") if not p.with_suffix(".py").exists()]
MODULES = {module(path): path for path in sorted([*HOME.rglob("*.py"), *STUBS])}


def imported(name: str) -> set[str]:
    """The modules of this library that one imports, wherever in its text."""
    path, found = MODULES[name], set()
    package = name.split(".") if path.stem == "__init__" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ["fusedloss", *package] if node.level else []
            base = base[: len(base) - node.level + 1] + (node.module or "").split(".")
            start = ".".join(filter(None, base))
            found |= {f"{start}.{alias.name}" for alias in node.names}
    ours = {f[len("fusedloss") :].strip(".") for f in found if f.split(".")[0] == "fusedloss"}
    return {known(each) for each in ours} - {name}


def known(name: str) -> str:
    """The module of a name that may be of something in it."""
    return name if name in MODULES else known(name.rpartition(".")[0])


@functools.cache
def graph() -> dict[str, set[str]]:
    return {name: imported(name) for name in MODULES}


def room(name: str) -> str:
    return next(r for r in rooms() if r == "" or f"{name}.".startswith(f"{r}.") if r or not name)


def rooms() -> Iterator[str]:
    """The more of a name, the earlier."""
    yield from sorted((r for floor in FLOORS for r in floor), key=len, reverse=True)


def floor(name: str) -> int:
    return next(k for k, rooms in enumerate(FLOORS) if room(name) in rooms)


def test_no_import_runs_up() -> None:
    found = {
        (name, other)
        for name, others in graph().items()
        for other in others
        if floor(other) > floor(name)
        or (room(name) != room(other) and {room(name), room(other)} <= APART)
    }
    assert not found


def circles() -> set[str]:
    """Of modules that import each other, in whatever way: each circle by its names."""

    def reached(name: str) -> set[str]:
        seen: set[str] = set()
        ahead = [name]
        while ahead:
            for other in graph()[ahead.pop()] - seen:
                seen.add(other)
                ahead.append(other)
        return seen

    reach = {name: reached(name) for name in MODULES}
    return {
        " ".join(sorted(other for other in reach[name] if name in reach[other]))
        for name in MODULES
        if name in reach[name]
    }


def test_no_circles() -> None:
    assert not circles()


def test_a_circle_would_be_found() -> None:
    graph()["core.errors"].add("core.plain")
    try:
        assert "core.errors core.plain" in " ".join(circles())
    finally:
        graph()["core.errors"].discard("core.plain")


def sources(*patterns: str) -> Iterator[Path]:
    for pattern in patterns:
        yield from sorted(p for p in ROOT.glob(pattern) if "build" not in p.parts)


def test_no_room_is_too_large() -> None:
    patterns = "src/**/*.py", "csrc/*", "tests/**/*.py", "tests/**/*.cpp"
    found = {
        str(path.relative_to(ROOT))
        for path in sources(*patterns)
        if len(path.read_text().splitlines()) > MOST_LINES
    }
    assert not found


def python_functions(path: Path) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node, clean=False)
            said = len(docstring.splitlines()) if docstring else 0
            yield node.name, (node.end_lineno or 0) - node.lineno + 1 - said


def blocks(path: Path) -> Iterator[tuple[str, int]]:
    """Functions of C++ as clang-format writes them: they end with the indentation of their start."""
    lines = path.read_text().splitlines()
    for k, line in enumerate(lines):
        opens = re.match(r"( *)(?!namespace|struct|class|union|enum|extern)\S.*[^=\s] ?\{$", line)
        if opens and re.search(r"\) (const )?(noexcept )?\{$", line):
            close = f"{opens[1]}}}"
            end = next((j for j in range(k, len(lines)) if lines[j].rstrip(";,)") == close), k)
            yield line.strip(), end - k + 1


def test_no_function_is_too_long() -> None:
    """Without its docstring."""
    found = set()
    for path in sources("src/**/*.py", "tests/**/*.py", "csrc/*"):
        functions = python_functions(path) if path.suffix == ".py" else blocks(path)
        name = str(path.relative_to(ROOT))
        found |= {f"{name}: {f}" for f, lines in functions if lines > MOST_LINES_OF_A_FUNCTION}
    assert not found


def private_names(path: Path) -> set[str]:
    """Of torch, used or imported in a file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            found |= {m[0] for m in PRIVATE.finditer(ast.unparse(node))}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = (f"{node.module}.{alias.name}" for alias in node.names)
            found |= {m[0] for n in names for m in PRIVATE.finditer(n)}
        elif isinstance(node, ast.Import):
            found |= {m[0] for a in node.names for m in PRIVATE.finditer(a.name)}
    return found


def test_one_room_knows_the_private_names_of_torch() -> None:
    found = {
        f"{path.relative_to(HOME)}: {name}"
        for path in MODULES.values()
        if not str(path.relative_to(HOME)).startswith(PRIVATE_NAMES)
        for name in private_names(path)
    }
    # An attribute that changes: a function around it would cost the shortest calls a hundredth of their time.
    assert found == {"route/memo.py: forward_ad._"}
