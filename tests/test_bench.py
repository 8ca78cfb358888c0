"""``bench``: what it measures, and that it measures what it says."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from localdepth.engine.toy import random_weights
from localdepth.errors import DepthError, RequestError
from localdepth.generate import Generation
from localdepth.loading import load
from localdepth.model import Model
from localdepth_apps.bench import measure
from tests import engines
from tests.conftest import ROOT
from tests.published import EXPECTED


def test_every_depth_is_measured_with_every_number_of_threads(model_file: Path) -> None:
    told: list[tuple[int, int]] = []
    result = measure(
        lambda n: load(model_file, n_threads=n, engine="toy"),
        [1, 2],
        depths=[1, 3],
        n_prompt=9,
        n_generated=4,
        rounds=2,
        on_progress=lambda done, total: told.append((done, total)),
    )
    assert [(speed.threads, speed.depth) for speed in result.speeds] == [(1, 1), (1, 3), (2, 1), (2, 3)]
    assert all(0 < median <= best for speed in result.speeds for median, best in [speed.tok_s[:2], speed.tok_s[2:]])
    assert told == [(i + 1, 8) for i in range(8)]
    assert set(result.load_ms) == {1, 2}
    assert result.memory.depth == 3
    assert result.memory.total > result.memory.kv > 0


def test_no_run_profits_from_the_one_before_it_or_ends_early(model_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[Generation] = []
    generate = Model.generate

    def listening(self: Model, *args: object, **settings: object) -> Generation:
        answers.append(generate(self, *args, **settings))  # type: ignore[arg-type]  # handed on as it came
        return answers[-1]

    monkeypatch.setattr(Model, "generate", listening)
    measure(lambda n: load(model_file, n_threads=n), [1], depths=[1, 2], n_prompt=20, n_generated=30, rounds=5)
    assert all(answer.stats.n_cached == 0 for answer in answers)
    whole = [answer for answer in answers if answer.finish_reason == "length"]
    assert {answer.stats.n_generated for answer in whole} == {30}
    assert len(whole) == 1 + 2 * 5


def test_defaults_fit_a_small_context_and_a_shallow_model(tmp_path: Path) -> None:
    config = replace(EXPECTED["huginn"], default_depth=5, max_depth=5, n_ctx=16)
    path = engines.write_model(tmp_path / "m.gguf", config, random_weights(config, 0))
    result = measure(lambda n: load(path, n_threads=n), [None], rounds=1)
    assert [speed.depth for speed in result.speeds] == [1, 2, 4]
    assert (result.n_prompt, result.n_generated) == (8, 8)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"depths": [65]}, DepthError, r"1\.\.64"),
        ({"rounds": 0}, RequestError, "rounds=0"),
        ({"n_prompt": 0}, RequestError, "a prompt of 0"),
        ({"n_generated": 1}, RequestError, "an answer of 1"),
        ({"n_prompt": 60}, RequestError, "context of 64"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    settings: dict[str, object], error: type[Exception], message: str, model_file: Path
) -> None:
    with pytest.raises(error, match=message):
        measure(lambda n: load(model_file, n_threads=n), [1], **settings)  # type: ignore[arg-type]  # wrong on purpose


def test_the_command_prints_a_table_or_one_line(model_file: Path) -> None:
    sizes = ("--depths", "1,2", "--rounds", "1", "--prompt", "8", "--tokens", "4", "--engine", "toy")
    command = [sys.executable, "-m", "localdepth", "bench", "-m", str(model_file), *sizes]
    table = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "prefill" in table
    assert "planned memory" in table
    line = subprocess.run([*command, "--threads", "1,2", "--json"], capture_output=True, text=True, check=True).stdout
    assert line.count("\n") == 1
    record = json.loads(line)
    assert [speed["depth"] for speed in record["speeds"]] == [1, 2, 1, 2]
    assert set(record["load_ms"]) == {"1", "2"}
    refused = subprocess.run([*command, "--threads", "x"], capture_output=True, text=True)
    assert (refused.returncode, "threads='x'" in refused.stderr) == (2, True)


@pytest.mark.slow
def test_runtimes_are_compared_on_one_model() -> None:
    pytest.importorskip("torch")
    command = [sys.executable, "-m", "tests.bench.runtimes", "decode", "prefill", "size", "--bits", "8"]
    done = subprocess.run([*command, "--rounds", "1", "--n-embd", "128"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if "ggml" in line and "sessions" in line]
    assert len(rows) == 10
    assert all(name in row for row in rows for name in ("Scan", "Loop", "torch"))
