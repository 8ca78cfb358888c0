"""A stopped run goes on: with what the messages say may be changed, and with nothing else."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from localdepth.errors import TrainError  # noqa: E402
from localdepth_train.recipe import EvaluationRecipe, Recipe  # noqa: E402
from localdepth_train.report import read_run  # noqa: E402
from localdepth_train.run_folder import RunFolder  # noqa: E402
from localdepth_train.text.settings import OnBadRow  # noqa: E402
from localdepth_train.trainer import train  # noqa: E402
from tests.conftest import tokenizer_json  # noqa: E402
from tests.training import (  # noqa: E402
    HEAL_CONFIG,
    changed,
    heal_recipe,
    losses,
    on_text,
    start_folder,
    text_of,
)

ROUNDING = 1e-5  # relative, of losses by two threads


@pytest.fixture(scope="module")
def heal(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return heal_recipe(tmp_path_factory.mktemp("heal"), tokenizer_json())


def at_rates(recipe: Recipe, factor: float) -> Recipe:
    """The recipe with other learning rates in all phases."""
    plans = [(phase, phase.optimizer) for phase in recipe.phases]
    phases = (replace(phase, optimizer=replace(plan, adamw_lr=factor * plan.adamw_lr)) for phase, plan in plans)
    return replace(recipe, phases=tuple(phases))


def test_a_run_stopped_by_a_bad_row_goes_on_past_it(heal: Recipe, tmp_path: Path) -> None:
    text = tmp_path / "bad.jsonl"
    rows = text_of(heal).read_text().splitlines(keepends=True)
    text.write_text("".join([*rows[:20], "{broken\n", *rows[20:]]))
    recipe = on_text(replace(heal, save_every=1).given(text=str(text)), held_out_one_in=0)
    with pytest.raises(TrainError, match=r'bad\.jsonl, line 21 .* on_bad_row = "skip" .* and go on'):
        train(recipe, tmp_path / "run")
    saved = RunFolder(tmp_path / "run").read_state()
    assert saved is not None
    assert 0 < saved["step"] < recipe.steps
    assert train(on_text(recipe, on_bad_row=OnBadRow.SKIP), tmp_path / "run").steps == recipe.steps


def test_a_run_that_diverged_goes_on_at_lower_rates(heal: Recipe, tmp_path: Path) -> None:
    train(heal, tmp_path / "whole")
    train(heal, tmp_path / "run", until=3)
    with pytest.raises(TrainError) as first:
        train(at_rates(heal, 1e30), tmp_path / "run")
    rates = f"lower the learning rate of phase 'heal', adamw_lr={1e30 * heal.phases[0].optimizer.adamw_lr},"
    ways = "start over in a new folder, or go on here from the last saved state"
    assert str(first.value).endswith(f"{rates} and {ways}")
    train(heal, tmp_path / "run", until=4)
    with pytest.raises(TrainError, match=r"last saved state; if that fails too, remove .*state\.pt to go on") as second:
        train(at_rates(heal, 1e30), tmp_path / "run")
    Path(str(second.value).split("remove ")[1].split(" to go on")[0]).unlink()  # as the message says
    assert train(heal, tmp_path / "run", until=5).began == 3
    train(heal, tmp_path / "run")
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_without_a_saved_state_none_is_offered_after_divergence(heal: Recipe, tmp_path: Path) -> None:
    with pytest.raises(TrainError, match=r"start over in a new folder$"):
        train(at_rates(heal, 1e30), tmp_path)


def test_a_finished_run_is_left_as_it_is(heal: Recipe, tmp_path: Path) -> None:
    done = train(heal, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"}
    again = train(replace(heal, save_every=5), tmp_path)
    assert (again.began, again.checkpoint) == (heal.steps, done.checkpoint)
    assert all(path.stat().st_mtime_ns == written for path, written in before.items())
    for name in ("state.pt", "state.previous.pt"):
        (tmp_path / name).unlink()
    with pytest.raises(TrainError, match=r"holds the checkpoint of a finished run, .* give a new folder"):
        train(heal, tmp_path)


def test_a_start_that_has_gone_is_asked_for(heal: Recipe, tmp_path: Path) -> None:
    train(heal, tmp_path / "run", until=1)
    with pytest.raises(TrainError, match=r"nowhere' does not exist; .* also to go on .* --start where it is now"):
        train(heal.given(str(tmp_path / "nowhere")), tmp_path / "run")


def test_what_decides_nothing_may_change_and_is_told(heal: Recipe, tmp_path: Path) -> None:
    train(heal, tmp_path / "whole")
    train(heal, tmp_path / "run", until=4)
    moved = Path(shutil.copy(text_of(heal), tmp_path / "text.jsonl"))
    text_of(heal).rename(moved.with_suffix(".old"))
    try:
        start = shutil.copytree(str(heal.start), tmp_path / "start")
        other = replace(heal, threads=2, recompute=True, save_every=5).given(str(start), str(moved))
        other = on_text(replace(other, evaluation=EvaluationRecipe(every=4, depths=(1, 3))), held_out_documents=8)
        told: list[Mapping[str, Any]] = []
        train(other, tmp_path / "run", on_record=told.append)
    finally:
        moved.with_suffix(".old").rename(text_of(heal))
    assert told[0]["step"] == 4
    assert set(told[0]["changed"]) == {
        *("threads", "recompute", "save_every", "start", "evaluation.every", "evaluation.depths"),
        *(f"phases[{i}].text.{name}" for i in (0, 1) for name in ("held_out_documents", "sources[0].path")),
    }
    assert told[0]["changed"]["threads"] == (1, 2)
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "whole"), rel=ROUNDING)


def test_what_would_make_it_another_run_is_refused_by_name(heal: Recipe, tmp_path: Path) -> None:
    train(heal, tmp_path / "run", until=1)
    plan, config = heal.phases[0], replace(HEAL_CONFIG, n_ff=96)
    wider = start_folder(tmp_path / "wider", config, tokenizer_json())
    for recipe, said in (
        (replace(heal, seed=1), "seed=1 is not what the run in this folder began with, 0"),
        (heal.given(str(wider)), "model.n_ff=96 .* give 72 again, or a new folder"),
        (changed(heal, depth=replace(plan.depth, mean=3)), r"phases\[0\].depth.mean=3"),
        (changed(heal, optimizer=replace(plan.optimizer, muon_lr=1e-3)), "muon_lr=0.001"),
        (replace(heal, phases=(plan,)), r"phases\[1\].name=None .* 'target'"),
    ):
        with pytest.raises(TrainError, match=said):
            train(recipe, tmp_path / "run")


def test_the_clock_of_a_run_goes_on(heal: Recipe, tmp_path: Path) -> None:
    train(heal, tmp_path, until=1)
    state = torch.load(tmp_path / "state.pt")
    torch.save({**state, "seconds": 1000.0, "cpu_seconds": 2000.0}, tmp_path / "state.pt")
    told: list[Mapping[str, Any]] = []
    train(heal, tmp_path, until=2, on_record=told.append)
    assert 1000 <= told[-1]["seconds"] < 1100
    assert 2000 <= told[-1]["cpu_seconds"] < 2100
    assert json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1]) == told[-1]
    assert read_run(tmp_path).seconds == told[-1]["seconds"]
