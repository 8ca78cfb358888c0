"""The report by recipe and depth: finer costs more and diverges less, and float32 not at all."""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from localdepth.engine.toy import random_weights
from localdepth.errors import CheckpointError, ConfigError, DepthError
from localdepth.gguf import read
from localdepth_export.convert import to_gguf
from localdepth_export.divergence import Divergence, Outcome, compare, compare_recipes
from localdepth_export.importance import Importance, collect
from localdepth_train.checkpoint import Checkpoint, save
from tests.conftest import tokenizer_json
from tests.looped import loop_llama
from tests.published import EXPECTED

CONFIG = replace(EXPECTED["retrofit_llama"], n_prelude=1, n_core=1, n_embd=64, head_dim=16, n_ff=96, n_vocab=300)
TEXT = "the cat sat on the mat and the rat ate the oats " * 4


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    files = {"tokenizer.json": tokenizer_json()}
    return save(tmp_path_factory.mktemp("divergence") / "c", CONFIG, random_weights(CONFIG, 0), files)


def test_divergence_of_known_logits() -> None:
    reference = np.log(np.array([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]], np.float32))
    ours = np.log(np.array([[0.25, 0.5, 0.25], [0.1, 0.1, 0.8]], np.float32)) + 7  # the same shift changes nothing
    found = compare(ours, reference)
    assert found.kl == pytest.approx(0.25 * np.log(2) / 2)
    assert found.top1 == 0.5
    assert found.max_abs == pytest.approx(7 + np.log(2))
    assert compare(reference, reference) == Divergence(0.0, 0.0, 1.0)


def test_divergence_does_not_depend_on_how_many_rows_are_compared_at_a_time() -> None:
    ours, reference = np.random.default_rng(0).standard_normal((2, 150, 9)).astype(np.float32)
    parts = [compare(ours[i : i + 30], reference[i : i + 30]) for i in range(0, 150, 30)]
    whole = compare(ours, reference)
    assert whole.kl == pytest.approx(np.mean([part.kl for part in parts]))
    assert whole.top1 == pytest.approx(np.mean([part.top1 for part in parts]))


def test_finer_recipes_cost_more_and_diverge_less(checkpoint: Path) -> None:
    seen: list[tuple[int, int]] = []
    recipes = ("F32", "Q8_0", "Q4_0,core=Q8_0", "Q4_0")
    exact, *rest = compare_recipes(
        checkpoint, TEXT, recipes=recipes, depths=(1, 4), on_progress=lambda *at: seen.append(at)
    )
    assert set(exact.by_depth.values()) == {Divergence(0.0, 0.0, 1.0)}
    for finer, coarser in zip([exact, *rest], rest, strict=False):
        assert finer.n_bytes > coarser.n_bytes
        assert finer.bits > coarser.bits
        for depth in (1, 4):
            assert finer.by_depth[depth].kl < coarser.by_depth[depth].kl
    assert [outcome.recipe for outcome in (exact, *rest)] == list(recipes)
    assert seen == [(i, 4) for i in range(1, 5)]


def test_depths_double_up_to_the_default_where_none_are_given(checkpoint: Path) -> None:
    [outcome] = compare_recipes(checkpoint, [[1, 2, 3]], recipes=["Q8_0", "q8_0"])
    assert list(outcome.by_depth) == [1, 2, 4, 6]
    assert outcome.n_fallbacks == 0


def test_comparisons_that_cannot_be_made_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no recipes"):
        compare_recipes(checkpoint, TEXT, recipes=())
    with pytest.raises(ConfigError, match="not one of"):
        compare_recipes(checkpoint, TEXT, recipes=["Q9"])
    with pytest.raises(ConfigError, match="nothing to run"):
        compare_recipes(checkpoint, "")
    with pytest.raises(DepthError):
        compare_recipes(checkpoint, TEXT, depths=(99,))
    with pytest.raises(CheckpointError):
        compare_recipes(tmp_path, TEXT)


def localdepth(*arguments: object) -> dict[str, Any]:
    """The object that a command prints with ``--json``."""
    command = [sys.executable, "-m", "localdepth", *map(str, arguments), "--json"]
    record: dict[str, Any] = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    return record


def test_importance_compare_export_and_verify_from_the_command_line(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text(TEXT)
    to_gguf(checkpoint, tmp_path / "f32.gguf", quant="F32")
    made = localdepth(
        *("export", "importance", tmp_path / "f32.gguf", "-o", tmp_path / "i", "--text", tmp_path / "text"),
        *("--depths", "1,3"),
    )
    importance = collect(tmp_path / "f32.gguf", TEXT, depths=(1, 3))
    assert made["origin"] == Importance.load(tmp_path / "i").origin == importance.origin

    options = ("-q", "Q4_0", "-q", "Q4_0,core=Q8_0", "--depths", "2", "--importance", tmp_path / "i")
    compared = localdepth("export", "compare", checkpoint, "--text", tmp_path / "text", *options)["recipes"]
    expected = compare_recipes(checkpoint, TEXT, recipes=("Q4_0", "Q4_0,core=Q8_0"), depths=(2,), importance=importance)
    assert [row["by_depth"]["2"]["kl"] for row in compared] == [row.by_depth[2].kl for row in expected]

    command = [
        sys.executable,
        "-m",
        "localdepth",
        "export",
        "compare",
        checkpoint,
        "--text",
        tmp_path / "text",
        *options,
    ]
    shown = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True).stdout.splitlines()
    assert [line.split()[0] for line in shown[1:4]] == ["recipe", "Q4_0", "Q4_0,core=Q8_0"]

    file = tmp_path / "m.gguf"
    assert localdepth("export", "gguf", checkpoint, "-o", file, "-q", "q4_0", "--importance", tmp_path / "i")
    with read(file) as opened:
        assert opened.provenance["importance"] == importance.origin
    assert localdepth("verify", file, checkpoint, "--depths", "1", "--importance", tmp_path / "i")["exact"]


def by_recipe(outcomes: Sequence[Outcome]) -> dict[str, Outcome]:
    return {outcome.recipe: outcome for outcome in outcomes}


def test_a_real_model_keeps_its_mind_and_importance_helps_it(fixtures: Path, tmp_path: Path) -> None:
    checkpoint = loop_llama(fixtures / "data" / "weights" / "babyllama-105", tmp_path / "c")
    text = (
        "One day, a little girl named Lily found a needle in her room. She knew it was difficult to play with it "
        "because it was sharp. Lily wanted to share the needle with her mom, so she could sew a button on her shirt."
    )
    plain = by_recipe(
        compare_recipes(checkpoint, text, recipes=("Q8_0", "Q4_K", "Q4_0,core=Q8_0", "Q4_0"), depths=(4,))
    )
    assert plain["Q8_0"].by_depth[4].kl < 2e-3
    assert plain["Q4_0"].by_depth[4].kl < 0.3
    assert plain["Q4_0,core=Q8_0"].by_depth[4].kl < plain["Q4_0"].by_depth[4].kl
    n_matrices = sum(len(shape) == 2 for shape in Checkpoint(checkpoint).config.tensors().values())
    assert plain["Q4_K"].n_fallbacks == n_matrices  # rows of 128 and 352: no block of 256
    to_gguf(checkpoint, tmp_path / "f32.gguf", quant="F32")
    importance = collect(tmp_path / "f32.gguf", text, depths=(4,))
    [helped] = compare_recipes(checkpoint, text, recipes=("Q4_0",), depths=(4,), importance=importance)
    assert helped.by_depth[4].kl < plain["Q4_0"].by_depth[4].kl
