"""The ``retrofit`` command as a user types it, from directories and from a stand-in for the Hub."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from localdepth.cli import main
from localdepth.errors import CheckpointError, ModelFileError, StorageError
from localdepth.store.checkpoint import fetch_checkpoint
from localdepth.store.hub import Hub
from localdepth_train.checkpoint import CARRIED, Checkpoint
from localdepth_train.checkpoint.plain import recognise_plain
from localdepth_train.layer_choice import PRESETS, spell_layers
from localdepth_train.surgery import retrofit
from tests.bases import BASES, make_base, random_base, write_weights
from tests.hub import Remote, StandIn, serving

CHOICE = ("--prelude", "0-1", "--core", "3,2", "--coda", "5")
BASE = "lab/base"
WIDE = {"hidden_size": 120, "intermediate_size": 400}


def run(*arguments: object) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "localdepth", "retrofit", *map(str, arguments)], capture_output=True, text=True
    )


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """The command inside this process: exit code, standard output, standard error."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["localdepth", "retrofit", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as leaving:
            main()
        out, err = capsys.readouterr()
        return int(leaving.value.code or 0), out, err

    return call


def test_the_command_equals_the_library(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "qwen2")
    done = run(base, "-o", tmp_path / "out", *CHOICE, "--seed", 7, "--json")
    assert done.returncode == 0, done.stderr
    made = retrofit(base, tmp_path / "again", prelude=[0, 1], core=[3, 2], coda=[5], seed=7)
    assert done.stdout.count("\n") == 1
    record = json.loads(done.stdout)
    assert record["layers"] == {"prelude": [0, 1], "core": [3, 2], "coda": [5]}
    assert (record["dropped"], record["kind"], record["n_params"]) == ([4], "Qwen2", made.config.n_params)
    assert record["flops_per_token"]["8"] == made.cost(8).flops
    assert record["base"]["kv_bytes_per_token"] == made.base_cost().kv_bytes
    one, other = Checkpoint(tmp_path / "out"), Checkpoint(tmp_path / "again")
    for name in one.config.tensors():
        np.testing.assert_array_equal(one.read(name), other.read(name))


def test_the_table_says_what_goes_where_and_what_it_costs(called: Any, tmp_path: Path) -> None:
    code, out, _ = called(make_base(tmp_path / "base", "llama"), "-o", tmp_path / "out", *CHOICE, "--init", "identity")
    assert code == 0
    rows = [line.split() for line in out.splitlines()]
    assert ["core", "3,2", "9,312"] in rows
    assert ["dropped", "4", "-"] in rows
    assert "injection concat_linear, init identity" in out
    assert [row[0] for row in rows if row and row[0] in ("base", "1", "2", "4", "8", "16", "32")] == [
        *("base", "1", "2", "4", "8", "16", "32")
    ]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (CHOICE[:4], 2, "name the layers of prelude, core and coda"),
        ((*CHOICE[:4], "--coda", "3-5"), 2, "layer 3 is named twice"),
        (("--preset", "tinyllama-4-8-4"), 2, "is for bases of 22 layers, this one has 6"),
        ((*CHOICE, "--init", "identity", "--injection", "add"), 2, "change one of them"),
        ((*CHOICE, "--layout", "published"), 2, "the published layout has no place for qk_bias=True, v_bias=True"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    called: Any, arguments: tuple[str, ...], code: int, message: str, tmp_path: Path
) -> None:
    got, out, err = called(make_base(tmp_path / "base", "qwen2"), "-o", tmp_path / "out", *arguments, "--json")
    assert got == code
    assert message in json.loads(out)["error"]["message"]
    assert message in " ".join(err.split())
    assert not (tmp_path / "out").exists()


def test_what_is_replaced_is_said(called: Any, tmp_path: Path) -> None:
    line = (make_base(tmp_path / "base", "llama"), "-o", tmp_path / "out", *CHOICE)
    assert "replaces" not in called(*line)[1]
    assert "it replaces the retrofit in that folder" in called(*line, "--injection", "add")[1]
    record = json.loads(called(*line, "--init", "pass-through", "--json")[1])
    assert (record["has_replaced"], record["init"]) == (True, "pass-through")


