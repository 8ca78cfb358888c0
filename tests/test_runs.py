"""Runs on text, through phases, killed, out of room, damaged, and shared between processes."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from localdepth.errors import StorageError, TrainError  # noqa: E402
from localdepth_train.checkpoint import Checkpoint  # noqa: E402
from localdepth_train.recipe import DepthRecipe, DrawPer, ObjectiveRecipe, Recipe, load_recipe  # noqa: E402
from localdepth_train.run_folder import RunFolder  # noqa: E402
from localdepth_train.trainer import Trainer, train  # noqa: E402
from tests.conftest import tokenizer_json  # noqa: E402
from tests.published import EXPECTED  # noqa: E402
from tests.training import changed, losses, records, start_folder, text_recipe, tiny_recipe  # noqa: E402

SHARED_ROUNDING = 1e-5  # relative, of losses that two processes share
START_S = 60.0  # until a run has begun; a busy machine imports slowly


@pytest.fixture(scope="module")
def heal(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """Twelve steps in two phases on a text of 120 documents."""
    folder = tmp_path_factory.mktemp("heal")
    rows = ({"text": f"the cat number {i} sat on the mat and ate {i % 7} oats"} for i in range(120))
    (folder / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = replace(EXPECTED["retrofit_llama"], n_vocab=300, n_ctx=64)
    return text_recipe(start_folder(folder / "start", config, tokenizer_json()), folder / "text.jsonl")


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
    train(heal, tmp_path / "hurt")
    assert "going on from the state saved before it" in caplog.text
    assert losses(tmp_path / "whole") == losses(tmp_path / "hurt")


def test_a_full_disk_keeps_the_last_state(heal: Recipe, tmp_path: Path) -> None:
    train(heal, tmp_path, until=3)
    saved = (tmp_path / "state.pt").read_bytes()
    folder, trainer = RunFolder(tmp_path), Trainer(heal)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(saved) // 2, limits[1]))
    try:
        with pytest.raises(StorageError, match="saved before is kept"):
            folder.write_state(trainer.state())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert (tmp_path / "state.pt").read_bytes() == saved
    assert not list(tmp_path.glob("*.partial"))


def test_a_bad_row_stops_with_its_line_and_keeps_the_state(heal: Recipe, tmp_path: Path) -> None:
    text = tmp_path / "bad.jsonl"
    source = heal.phases[0].text
    assert source is not None
    good = Path(source.sources[0].path).read_text()
    text.write_text(good + "{broken\n")
    with pytest.raises(TrainError, match=r"bad\.jsonl.*121"):
        train(heal.given(text=str(text)), tmp_path / "run")


def toml(recipe: Recipe, path: Path) -> Path:
    """A recipe file on the text of another, long enough to be killed in."""
    text = recipe.phases[0].text
    assert text is not None
    path.write_text(f"""
    seed = 0
    batch_size = 4
    save_every = 2
    start = "{recipe.start}"
    [evaluation]
    every = 400
    depths = [1]
    [[phases]]
    name = "heal"
    steps = 400
    [phases.depth]
    mean = 2
    backprop = 2
    [phases.optimizer]
    adamw_lr = 1e-3
    [phases.text]
    n_tokens = 32
    shuffle_buffer = 8
    [[phases.text.sources]]
    path = "{text.sources[0].path}"
    """)
    return path


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


@pytest.mark.slow
@pytest.mark.parametrize("per", DrawPer)
@pytest.mark.parametrize("shard", [False, True])
def test_two_processes_lose_as_one_does(tmp_path: Path, per: DrawPer, shard: bool) -> None:
    train(shared_recipe(per, shard), tmp_path / "alone")
    together(tmp_path, per, shard)
    assert losses(tmp_path / "together") == pytest.approx(losses(tmp_path / "alone"), rel=SHARED_ROUNDING)
    one, other = records(tmp_path / "alone"), records(tmp_path / "together")
    assert [record["flops"] for record in one] == [record["flops"] for record in other]


def together(folder: Path, per: DrawPer, shard: bool) -> None:
    """The same recipe by two processes."""
    (folder / "program.py").write_text(
        "import torch; torch.set_num_threads(1)\n"
        "from localdepth_train.recipe import DrawPer; from localdepth_train.trainer import train\n"
        "from tests.test_runs import shared_recipe\n"
        f"train(shared_recipe(DrawPer({str(per)!r}), {shard}), {str(folder / 'together')!r})\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    root = str(Path(__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, str(folder / "program.py")], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def shared_recipe(per: DrawPer, shard: bool) -> Recipe:
    """Two phases of six steps by AdamW: Muon works in bfloat16 and magnifies how sums were rounded."""
    tiny = tiny_recipe()
    depth, optimizer = replace(tiny.phases[0].depth, per=per), replace(tiny.phases[0].optimizer, muon_lr=0.0)
    [phase] = changed(tiny, steps=6, depth=depth, optimizer=optimizer).phases
    return replace(tiny, shard=shard, phases=(phase, replace(phase, name="again")))
