"""The benchmark of the trainer runs, and what it says of memory is so."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")

Tables = dict[str, list[list[str]]]  # first title of a table -> its rows


def printed(*parts: str) -> Tables:
    """What the benchmark prints at its smallest size."""
    command = [sys.executable, "-W", "error", "-m", "tests.bench.training", *parts, "--small", "--turns", "1"]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    tables: Tables = {}
    for table in done.stdout.strip().split("\n\n"):
        if table.startswith("|"):
            title, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines())
            tables[title[0]] = rows
    return tables


@pytest.fixture(scope="module")
def tables() -> Tables:
    return printed("loop", "memory")


def test_the_trainer_has_the_losses_of_a_straightforward_loop(tables: Tables) -> None:
    cases = [row[:2] for row in tables["step"]]  # printed only where the losses are the same
    assert cases == [["questions", "1"], ["questions", "2"], ["text", "1"], ["text", "2"]]


def test_memory_of_a_step_grows_with_the_passes_that_carry_gradient_alone(tables: Tables) -> None:
    _, by_passes, by_gradient, by_parts = tables.values()
    assert len({peak for _, peak in by_passes}) == 1
    kept, again = ([float(row[column]) for row in by_gradient] for column in (1, 2))
    assert kept[-1] - kept[0] > 5 * (again[-1] - again[0])
    *_, two, four = (float(peak) for _, peak in by_parts)
    assert four == two, "gradients are added up as they come"


@pytest.mark.slow
def test_ways_and_processes_are_compared() -> None:
    assert {title: len(rows) for title, rows in printed("ways", "processes").items()} == {
        "questions": 6,
        "text, one thread": 4,
        "questions, float32": 2,
    }
