"""The README's commands and examples are run, or their parts where the whole needs a fresh machine."""

import gzip
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from localdepth.loading import load
from localdepth_train.recipe import load_recipe
from localdepth_train.tasks.families import FAMILIES
from localdepth_train.tasks.off_topic import REFUSAL

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def run(command: str, folder: Path = ROOT) -> "subprocess.CompletedProcess[str]":
    words = shlex.split(command.replace(".venv/bin/", ""))
    assert words[0] == "localdepth"
    return subprocess.run([sys.executable, "-m", "localdepth", *words[1:]], capture_output=True, text=True, cwd=folder)


def examples() -> list[tuple[str, str]]:
    """Commands of the console blocks, each with the line it must print."""
    lines = [line for block in blocks("console") for line in block.splitlines()]
    return [(line.removeprefix("$ "), lines[i + 1]) for i, line in enumerate(lines) if line.startswith("$ ")]


def test_two_commands_set_up_a_fresh_machine() -> None:
    main, test = (block.strip() for block in blocks("sh")[:2])
    assert main.startswith("python3 -m venv .venv && .venv/bin/pip install . && .venv/bin/localdepth ask")
    assert test == 'python3 -m venv .venv && .venv/bin/pip install -e ".[dev]" && .venv/bin/pytest -n logical'
    assert test in (ROOT / ".ci" / "run").read_text()


def test_the_main_command_answers_on_the_default_model() -> None:
    done = run(blocks("sh")[0].split("&&")[-1].strip())
    assert done.returncode == 0, done.stderr
    assert done.stdout == "The last digit is 7.\n"
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
    assert done.stdout.startswith("It is floor 3. 8 8.0")


def recipes() -> list[str]:
    """Of every training command."""
    return [shlex.split(line)[3] for block in blocks("sh") for line in block.splitlines() if "train run" in line]


@pytest.mark.parametrize("path", recipes())
def test_the_recipes_named_here_are_recipes(path: str) -> None:
    assert load_recipe(ROOT / path)


@pytest.mark.slow
def test_the_walk_from_a_plain_model_to_a_looped_one_runs(fixtures: Path, tmp_path: Path) -> None:
    """Every command of it, on the real model and the real stories, with a recipe of few steps."""
    [walk] = [block for block in blocks("sh") if "localdepth retrofit" in block]
    shutil.copytree(fixtures / "data" / "weights" / "babyllama-361", tmp_path / "babyllama-361")
    sample = fixtures / "data" / "text" / "tinystories_sample.jsonl.gz"
    stories = gzip.decompress(sample.read_bytes()).splitlines(keepends=True)
    (tmp_path / "test.jsonl").write_bytes(b"".join(stories[:5]))
    (tmp_path / "train.jsonl").write_bytes(b"".join(stories[200:500]))
    [path] = [path for path in recipes() if path.endswith("heal.toml")]
    few = re.sub(r"^(steps|held_out_documents) = \d+", r"\1 = 4", (ROOT / path).read_text(), flags=re.MULTILINE)
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / path).write_text(few)
    for command in walk.splitlines():
        done = run(command, tmp_path)
        assert done.returncode == 0, (command, done.stderr)
        if " ask " in command:
            assert len(done.stdout.split()) > 20, command
    assert (tmp_path / "runs" / "heal" / "report.png").exists()


def test_every_command_named_here_exists() -> None:
    for name in set(re.findall(r"localdepth (\w+)", "".join(blocks("sh") + blocks("console")))):
        assert run(f"localdepth {name} --help").returncode == 0, name
