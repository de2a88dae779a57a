"""Small files for each case, and the last lines of `make fuzz`: how many cases ran."""

import pytest

from tests.helpers.fuzz import RAN


@pytest.fixture(autouse=True)
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the images of a .beton begin after 4 KiB instead of 8 MiB of zeros, all of which is hashed in every case."""
    monkeypatch.setattr("pipelines.beton.writer.PAGE_BYTES", 4096)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not RAN:
        return
    for file in sorted({file for file, _ in RAN}):
        numbers = {name: number for (where, name), number in sorted(RAN.items()) if where == file}
        parts = ", ".join(f"{name} {number:,}" for name, number in numbers.items())
        terminalreporter.write_line(f"fuzz: {file}: {sum(numbers.values()):,} cases ({parts})")
    num_failed = len(terminalreporter.stats.get("failed", ())) + len(terminalreporter.stats.get("error", ()))
    found = f"{num_failed} tests failed" if num_failed else "0 tracebacks, 0 hangs, 0 signals"
    terminalreporter.write_line(f"fuzz: {sum(RAN.values()):,} cases, {found}")
