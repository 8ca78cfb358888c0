"""Runs on text, through phases, killed, out of room, damaged, shown while they go."""

import json
import os
import pty
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from localdepth.cli.common import stop_on_interrupt  # noqa: E402
from localdepth.cli.train import _following, duration  # noqa: E402
from localdepth.errors import StorageError, TrainError  # noqa: E402
from localdepth_train.checkpoint import Checkpoint  # noqa: E402
from localdepth_train.recipe import (  # noqa: E402
    DepthRecipe,
    DrawPer,
    ObjectiveRecipe,
    Recipe,
    load_recipe,
)
from localdepth_train.run_folder import RunFolder  # noqa: E402
from localdepth_train.text.settings import SourceRecipe  # noqa: E402
from localdepth_train.trainer import Trainer, train  # noqa: E402
from tests.conftest import tokenizer_json  # noqa: E402
from tests.training import (  # noqa: E402
    HEAL_CONFIG,
    changed,
    heal_recipe,
    losses,
    on_text,
    records,
    start_folder,
    toml,
)

START_S = 60.0  # until a run has begun; a busy machine imports slowly
EVERY_LINE = "import localdepth.cli.train as train; train._LINE_EVERY_S = 0; from localdepth.cli import main; main()"


RUN = [sys.executable, "-m", "localdepth", "train", "run"]


@pytest.fixture(scope="module")
def heal(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return heal_recipe(tmp_path_factory.mktemp("heal"), tokenizer_json())


def weights(folder: Path) -> Mapping[str, np.ndarray]:
    checkpoint = Checkpoint(folder / "checkpoint")
    return {name: checkpoint.read(name) for name in checkpoint.config.tensors()}


def test_text_teaches_in_both_phases_and_the_depth_becomes_the_default(heal: Recipe, tmp_path: Path) -> None:
    longer = replace(heal, phases=tuple(replace(phase, steps=20) for phase in heal.phases))
    report = train(longer, tmp_path)
    told = records(tmp_path)
    assert [record["phase"] for record in told if "loss" in record] == ["heal"] * 20 + ["target"] * 20
    looks = [record["evaluation"]["loss"]["2"] for record in told if "evaluation" in record]
    assert looks[-1] < looks[0]
    assert report.evaluation is not None
    config = Checkpoint(tmp_path / "checkpoint").config
    assert (config.default_depth, config.trained_mean_depth) == (3, 3.0)


@pytest.mark.parametrize("until", [2, 6, 7])
def test_a_stopped_text_run_ends_where_an_undisturbed_one_does(heal: Recipe, tmp_path: Path, until: int) -> None:
    train(heal, tmp_path / "whole")
    train(heal, tmp_path / "stopped", until=until)
    train(heal, tmp_path / "stopped")
    assert records(tmp_path / "whole") == records(tmp_path / "stopped")
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "stopped")
    assert all(np.array_equal(array, other[name]) for name, array in one.items())


@pytest.mark.parametrize(
    "values",
    [
        {"depth": DepthRecipe(mean=3, backprop=2, per=DrawPer.SEQUENCE)},
        {"depth": DepthRecipe(mean=3, backprop=2, fixed=True)},
        {"objective": ObjectiveRecipe(consistency=0.5)},
    ],
)
def test_what_a_phase_may_ask_for_trains(heal: Recipe, values: dict[str, object]) -> None:
    trainer = Trainer(changed(heal, **values))
    first, *_, last = [trainer.advance()["loss"] for _ in range(6)]
    assert last < first


def test_recomputed_passes_train_the_same(heal: Recipe) -> None:
    kept, again = Trainer(heal), Trainer(replace(heal, recompute=True))
    assert [kept.advance()["loss"] for _ in range(3)] == [again.advance()["loss"] for _ in range(3)]
    assert again.flops > kept.flops


