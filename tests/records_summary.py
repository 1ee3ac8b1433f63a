"""Counts the records that each test of test_records.py ran and passed, and prints the table."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

# In the order of the columns.
KINDS = {
    "op_db": "`op_db`",
    "op_db errors": "its errors",
    "module_db": "`module_db`",
    "module_db errors": "its errors",
    "common_nn": "`common_nn`",
    "own": "our own",
}
PAGE = Path(__file__).parent.parent / "docs" / "compatibility.md"
REPORT = "fusedloss_records"  # an attribute of the reports, which pytest-xdist carries along


class Tally:
    """The records that one test runs, each a block `with tally(title)`; a failure ends no other."""

    def __init__(self, loss: str, kind: str) -> None:
        self.loss, self.kind = loss, kind
        self.ran = 0
        self.failures: list[str] = []

    @contextmanager
    def __call__(self, title: str) -> Iterator[None]:
        self.ran += 1
        try:
            yield
        except Exception as error:
            self.failures.append(f"{title}: {type(error).__name__}: {error}")

    def close(self) -> None:
        if self.failures:
            listed = "\n".join(self.failures)
            pytest.fail(
                f"{len(self.failures)} of {self.ran} records failed:\n{listed}", pytrace=False
            )


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Any:
    """Opens a tally; the test's own end closes it."""

    def open_tally(loss: str, kind: str) -> Tally:
        request.node.records = Tally(loss, kind)
        return request.node.records

    return open_tally


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    result = yield
    if hasattr(item, "records"):
        item.records.close()
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    report = yield
    records = getattr(item, "records", None)
    if records and report.when == "call":
        passed = records.ran - len(records.failures)
        setattr(report, REPORT, [records.loss, records.kind, records.ran, passed])
    return report


def page_table(counts: Mapping[str, Mapping[str, int]]) -> str:
    """The table of docs/compatibility.md: a row a loss, a column a kind of records."""
    lines = ["| loss | " + " | ".join(KINDS.values()) + " |", "|---" + "|--:" * len(KINDS) + "|"]
    for loss, row in counts.items():
        cells = [str(row.get(kind) or "-") for kind in KINDS]
        lines.append(f"| `{loss}` | " + " | ".join(cells) + " |")
    sums = [sum(row.get(kind, 0) for row in counts.values()) for kind in KINDS]
    lines.append(f"| all {sum(sums)} | " + " | ".join(map(str, sums)) + " |")
    return "\n".join(lines)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--write-records", action="store_true", help=f"write the table of records into {PAGE.name}"
    )


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    ran: dict[str, Counter[str]] = defaultdict(Counter)
    passed: dict[str, Counter[str]] = defaultdict(Counter)
    for reports in terminalreporter.stats.values():
        for report in reports:
            if found := getattr(report, REPORT, None):
                loss, kind, some, good = found
                ran[loss][kind] += some
                passed[loss][kind] += good
    if not ran:
        return
    terminalreporter.section("PyTorch's records: passed of run")
    terminalreporter.write_line(f"{'':34}" + "".join(f"{kind:>18}" for kind in KINDS))
    for loss in sorted(ran):
        cells = (
            f"{passed[loss][kind]} of {ran[loss][kind]}" if ran[loss][kind] else "-"
            for kind in KINDS
        )
        terminalreporter.write_line(f"{loss:34}" + "".join(f"{cell:>18}" for cell in cells))
    everything = [sum(counter.total() for counter in table.values()) for table in (passed, ran)]
    terminalreporter.write_line(f"all: {everything[0]} of {everything[1]}")
    if config.getoption("--write-records"):
        before, _, rest = PAGE.read_text().partition("<!-- records: begin -->\n")
        _, mark, after = rest.partition("<!-- records: end -->")
        table = page_table(dict(sorted(passed.items())))
        PAGE.write_text(f"{before}<!-- records: begin -->\n{table}\n{mark}{after}")
