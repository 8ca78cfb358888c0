"""What a run starts from: looped checkpoints and plain ones, told apart by what they say they are."""

import json
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("torch")

from localdepth.errors import CheckpointError, TrainError
from localdepth_train.start import Start, open_checkpoint, trained_at
from localdepth_train.surgery import retrofit
from tests.bases import make_base
from tests.conftest import tokenizer_json
from tests.published import EXPECTED, make_checkpoint
from tests.training import tiny_recipe


def test_plain_and_looped_models_are_opened(tmp_path: Path) -> None:
    assert open_checkpoint(str(make_base(tmp_path / "plain", "qwen2"))).kind == "Qwen2"
    looped = open_checkpoint(str(make_checkpoint(tmp_path / "looped", "retrofit_llama")))
    assert looped.config == EXPECTED["retrofit_llama"]


def test_a_plain_model_is_refused_for_its_own_reason(tmp_path: Path) -> None:
    base = make_base(tmp_path, "llama")
    record = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**record, "hidden_act": "gelu"}))
    with pytest.raises(CheckpointError, match="hidden_act='gelu' is not supported"):
        open_checkpoint(str(base))
    (base / "config.json").write_text(json.dumps({**record, "model_type": "mamba"}))
    with pytest.raises(CheckpointError, match="model_type 'mamba'"):
        open_checkpoint(str(base))


def test_a_plain_model_trains_only_where_the_recipe_says_so(tmp_path: Path) -> None:
    base = make_base(tmp_path / "my base", "llama")
    (base / "tokenizer.json").write_text(tokenizer_json())
    recipe = replace(tiny_recipe(), model=None, start=str(base))
    with pytest.raises(TrainError, match="is a plain Llama model without a core") as refused:
        Start.of(recipe)
    line = re.findall(r"localdepth (retrofit .*) \(or other", str(refused.value))[0]
    words = [str(tmp_path / "out") if word == "my base-looped" else word for word in shlex.split(line)]
    subprocess.run([sys.executable, "-m", "localdepth", *words], check=True, capture_output=True)
    assert Start.of(replace(recipe, start=str(tmp_path / "out"))).model.config.n_core == 4
    assert Start.of(replace(recipe, allow_plain=True)).model.config.n_core == 6


def test_a_trained_model_keeps_licence_and_base_and_is_no_untrained_retrofit(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "llama")
    (base / "README.md").write_text("---\nlicense: mit\ntags: [x]\n---\nText.\n")
    (base / "tokenizer.json").write_text(tokenizer_json())
    retrofit(base, tmp_path / "looped", prelude="0", core="1", coda="2")
    card = Start.of(replace(tiny_recipe(), model=None, start=str(tmp_path / "looped"))).files["README.md"]
    assert card == '---\nlicense: mit\nbase_model: "base"\n---\n\nTrained from looped by `localdepth train run`.\n'


def test_a_trained_model_runs_as_deep_as_it_was_trained() -> None:
    config = EXPECTED["retrofit_llama"]
    trained = trained_at(config, 40)
    assert (trained.default_depth, trained.max_depth, trained.trained_mean_depth) == (40, 80, 40.0)
    assert trained_at(config, 1).auto_min_depth == 1