def test_a_saved_state_that_is_damaged_falls_back_to_the_one_before(
    heal: Recipe, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(heal, tmp_path / "whole")
    train(heal, tmp_path / "hurt", until=7)
    state = tmp_path / "hurt/state.pt"
    state.write_bytes(state.read_bytes()[:-2000])
    train(heal, tmp_path / "hurt", until=7)
    assert "going on from the state saved before it" in caplog.text
    state.write_bytes(b"")
    found = RunFolder(tmp_path / "hurt").read_state()
    assert found is not None
    assert found["step"] == 6, "the sound state took no damaged one's place"
    train(heal, tmp_path / "hurt")
    assert losses(tmp_path / "whole") == losses(tmp_path / "hurt")


def test_a_full_disk_keeps_the_last_state(heal: Recipe, tmp_path: Path) -> None:
    train(heal, tmp_path, until=3)
    saved = (tmp_path / "state.pt").read_bytes()
    folder, trainer = RunFolder(tmp_path), Trainer(heal)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(saved) // 2, limits[1]))
    try:
        with pytest.raises(StorageError, match="File too large; the state saved before is kept; put that right"):
            folder.write_state(trainer.state())
        with pytest.raises(StorageError, match="File too large; put that right"):
            RunFolder(tmp_path / "new").write_state(trainer.state())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert (tmp_path / "state.pt").read_bytes() == saved
    assert not list(tmp_path.glob("*.partial"))


def test_later_phases_are_checked_before_the_first_begins(heal: Recipe, tmp_path: Path) -> None:
    first, second = heal.phases
    assert second.text is not None
    source = second.text.sources[0]
    missing = replace(second.text, sources=(replace(source, path="nowhere.jsonl"),))
    rare = replace(second.text, sources=(source, replace(source, field="body", weight=1e-6)), held_out_one_in=0)
    strange = start_folder(tmp_path / "strange", replace(HEAL_CONFIG, n_vocab=280), tokenizer_json())
    teacher = ObjectiveRecipe(teacher=str(strange), distillation=1.0)
    for phase, said in (
        (replace(second, text=missing), "no text found at 'nowhere.jsonl'"),
        (replace(second, text=rare), "line 1 has no field 'body'"),
        (replace(second, text=replace(second.text, held_out_one_in=10**9)), "keeps no document for evaluation"),
        (replace(second, text=replace(second.text, n_tokens=65)), "'target': text.n_tokens=65 exceeds .* n_ctx=64"),
        (replace(second, objective=teacher), "n_vocab=280, the model 300"),
    ):
        with pytest.raises(TrainError, match=said):
            Trainer(replace(heal, phases=(first, phase)))
    with pytest.raises(TrainError, match=r"batch_size=5 must be a multiple .* = 2; give 6"):
        Trainer(replace(heal, batch_size=5))


def test_the_end_of_a_phase_is_saved(heal: Recipe, tmp_path: Path) -> None:
    def fail(record: Mapping[str, Any]) -> None:
        if record["step"] == 8:
            raise RuntimeError("power failure")

    with pytest.raises(RuntimeError):
        train(replace(heal, save_every=100), tmp_path, on_record=fail)
    saved = RunFolder(tmp_path).read_state()
    assert saved is not None
    assert (saved["step"], saved["phase"]) == (6, "heal")


def test_without_held_out_text_nothing_is_evaluated(heal: Recipe, tmp_path: Path) -> None:
    report = train(on_text(heal, held_out_one_in=0), tmp_path)
    assert report.evaluation is None
    assert not any("evaluation" in record for record in records(tmp_path))


def test_a_step_without_labels_is_no_failure(heal: Recipe, tmp_path: Path) -> None:
    asked = {"text": "the cat sat on the mat " * 20, "answer": "oats"}
    (tmp_path / "long.jsonl").write_text(json.dumps(asked) + "\n")
    source = SourceRecipe(path=str(tmp_path / "long.jsonl"), prompt_field="text", answer_field="answer")
    recipe = on_text(replace(heal, batch_size=1, micro_batches=1), sources=(source,), held_out_one_in=0)
    train(recipe, tmp_path / "run")
    assert 0.0 in losses(tmp_path / "run")
    assert max(losses(tmp_path / "run")) > 0


def test_seeds_draw_depths_and_states_of_their_own(heal: Recipe) -> None:
    text = on_text(heal, shuffle_buffer=1)  # the same for all seeds
    still = changed(text, depth=DepthRecipe(mean=2, backprop=2, fixed=True))
    depths, first_losses = [], []
    for seed in range(3):
        trainer = Trainer(replace(text, seed=seed))
        depths.append([trainer.advance()["depths"] for _ in range(6)])
        first_losses.append(Trainer(replace(still, seed=seed)).advance()["loss"])
    assert all(one != other for i, one in enumerate(depths) for other in depths[:i])
    assert len(set(first_losses)) == 3


def test_a_run_killed_at_any_moment_goes_on_bit_for_bit(heal: Recipe, tmp_path: Path) -> None:
    recipe = toml(heal, tmp_path / "recipe.toml")
    command = [sys.executable, "-m", "tests.training", str(recipe)]
    for i in range(3):
        running = subprocess.Popen([*command, str(tmp_path / "killed")], stderr=subprocess.DEVNULL)
        wait_for_steps(tmp_path / "killed/log.jsonl", 25 * (i + 1))
        running.kill()
        running.wait()
    killed = losses(tmp_path / "killed")
    train(load_recipe(recipe), tmp_path / "whole", until=len(killed))
    assert losses(tmp_path / "whole") == killed


def wait_for_steps(log: Path, n: int) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if log.exists() and log.read_text().count("\n") >= n:
            return
        time.sleep(0.01)
    raise AssertionError(f"no {n} steps within {START_S} s")


def test_progress_says_flops_and_what_is_left(heal: Recipe, tmp_path: Path) -> None:
    command = ["train", "run", str(toml(heal, tmp_path / "recipe.toml", steps=4)), "-o", str(tmp_path / "run")]
    done, again = (
        subprocess.run([sys.executable, "-c", EVERY_LINE, *command], capture_output=True, text=True) for _ in range(2)
    )
    first, *_, last = (line for line in done.stderr.splitlines() if ": loss" in line)
    assert re.fullmatch(r"step 1 of 4: loss \d\.\d+, [\d,]+ tokens/s, \d\.\d\de\+\d\d FLOPs", first)
    assert re.fullmatch(r"step 4 of 4: .* FLOPs, 0 min 00 s left", last)
    assert duration(200) == "3 min 20 s"
    assert re.search(r"^4 steps, loss \d\.\d{4} at the last, checkpoint ", done.stdout)
    assert again.returncode == 0
    assert again.stdout.startswith("already finished: 4 steps, checkpoint ")


def test_progress_names_phases_and_depths(heal: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with _following(heal, None, tmp_path) as on_record:
        train(heal, tmp_path, on_record=on_record, until=6)
    said = capsys.readouterr().err
    assert "step 1 of 12, heal: loss" in said
    assert re.search(r"^step 6 of 12, heal, loss at depth 1: \d\.\d{3}, depth 2: \d\.\d{3}$", said, re.MULTILINE)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_run_that_is_stopped_is_saved_and_answers_in_json(heal: Recipe, tmp_path: Path, name: str) -> None:
    command = [*RUN, str(toml(heal, tmp_path / "recipe.toml")), "-o", str(tmp_path / "run"), "--json"]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for_steps(tmp_path / "run/log.jsonl", 2)
    running.send_signal(getattr(signal, name))
    answer, _ = running.communicate()
    record = json.loads(answer)
    assert running.returncode == 130
    assert 2 <= record["steps"] < 400
    assert record["checkpoint"] is None
    saved = RunFolder(tmp_path / "run").read_state()
    assert saved is not None
    assert saved["step"] == record["steps"]


def test_an_ignored_hangup_stays_ignored_and_only_a_later_interrupt_does_not_wait() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    try:
        with stop_on_interrupt(on_any=True) as stopped:
            signal.raise_signal(signal.SIGHUP)
            assert not stopped.is_set()
            for _ in range(2):
                signal.raise_signal(signal.SIGTERM)
                assert stopped.is_set()
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_run_whose_window_is_closed_is_saved(heal: Recipe, tmp_path: Path) -> None:
    window, inside = pty.openpty()
    command = [*RUN, str(toml(heal, tmp_path / "recipe.toml")), "-o", str(tmp_path / "run")]
    running = subprocess.Popen(command, stdin=inside, stdout=inside, stderr=inside, start_new_session=True)
    wait_for_steps(tmp_path / "run/log.jsonl", 2)
    os.close(inside)
    os.close(window)  # what is written there from now on fails
    for _ in range(2):
        running.send_signal(signal.SIGHUP)
    assert running.wait() == 130
    assert (tmp_path / "run/state.pt").exists()
