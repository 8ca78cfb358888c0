"""The benchmark of the trainer runs, and what it says of memory is so."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")

ROOT = Path(__file__).parents[1]


def tables(*parts: str) -> dict[str, list[list[str]]]:
    """What the benchmark prints at its smallest size: title of a table -> its rows."""
    command = [sys.executable, "-W", "error", "-m", "tests.bench.training", *parts, "--small", "--turns", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = {}
    for table in done.stdout.strip().split("\n\n"):
        if table.startswith("|"):
            title, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines())
            found[title[0]] = rows
    return found


def test_trainer_and_straightforward_loop_are_compared_on_equal_losses() -> None:
    [rows] = tables("loop").values()
    assert [row[:2] for row in rows] == [["questions", "1"], ["questions", "2"], ["text", "1"], ["text", "2"]]


def test_memory_of_a_step_grows_with_passes_that_carry_gradient_alone() -> None:
    by_passes, by_gradient, by_parts = tables("memory").values()
    assert len({peak for _, peak in by_passes}) == 1
    kept, again = ([float(row[column]) for row in by_gradient] for column in (1, 2))
    assert kept[-1] - kept[0] > 5 * (again[-1] - again[0])
    assert len(by_parts) == 3


@pytest.mark.slow
def test_ways_and_processes_are_compared() -> None:
    assert [len(rows) for rows in tables("ways", "processes").values()] == [2, 4]