def test_a_foreign_folder_is_left_alone(called: Any, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years")
    code, _, err = called(make_base(tmp_path / "base", "llama"), "-o", tmp_path / "out", *CHOICE)
    assert code == StorageError.exit_code
    assert "would be lost" in err
    assert (tmp_path / "out" / "thesis.tex").read_text() == "years"


def test_the_help_names_every_preset_and_its_layers(called: Any) -> None:
    code, out, _ = called("--help")
    _, _, rows = out.partition("Presets:")
    assert code == 0
    assert [row.split() for row in rows.splitlines()[1:]] == [
        [name, *(spell_layers(layers) for _, layers in preset.layers.stages()), str(preset.n_layer), "layers"]
        for name, preset in PRESETS.items()
    ]


# --- the Hub ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A Hub with a base of some megabytes, which the command asks."""
    base = make_base(tmp_path / "base", "olmo2", **WIDE)
    write_weights(base, {**BASES["olmo2"], **WIDE}, np.float32)
    files = {path.name: path.read_bytes() for path in base.iterdir()}
    with serving() as state:
        state.repos[BASE] = Remote({**files, "README.md": b"---\nlicense: mit\n---\n"})
        monkeypatch.setenv("HF_ENDPOINT", state.url)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
        yield state


def hub(server: StandIn, tmp_path: Path) -> Hub:
    return Hub(server.url, tmp_path / "hf" / "hub")


def judge(record: Any, shapes: Any, where: str) -> None:
    recognise_plain(record, shapes, Path(where))


def test_a_base_comes_from_the_hub_and_then_from_the_cache(server: StandIn, tmp_path: Path) -> None:
    for out in ("first", "second"):
        done = run(BASE, "-o", tmp_path / out, *CHOICE)
        assert done.returncode == 0, done.stderr
    assert server.sent["model.safetensors"] < 1.5 * len(server.repos[BASE].files["model.safetensors"])
    card = (tmp_path / "first" / "README.md").read_text()
    assert card.startswith(f'---\nlicense: mit\nbase_model: "{BASE}"\n---\n')
    tensor = Checkpoint(tmp_path / "first").read("coda.0.ffn_post_norm.weight")
    np.testing.assert_array_equal(
        tensor, random_base({**BASES["olmo2"], **WIDE})["model.layers.5.post_feedforward_layernorm.weight"]
    )


def test_all_that_goes_with_the_weights_comes_from_the_hub(server: StandIn, tmp_path: Path) -> None:
    small = {name: name.encode() for name in CARRIED if not name.endswith(".json")}
    server.repos[BASE].files |= {**small, "added_tokens.json": b"{}", "notes.txt": b"theirs", "pytorch_model.bin": b"x"}
    done = run(BASE, "-o", tmp_path / "out", *CHOICE)
    assert done.returncode == 0, done.stderr
    got = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert set(got) == {*small, "added_tokens.json", "config.json", "model.safetensors", "README.md"}
    assert {name: got[name] for name in small} == small


# Two bars at once, which rich before 14.1 refuses by an error of its own.
STRICT = """
import sys
from rich.console import Console

set_live = Console.set_live

def only_one(console, live):
    is_alone = set_live(console, live)
    assert is_alone is not False
    return is_alone

Console.set_live = only_one
from localdepth.cli import main
main()
"""


def test_a_base_from_the_hub_is_there_before_the_writing_is_shown(
    server: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # bars, as on a terminal
    line = [sys.executable, "-c", STRICT, "retrofit", BASE, "-o", str(tmp_path / "out"), *CHOICE]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "writing" in done.stderr


def test_what_is_no_base_is_refused_before_its_weights_are_fetched(server: StandIn, tmp_path: Path) -> None:
    record = json.loads(server.repos[BASE].files["config.json"])
    for changes, message in (
        ({"model_type": "gemma3"}, "bases can be llama"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"num_hidden_layers": 7}, r"missing model\.layers\.6"),
    ):
        server.repos[BASE].files["config.json"] = json.dumps({**record, **changes}).encode()
        with pytest.raises(CheckpointError, match=message):
            fetch_checkpoint(BASE, hub(server, tmp_path), judge)
    assert server.sent["model.safetensors"] < len(server.repos[BASE].files["model.safetensors"])


def test_names_that_are_neither_folder_nor_repository_are_refused(server: StandIn, tmp_path: Path) -> None:
    done = run("lab/nowhere", "-o", tmp_path / "out", *CHOICE)
    assert done.returncode == ModelFileError.exit_code
    said = " ".join(done.stderr.split())
    assert said.startswith("there is no folder lab/nowhere here; asking the Hugging Face Hub for it")
    assert "lab/nowhere@main is not on the Hub" in said
    done = run("./no such folder", "-o", tmp_path / "out", *CHOICE)
    assert "no name of a repository" in " ".join(done.stderr.split())
    (tmp_path / "file").write_text("")
    done = run(tmp_path / "file", "-o", tmp_path / "out", *CHOICE)
    assert "is not a directory" in " ".join(done.stderr.split())


def test_a_download_that_has_no_room_is_refused_with_the_numbers(
    server: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda place: type("Usage", (), {"free": 1000})())
    with pytest.raises(StorageError, match=r"needs .* MB in .*, which has 1 kB free"):
        fetch_checkpoint(BASE, hub(server, tmp_path), judge)
