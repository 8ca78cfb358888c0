"""The README's commands and examples are run, or their parts where the whole needs a fresh machine."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from localdepth.loading import load
from localdepth_train.families import FAMILIES
from localdepth_train.off_topic import REFUSAL
from localdepth_train.recipe import load_recipe

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def run(command: str) -> "subprocess.CompletedProcess[str]":
    words = shlex.split(command.replace(".venv/bin/", ""))
    assert words[0] == "localdepth"
    return subprocess.run([sys.executable, "-m", "localdepth", *words[1:]], capture_output=True, text=True, cwd=ROOT)


def examples() -> list[tuple[str, str]]:
    """Commands of the console blocks, each with the line it must print."""
    lines = [line for block in blocks("console") for line in block.splitlines()]
    return [(line.removeprefix("$ "), lines[i + 1]) for i, line in enumerate(lines) if line.startswith("$ ")]


def test_two_commands_set_up_a_fresh_machine() -> None:
    main, test = (block.strip() for block in blocks("sh")[:2])
    assert main.startswith('python3 -m venv .venv && .venv/bin/pip install ".[gguf]" && .venv/bin/localdepth ask')
    assert test == 'python3 -m venv .venv && .venv/bin/pip install -e ".[dev]" && .venv/bin/pytest'
    assert test in (ROOT / ".ci" / "run").read_text()


def test_the_main_command_answers_on_the_default_model() -> None:
    done = run(blocks("sh")[0].split("&&")[-1].strip())
    assert done.returncode == 0, done.stderr
    assert done.stdout == "It is 0.\n"
    assert "depth 16, chosen by request" in done.stderr


def test_every_kind_of_question_shown_is_known() -> None:
    rows = dict(re.findall(r"^\| (\w+) \| (.*?\?)", README, re.MULTILINE))
    assert set(FAMILIES) <= set(rows)
    with load() as model:
        for family in FAMILIES:
            assert model.generate(rows[family]).text != REFUSAL, family


@pytest.mark.parametrize(("command", "answer"), examples())
def test_shown_answers_are_given(command: str, answer: str) -> None:
    done = run(command)
    assert done.stdout == answer + "\n", done.stderr


def test_the_python_example_runs() -> None:
    [program] = blocks("python")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Floor 3. 8 8.0")


def test_the_recipe_named_here_is_one() -> None:
    [line] = [line for block in blocks("sh") for line in block.splitlines() if "train run" in line]
    assert load_recipe(ROOT / shlex.split(line)[3]).model.max_depth == 64


def test_every_command_named_here_exists() -> None:
    for name in set(re.findall(r"localdepth (\w+)", "".join(blocks("sh") + blocks("console")))):
        assert run(f"localdepth {name} --help").returncode == 0, name
