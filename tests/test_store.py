"""The models folder, and pulling into it from a stand-in for the Hugging Face Hub."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from localdepth.cli import main
from localdepth.cli.converters import choose_converter
from localdepth.engine.toy import random_weights
from localdepth.errors import (
    CheckpointError,
    ConfigError,
    MachineError,
    MissingExtra,
    ModelFileError,
    RequestError,
    StorageError,
)
from localdepth.gguf import read
from localdepth.loading import load
from localdepth.onnx_folder.folder import read as read_folder
from localdepth.onnx_folder.layout import QUANTS
from localdepth.store import plan as planning
from localdepth.store.checkpoint import TEXTS
from localdepth.store.disk import Format, checksum
from localdepth.store.folder import Manifest, Store, Verdict, find, model_name
from localdepth.store.hub import Hub, parse_reference
from localdepth.store.plan import plan
from localdepth.store.pull import importable, pull
from localdepth_export.convert import to_gguf
from localdepth_export.onnx_graphs.convert import to_onnx
from localdepth_train.checkpoint import CARRIED, save
from tests.conftest import ROOT, tokenizer_json
from tests.hub import Remote, StandIn, serving
from tests.published import EXPECTED, make_checkpoint

PIECE = 1 << 16
LOOPED = "lab/looped"
GRAPHS = "lab/graphs"
CHECKPOINT = "lab/huginn-small"
WEIGHTS = "model.safetensors"
DEFAULT_ONNX = ROOT / "localdepth" / "models" / "default.onnx"


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a megabyte in our own layout, with tokenizer and card."""
    config = replace(EXPECTED["huginn"], n_embd=64, head_dim=16, n_ff=160, n_vocab=300)
    card = "---\nlicense: mit\n---\n"
    folder = tmp_path_factory.mktemp("checkpoint")
    return save(folder, config, random_weights(config, 5), {"tokenizer.json": tokenizer_json(), "README.md": card})


@pytest.fixture(scope="session")
def model_bytes(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """That checkpoint as a model file."""
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    to_gguf(checkpoint, path, quant="Q8_0")
    return path.read_bytes()


@pytest.fixture(scope="session")
def folder_bytes(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """That checkpoint as an ONNX folder, by file name."""
    folder = tmp_path_factory.mktemp("onnx") / "model"
    to_onnx(checkpoint, folder, bits=8)
    return files_of(folder)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def in_shards(files: dict[str, bytes], folder: Path) -> dict[str, bytes]:
    """The same checkpoint with its weights in two files and an index."""
    (folder / WEIGHTS).write_bytes(files[WEIGHTS])
    tensors = sorted(load_file(folder / WEIGHTS).items())
    named = {}
    for i, part in enumerate((tensors[: len(tensors) // 2], tensors[len(tensors) // 2 :]), start=1):
        shard = f"model-{i:05}-of-00002.safetensors"
        save_file(dict(part), folder / shard)
        named |= dict.fromkeys(dict(part), shard)
    shards = {shard: (folder / shard).read_bytes() for shard in named.values()}
    rest = {name: content for name, content in files.items() if name != WEIGHTS}
    return {**rest, **shards, "model.safetensors.index.json": json.dumps({"weight_map": named}).encode()}


@pytest.fixture
def server(
    checkpoint: Path, model_bytes: bytes, folder_bytes: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> Iterator[StandIn]:
    """A Hub with a model file of ours, a folder and a checkpoint; downloads are written in small pieces."""
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", PIECE)
    with serving() as state:
        plain = {".gitattributes": b"*.gguf filter=lfs", "README.md": b"---\nlicense: mit\n---\n"}
        state.repos[LOOPED] = Remote({**plain, "looped-Q8_0.gguf": model_bytes}, architecture="localdepth")
        state.repos[GRAPHS] = Remote({**plain, **folder_bytes})
        state.repos[CHECKPOINT] = Remote({**files_of(checkpoint), "pytorch_model.bin": b"a pickle"})
        yield state


class Place:
    """A store and a Hub with a cache of their own, and pulls with both: by the library, by the command line."""

    def __init__(
        self, server: StandIn, folder: Path, capture: pytest.CaptureFixture[str], patch: pytest.MonkeyPatch
    ) -> None:
        self.capture, self.patch = capture, patch
        self.home, self.hf_home = folder / "home", folder / "hf"
        self.store, self.hub = Store(self.home / "models"), Hub(server.url, self.hf_home / "hub")
        self.env = {
            **os.environ,
            "HF_ENDPOINT": server.url,
            "HF_HOME": str(self.hf_home),
            "LOCALDEPTH_HOME": str(self.home),
        }

    def plan(self, reference: str, *, format: Any = None, bits: int | None = None, **wanted: Any) -> Any:  # noqa: A002
        converter = choose_converter(format, wanted.get("quant"), bits)
        if bits is not None:
            wanted["quant"] = QUANTS[bits]
        return plan(reference, self.store, self.hub, converter, format=format, **wanted)

    def pull(self, reference: str, *, keep_download: bool = True, **wanted: Any) -> Any:
        return pull(self.plan(reference, **wanted), self.store, self.hub, keep_download=keep_download)

    def partial(self) -> list[Path]:
        return list(self.hf_home.rglob("*.incomplete"))

    def run(self, *arguments: str) -> Any:
        """The command line; exit code and what it printed."""
        self.patch.setattr(sys, "argv", ["localdepth", "models", *arguments])
        self.capture.readouterr()
        with pytest.raises(SystemExit) as done:
            main()
        out, err = self.capture.readouterr()
        return subprocess.CompletedProcess(arguments, int(done.value.code or 0), out, err)

    def start(self, *arguments: str) -> "subprocess.Popen[bytes]":
        """The command line in a process of its own, to be killed."""
        program = (
            "import sys, huggingface_hub.constants as c\n"
            f"c.DOWNLOAD_CHUNK_SIZE = {PIECE}\n"
            "from localdepth.cli import main\n"
            f"sys.argv = ['localdepth', 'models', *{list(arguments)!r}]\n"
            "main()"
        )
        return subprocess.Popen(
            [sys.executable, "-c", program], env=self.env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )


@pytest.fixture
def place(
    server: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Place:
    made = Place(server, tmp_path, capsys, monkeypatch)
    monkeypatch.setenv("LOCALDEPTH_HOME", str(made.home))
    constants = huggingface_hub.constants  # what it has read from the environment when it was imported
    files = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, server.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(made.hub.cache))
    return made


# --- what a pull brings -----------------------------------------------------------------------------------------------


def test_a_model_file_is_pulled_as_it_is(server: StandIn, place: Place, model_bytes: bytes) -> None:
    stored = place.pull(LOOPED)
    assert stored.name == "looped-Q8_0"
    assert stored.path.read_bytes() == model_bytes
    assert stored.verify() is Verdict.SOUND
    manifest = stored.manifest
    assert (manifest.repo, manifest.revision, manifest.commit) == (LOOPED, "main", server.repos[LOOPED].commit)
    assert (manifest.file, manifest.quant, manifest.license) == ("looped-Q8_0.gguf", "Q8_0", "apache-2.0")
    assert [found.name for found in place.store.models()] == ["looped-Q8_0"]
    assert find("looped-Q8_0", place.store.folder) == stored.path
    assert find("looped", place.store.folder) is None


def test_a_pulled_file_takes_no_second_place_on_the_disk(place: Place) -> None:
    assert place.pull(LOOPED).path.stat().st_nlink == 2


def test_a_checkpoint_is_converted_on_arrival(place: Place, checkpoint: Path, tmp_path: Path) -> None:
    stored = place.pull(CHECKPOINT, quant="q8_0")
    to_gguf(checkpoint, tmp_path / "direct.gguf", quant="Q8_0")
    assert stored.name == "huginn-small-Q8_0"
    assert stored.manifest.file is None
    with read(stored.path) as ours, read(tmp_path / "direct.gguf") as direct:
        assert ours.tokenizer == direct.tokenizer
        assert ours.provenance["license"] == "apache-2.0"
        assert all((ours.data(name) == direct.data(name)).all() for name in direct.tensors)


def test_pickles_are_never_fetched(server: StandIn, place: Place) -> None:
    place.pull(CHECKPOINT)
    assert server.sent["pytorch_model.bin"] == 0


def test_whatever_goes_with_the_weights_is_fetched() -> None:
    assert set(CARRIED) <= set(TEXTS)


def test_a_published_checkpoint_in_shards_is_converted(server: StandIn, place: Place, tmp_path: Path) -> None:
    files = files_of(make_checkpoint(tmp_path / "published", "retrofit_llama"))
    server.repos["lab/retrofit"] = Remote(in_shards(files, tmp_path))
    stored = place.pull("lab/retrofit", quant="F16", name="small")
    with read(stored.path) as file:
        assert file.config == EXPECTED["retrofit_llama"]
    assert (stored.name, stored.manifest.quant) == ("small", "F16")


@pytest.mark.parametrize("kind", list(Format))
def test_a_pull_imports_no_torch(kind: Format, place: Place) -> None:
    program = (
        "import sys\nfrom localdepth.cli import main\n"
        f"sys.argv = ['localdepth', 'models', 'pull', '{CHECKPOINT}', '--format', '{kind}', '--json']\n"
        "try:\n    main()\nexcept SystemExit as done:\n    print(done.code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], env=place.env, capture_output=True, text=True)
    assert done.stdout.splitlines()[1:] == ["0 False"], done.stderr


def test_asking_imports_no_huggingface_hub() -> None:
    program = "import sys, localdepth, localdepth.cli.models\nprint([m for m in sys.modules if 'huggingface' in m])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_what_is_there_already_is_not_pulled_again(server: StandIn, place: Place) -> None:
    first = place.pull(CHECKPOINT)
    sent, made = server.sent[WEIGHTS], first.path.stat().st_mtime_ns
    second = place.pull(CHECKPOINT)
    assert (server.sent[WEIGHTS], second.path.stat().st_mtime_ns) == (sent, made)


def test_a_damaged_model_is_made_again(place: Place) -> None:
    stored = place.pull(CHECKPOINT)
    stored.path.write_bytes(stored.path.read_bytes()[:-1] + b"\0")
    assert place.store.get(stored.name).verify() is Verdict.DAMAGED
    assert place.pull(CHECKPOINT).verify() is Verdict.SOUND


def test_a_newer_commit_takes_the_place_of_an_older(server: StandIn, place: Place) -> None:
    old = place.pull(CHECKPOINT).manifest.commit
    server.repos[CHECKPOINT].files["README.md"] = b"---\nlicense: mit\n---\nnew"
    new = place.pull(CHECKPOINT).manifest.commit
    assert old != new
    assert len(place.store.models()) == 1


def test_a_commit_can_be_asked_for(server: StandIn, place: Place) -> None:
    commit = server.repos[LOOPED].commit
    assert place.pull(f"{LOOPED}@{commit}").manifest.revision == commit


def test_a_download_that_is_not_kept_leaves_the_cache(place: Place) -> None:
    stored = place.pull(CHECKPOINT, keep_download=False)
    assert stored.verify() is Verdict.SOUND
    assert list(place.hf_home.rglob("*.safetensors")) == []
    assert list(place.hf_home.rglob("blobs/*")) == []
    assert place.pull(CHECKPOINT, keep_download=False).path == stored.path


# --- folders of ONNX graphs -------------------------------------------------------------------------------------------


def within(folder: str, files: dict[str, bytes]) -> dict[str, bytes]:
    return {f"{folder}/{name}": content for name, content in files.items()}


def test_a_folder_is_pulled_as_it_is_and_answers_by_its_name(
    server: StandIn, place: Place, folder_bytes: dict[str, bytes]
) -> None:
    stored = place.pull(GRAPHS)
    assert (stored.name, stored.path.name) == ("graphs-INT8", "graphs-INT8.onnx")
    assert files_of(stored.path) == {**folder_bytes, "README.md": server.repos[GRAPHS].files["README.md"]}
    assert stored.verify() is Verdict.SOUND
    manifest = stored.manifest
    assert (manifest.file, manifest.quant, manifest.license) == (".", "INT8", "apache-2.0")
    assert manifest.n_bytes == sum(map(len, files_of(stored.path).values()))
    assert {path.stat().st_nlink for path in stored.path.iterdir()} == {2}  # no second place on the disk
    assert find("graphs-INT8", place.store.folder) == stored.path
    with load("graphs-INT8") as model:
        assert model.generate("the cat", max_tokens=2, depth=1).depth == 1


def test_a_folder_inside_a_repository_is_found_beside_other_models(
    server: StandIn, place: Place, folder_bytes: dict[str, bytes]
) -> None:
    server.repos[LOOPED].files |= within("web/onnx", folder_bytes)
    assert place.pull(LOOPED).name == "looped-Q8_0"  # ggml is installed
    stored = place.pull(LOOPED, format=Format.ONNX)
    assert (stored.name, stored.manifest.file) == ("looped-INT8", "web/onnx")
    assert place.pull(LOOPED, file="web/onnx", name="same").verify() is Verdict.SOUND
    with pytest.raises(RequestError, match=r"has no GGUF file 'web/onnx'; it has looped-Q8_0\.gguf, web/onnx"):
        place.pull(LOOPED, file="web/onnx", format=Format.GGUF)
    assert {path.name for path in stored.path.iterdir()} == set(folder_bytes)


def test_one_of_several_folders_is_picked_by_bits_or_name(
    server: StandIn, place: Place, folder_bytes: dict[str, bytes], checkpoint: Path, tmp_path: Path
) -> None:
    to_onnx(checkpoint, tmp_path / "m", bits=4)
    server.repos[GRAPHS].files |= within("small", files_of(tmp_path / "m"))
    with pytest.raises(RequestError, match=r"several models: \. \(all of it\), small; choose one with --file"):
        place.pull(GRAPHS)
    assert place.pull(GRAPHS, bits=4).name == "graphs-INT4"
    assert place.pull(GRAPHS, bits=8).name == "graphs-INT8"
    with pytest.raises(RequestError, match=r"no model of quant 'F16'; it has \. \(all of it\), small"):
        place.pull(GRAPHS, bits=16)
    with pytest.raises(RequestError, match=r"no GGUF file; it has \. \(all of it\), small"):
        place.pull(GRAPHS, format=Format.GGUF)


def test_a_checkpoint_becomes_a_folder_where_one_is_wanted(
    place: Place, checkpoint: Path, folder_bytes: dict[str, bytes]
) -> None:
    stored = place.pull(CHECKPOINT, format=Format.ONNX)
    assert (stored.name, stored.manifest.file, stored.manifest.quant) == ("huginn-small-INT8", None, "INT8")
    assert stored.verify() is Verdict.SOUND
    assert files_of(stored.path)["weights.bin"] == folder_bytes["weights.bin"]
    made = stored.path.stat().st_ino
    assert place.pull(CHECKPOINT, format=Format.ONNX).path.stat().st_ino == made
    assert place.pull(CHECKPOINT, bits=4).manifest.quant == "INT4"
    with read_folder(stored.path) as opened:
        assert opened.provenance["source"] == f"{CHECKPOINT}@{stored.manifest.commit}"
        assert opened.provenance["license"] == "apache-2.0"


def test_a_damaged_folder_is_made_again(place: Place) -> None:
    stored = place.pull(GRAPHS)
    (stored.path / "looped.onnx").unlink()
    (stored.path / "looped.onnx").write_bytes(b"damaged")  # not into the cache, which has the same file
    assert place.store.get(stored.name).verify() is Verdict.DAMAGED
    assert place.pull(GRAPHS).verify() is Verdict.SOUND
    (stored.path / "config.json").unlink()
    [listed] = place.store.models()
    assert (listed.name, listed.verify()) == (stored.name, Verdict.DAMAGED)
    assert place.pull(GRAPHS).verify() is Verdict.SOUND
    assert {path.name for path in place.store.folder.glob("[!.]*")} == {"graphs-INT8.onnx", "graphs-INT8.onnx.json"}


def changed(record: bytes, **values: Any) -> bytes:
    return json.dumps({**json.loads(record), **values}).encode()


@pytest.mark.parametrize(
    ("name", "change", "error", "message"),
    [
        ("model.onnx", None, CheckpointError, r"config.json in lab/graphs names 'model.onnx', which is not beside it"),
        ("weights.bin", b"short", ModelFileError, r"weights.bin in lab/graphs has 5 bytes, a model of its sizes"),
        ("config.json", b"{", CheckpointError, r"not valid JSON"),
        ("config.json", {"later": 1}, ModelFileError, r"unknown key 'later'.* upgrade localdepth"),
        ("config.json", {"bits": {}}, ModelFileError, r"layers cannot be made of 0 matrices"),
        ("config.json", {"checksums": {"../up": "0"}}, ModelFileError, r"checksums has none for weights.bin"),
        ("config.json", {"format": "other"}, CheckpointError, r"no safetensors weights"),
    ],
)
def test_a_folder_that_cannot_be_used_is_refused_before_the_download(
    name: str, change: Any, error: type[Exception], message: str, server: StandIn, place: Place
) -> None:
    files = server.repos[GRAPHS].files
    was = files.pop(name)
    if change is not None:
        files[name] = changed(was, **change) if isinstance(change, dict) else change
    with pytest.raises(error, match=message):
        place.pull(GRAPHS)
    assert server.sent["weights.bin"] == 0


@pytest.mark.parametrize("name", ["weights.bin", "pass.onnx", "looped.onnx"])
def test_a_folder_of_other_bytes_than_its_record_says_does_not_enter_the_store(
    name: str, server: StandIn, place: Place
) -> None:
    files = server.repos[GRAPHS].files
    files[name] = files[name][:-1] + bytes([files[name][-1] ^ 1])
    with pytest.raises(ModelFileError, match="checksum"):
        place.pull(GRAPHS)
    assert place.store.models() == []
    assert list((place.store.folder / ".pull").iterdir()) == []


def test_a_folder_in_the_cache_is_imported_without_a_network(
    server: StandIn, place: Place, request: pytest.FixtureRequest
) -> None:
    huggingface_hub.snapshot_download(GRAPHS, cache_dir=place.hub.cache, endpoint=place.env["HF_ENDPOINT"])
    request.getfixturevalue("offline")
    server.asked.clear()
    [found] = importable(place.store, place.hub, choose_converter())
    assert (found.reference, found.file) == (GRAPHS, ".")
    assert place.pull(GRAPHS).verify() is Verdict.SOUND
    assert (list(importable(place.store, place.hub, choose_converter())), server.asked) == ([], [])
    [weights] = (place.hub.cache).rglob("weights.bin")
    weights.unlink()
    with pytest.raises(MachineError, match=r"cache lacks 'weights\.bin' of lab/graphs and the Hub cannot be asked"):
        place.pull(GRAPHS)
    assert list(importable(Store(place.home / "other"), place.hub, choose_converter())) == []


@pytest.mark.parametrize(
    "die_at",
    [
        "from localdepth_export.onnx_graphs import folder\nfolder.unrolled_graph = die\n",
        "was = Path.replace\n"
        "Path.replace = lambda path, to: die() if Path(to).suffix == '.onnx' and path.is_dir() else was(path, to)\n",
    ],
    ids=["while it is made", "when it takes its place"],
)
def test_a_pull_killed_while_it_makes_a_folder_leaves_nothing_that_looks_whole(
    die_at: str, server: StandIn, place: Place
) -> None:
    place.pull(CHECKPOINT, format=Format.ONNX)
    server.repos[CHECKPOINT].files["README.md"] = b"new"
    program = (
        "import os, sys\nfrom pathlib import Path\n"
        "def die(*_):\n    os.kill(os.getpid(), 9)\n"
        f"{die_at}from localdepth.cli import main\n"
        f"sys.argv = ['localdepth', 'models', 'pull', '{CHECKPOINT}', '--format', 'onnx']\nmain()"
    )
    done = subprocess.run([sys.executable, "-c", program], env=place.env, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [stored for stored in place.store.models() if stored.verify() is not Verdict.SOUND] == []
    assert place.pull(CHECKPOINT, format=Format.ONNX).manifest.commit == server.repos[CHECKPOINT].commit
    assert list((place.store.folder / ".pull").iterdir()) == []


# --- which file, which name -------------------------------------------------------------------------------------------


def test_one_of_several_files_is_picked_by_quant_or_name(server: StandIn, place: Place, model_bytes: bytes) -> None:
    server.repos[LOOPED].files["sub/looped-F16.gguf"] = model_bytes
    with pytest.raises(RequestError, match=r"several models: looped-Q8_0\.gguf, sub/looped-F16\.gguf; .*--file"):
        place.pull(LOOPED)
    assert place.pull(LOOPED, quant="f16").name == "looped-F16"
    assert place.pull(LOOPED, file="looped-Q8_0.gguf").name == "looped-Q8_0"
    with pytest.raises(RequestError, match=r"no model 'other\.gguf'; it has looped-Q8_0"):
        place.pull(LOOPED, file="other.gguf")
    with pytest.raises(RequestError, match=r"no model of quant 'Q4_K'; it has looped"):
        place.pull(LOOPED, quant="Q4_K")


def test_a_model_from_elsewhere_is_not_replaced(server: StandIn, place: Place) -> None:
    server.repos["other/looped"] = server.repos[LOOPED]
    place.pull(LOOPED)
    with pytest.raises(RequestError, match=r"there is a model looped-Q8_0\.gguf from lab/looped .*--name"):
        place.pull("other/looped")
    assert place.pull("other/looped", name="theirs").name == "theirs"
    with pytest.raises(RequestError, match=r"there is a model theirs\.gguf from other/looped .*--name"):
        place.pull(GRAPHS, name="Theirs")


@pytest.mark.parametrize("name", ["../up", "a/b", "", "default", ".hidden", "x" * 101, "new\nline", "-n"])
def test_a_name_is_a_plain_file_name(name: str, place: Place) -> None:
    with pytest.raises(RequestError):
        place.pull(LOOPED, name=name)
    assert place.store.models() == []


@given(st.text() | st.text("ab-. ", min_size=95, max_size=105))
def test_any_text_becomes_a_plain_name_or_none(text: str) -> None:
    with suppress(RequestError):
        name = model_name(text)
        assert model_name(name) == name
        assert Path(name).name == name
        assert not name.startswith((".", "-"))


@pytest.mark.parametrize("reference", ["../x", "/etc/passwd", "a/b/c", "a/../b", "", "lab/looped ", "a--b/c", "~/x"])
def test_a_name_that_is_no_repository_is_refused(reference: str, place: Place) -> None:
    with pytest.raises(RequestError, match="owner/name"):
        place.pull(reference)


@pytest.mark.parametrize("revision", ["../../x", "", "/x", "a/../b", "a b", "x\\y"])
def test_a_revision_that_leads_out_is_refused(revision: str) -> None:
    with pytest.raises(RequestError, match="owner/name@revision"):
        parse_reference(f"lab/looped@{revision}")
    assert parse_reference("lab/looped@refs/pr/1") == (LOOPED, "refs/pr/1")


# --- what is refused before it is downloaded --------------------------------------------------------------------------


def config_of(model_type: str) -> dict[str, bytes]:
    return {"config.json": json.dumps({"model_type": model_type}).encode(), WEIGHTS: b"\0" * 300_000}


@pytest.mark.parametrize(
    ("files", "error", "message"),
    [
        (config_of("llama"), CheckpointError, "lab/bad holds a plain llama model without a core"),
        (config_of("bert"), CheckpointError, "lab/bad/model.safetensors is no safetensors file"),
        ({"config.json": b"[]", WEIGHTS: b""}, CheckpointError, "must hold a JSON object"),
        ({"config.json": b"{", WEIGHTS: b""}, CheckpointError, "not valid JSON"),
        ({"config.json": b"{}", "pytorch_model.bin": b""}, CheckpointError, "pickled weights are not read"),
        (
            {"README.md": b"hello"},
            CheckpointError,
            "nor a checkpoint with config.json; it has README.md",
        ),
        ({}, CheckpointError, "it has nothing"),
    ],
)
def test_what_cannot_be_run_is_refused_before_the_download(
    files: dict[str, bytes], error: type[Exception], message: str, server: StandIn, place: Place
) -> None:
    server.repos["lab/bad"] = Remote(files)
    with pytest.raises(error, match=message):
        place.pull("lab/bad")
    assert server.sent[WEIGHTS] <= 100_001  # its header
    assert place.store.models() == []


def test_tensors_of_another_model_are_refused_by_their_names(
    server: StandIn, place: Place, checkpoint: Path, tmp_path: Path
) -> None:
    tensors = load_file(checkpoint / WEIGHTS)
    save_file({**tensors, "visual.weight": tensors.popitem()[1]}, tmp_path / WEIGHTS)
    server.repos[CHECKPOINT].files[WEIGHTS] = (tmp_path / WEIGHTS).read_bytes()
    with pytest.raises(CheckpointError, match=r"not those of a localdepth model: .*unknown visual\.weight"):
        place.pull(CHECKPOINT)
    assert server.sent[WEIGHTS] <= 100_001


@pytest.mark.parametrize("shard", ["../../../etc/passwd", "/etc/passwd", "sub/x.safetensors", "gone.safetensors"])
def test_an_index_that_names_other_places_is_refused(shard: str, server: StandIn, place: Place) -> None:
    files = server.repos[CHECKPOINT].files
    files["sub/x.safetensors"] = b""
    files["model.safetensors.index.json"] = json.dumps({"weight_map": {"a": shard}}).encode()
    with pytest.raises(CheckpointError, match="which is not beside it"):
        place.pull(CHECKPOINT)
    assert not any(shard in path for _, path in server.asked)


@pytest.mark.parametrize("content", [b"{}", b'{"weight_map": [1]}', b'{"weight_map": {"a": 1}}'])
def test_an_index_without_file_names_is_refused(content: bytes, server: StandIn, place: Place) -> None:
    server.repos[CHECKPOINT].files["model.safetensors.index.json"] = content
    with pytest.raises(CheckpointError, match="no weight_map"):
        place.pull(CHECKPOINT)


def test_files_that_lead_out_of_a_folder_are_not_seen(server: StandIn, place: Place, model_bytes: bytes) -> None:
    names = ("../up.gguf", "/root.gguf", "a\\b.gguf", "c:d.gguf", "a/../../b.gguf", "new\nline.gguf")
    server.repos["lab/odd"] = Remote(dict.fromkeys(names, model_bytes))
    with pytest.raises(CheckpointError, match="it has nothing"):
        place.pull("lab/odd")


@pytest.mark.parametrize(("architecture", "message"), [("llama", "plain llama model"), ("mamba", "of architecture")])
def test_foreign_model_files_are_refused_before_the_download(
    architecture: str, message: str, server: StandIn, place: Place
) -> None:
    server.repos[LOOPED].architecture = architecture
    with pytest.raises(ModelFileError, match=message):
        place.pull(LOOPED)
    assert server.sent["looped-Q8_0.gguf"] == 0


def test_a_file_that_is_no_model_does_not_enter_the_store(server: StandIn, place: Place) -> None:
    server.repos[LOOPED] = Remote({"x.gguf": b"GGUF, or is it?"})
    with pytest.raises(ModelFileError):
        place.pull(LOOPED)
    assert list(place.home.rglob("*.gguf")) == []


def test_an_unknown_quant_is_refused_before_the_download(server: StandIn, place: Place) -> None:
    with pytest.raises(ConfigError, match="Q9"):
        place.pull(CHECKPOINT, quant="Q9")
    assert server.sent[WEIGHTS] == 0


def test_a_checkpoint_needs_the_exporter_and_a_model_does_not(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [name for name in sys.modules if name.startswith(("localdepth_export", "localdepth_train"))]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(MissingExtra, match=r"safetensors is not installed; type: .*localdepth\[export\]"):
        place.pull(CHECKPOINT)
    place.pull(LOOPED)
    assert [item.reference for item in importable(place.store, place.hub, choose_converter())] == []


def test_what_does_not_fit_on_the_disk_is_refused_with_the_numbers(
    server: StandIn, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = planning.shutil._ntuple_diskusage(10**9, 10**9, 10**6)  # a megabyte; the weights alone have more
    monkeypatch.setattr(planning.shutil, "disk_usage", lambda _: free)
    with pytest.raises(StorageError, match=r"needs 1\.\d+ MB in .*has 1 MB free \(1\.\d+ MB to download, 2\d\d kB for"):
        place.pull(CHECKPOINT)
    assert server.sent[WEIGHTS] <= 100_001


# --- what breaks on the way -------------------------------------------------------------------------------------------


def test_a_cut_connection_is_taken_up_again_in_the_same_pull(server: StandIn, place: Place) -> None:
    server.cut[WEIGHTS] = [100_001, 5 * PIECE]  # the header goes through
    assert place.pull(CHECKPOINT).verify() is Verdict.SOUND
    assert server.sent[WEIGHTS] <= 100_001 + len(server.repos[CHECKPOINT].files[WEIGHTS]) + PIECE


def test_the_next_pull_goes_on_where_a_broken_one_stopped(
    server: StandIn, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = len(server.repos[CHECKPOINT].files[WEIGHTS])
    server.cut[WEIGHTS] = [100_001, 6 * PIECE]
    monkeypatch.setattr(time, "sleep", lambda _: server.status.update(stored=500))  # the rest before going on
    with pytest.raises(MachineError, match=r"status 500; what has arrived is kept, try again later"):
        place.pull(CHECKPOINT)
    [partial] = place.partial()
    kept = partial.stat().st_size
    assert 4 * PIECE <= kept < size
    assert place.store.models() == []

    server.status.clear()
    server.sent.clear()
    planned = place.plan(CHECKPOINT)
    assert planned.n_download == size - kept
    assert place.pull(CHECKPOINT).verify() is Verdict.SOUND
    assert server.sent[WEIGHTS] == size - kept + 2 * 100_001  # and its header, for each of the plans
    assert place.partial() == []


def test_a_wrong_checksum_is_refused_and_leaves_nothing(server: StandIn, place: Place) -> None:
    server.spoilt.add("looped-Q8_0.gguf")
    with pytest.raises(ModelFileError, match="another checksum than the Hub names"):
        place.pull(LOOPED)
    assert place.partial() == []
    assert list(place.hf_home.rglob("*.gguf")) == []
    server.spoilt.clear()
    assert place.pull(LOOPED).verify() is Verdict.SOUND


def test_a_partial_file_longer_than_the_whole_is_begun_again(server: StandIn, place: Place) -> None:
    server.spoilt.add("looped-Q8_0.gguf")
    with pytest.raises(ModelFileError):
        place.pull(LOOPED)
    server.spoilt.clear()
    sha256 = place.hub.look(LOOPED, "main").files["looped-Q8_0.gguf"].sha256
    blobs = place.hf_home / "hub" / "models--lab--looped" / "blobs"
    (blobs / f"{sha256}.incomplete").write_bytes(bytes(10**6))
    assert place.pull(LOOPED).verify() is Verdict.SOUND


def test_a_damaged_file_in_the_cache_is_fetched_again(server: StandIn, place: Place, model_bytes: bytes) -> None:
    stored = place.pull(LOOPED)
    place.store.remove(stored.name)
    [cached] = place.hf_home.rglob("*.gguf")
    cached.resolve().write_bytes(b"damaged")
    assert place.pull(LOOPED).path.read_bytes() == model_bytes


@pytest.mark.parametrize(
    ("part", "status", "error", "message"),
    [
        ("/api/", 500, MachineError, "lab/looped@main with status 500; .* try again later"),
        ("/api/", 429, MachineError, "status 429"),
        ("/api/", 403, ModelFileError, "may not be read with this token"),
        ("/stored/", 503, MachineError, "status 503"),
    ],
)
def test_what_the_hub_refuses_is_told(
    part: str, status: int, error: type[Exception], message: str, server: StandIn, place: Place
) -> None:
    server.status[part] = status
    with pytest.raises(error, match=message):
        place.pull(LOOPED)
    assert place.store.models() == []


def test_missing_gated_and_unknown_are_told_apart(server: StandIn, place: Place) -> None:
    with pytest.raises(ModelFileError, match=r"lab/none@main is not on the Hub, or is private; .*HF_TOKEN"):
        place.pull("lab/none")
    with pytest.raises(ModelFileError, match="no such branch, tag or commit"):
        place.pull(f"{LOOPED}@next")
    server.repos[LOOPED].gated = server.repos[CHECKPOINT].gated = True
    for reference in (LOOPED, CHECKPOINT):
        with pytest.raises(ModelFileError, match=r"is gated; accept its terms .*`hf auth login`"):
            place.pull(reference)


def test_an_address_that_is_no_hub_is_told(server: StandIn, place: Place) -> None:
    server.status["/api/"] = 200
    with pytest.raises(MachineError, match=f"{LOOPED}@main"):
        place.pull(LOOPED)


def test_a_cache_that_cannot_be_written_is_told(place: Place) -> None:
    place.hf_home.mkdir()
    (place.hf_home / "hub").write_text("a file where a folder should be")
    with pytest.raises(StorageError, match="HF_HOME"):
        place.pull(LOOPED)


def test_a_store_that_cannot_be_written_is_told(place: Place) -> None:
    place.home.write_text("a file where a folder should be")
    with pytest.raises(StorageError, match="LOCALDEPTH_HOME"):
        place.pull(LOOPED)


def test_a_full_disk_is_told_and_the_next_pull_goes_on(server: StandIn, place: Place) -> None:
    program = (
        "import resource, sys\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({5 * PIECE}, {5 * PIECE}))\n"
        f"sys.argv = ['localdepth', 'models', 'pull', '{CHECKPOINT}']\n"
        "from localdepth.cli import main\nmain()"
    )
    done = subprocess.run([sys.executable, "-c", program], env=place.env, capture_output=True, text=True)
    assert done.returncode == 3
    assert "cannot be written to the Hugging Face cache: File too large" in done.stderr
    assert [partial.stat().st_size for partial in place.partial()] == [5 * PIECE]
    server.sent.clear()
    assert place.pull(CHECKPOINT).verify() is Verdict.SOUND
    assert server.sent[WEIGHTS] == len(server.repos[CHECKPOINT].files[WEIGHTS]) - 5 * PIECE + 100_001


def wait_for(condition: Any, process: "subprocess.Popen[bytes]") -> None:
    """Until it holds, or the process has ended."""
    while not condition() and process.poll() is None:
        time.sleep(0.005)


def test_a_killed_pull_leaves_nothing_and_the_next_one_goes_on(server: StandIn, place: Place) -> None:
    size = len(server.repos[CHECKPOINT].files[WEIGHTS])
    server.pause_s = 0.03
    for n_pieces in (3, 6):
        process = place.start("pull", CHECKPOINT)
        wait_for(lambda n=n_pieces: [p for p in place.partial() if _size(p) >= n * PIECE], process)
        process.kill()
        process.wait()
        assert place.store.models() == []
    while server.n_open:  # until it has noticed
        time.sleep(0.01)
    [partial] = place.partial()
    kept = partial.stat().st_size
    server.sent.clear()
    place.pull(CHECKPOINT)
    assert server.sent[WEIGHTS] == size - kept + 100_001
    assert place.store.get("huginn-small-Q8_0").verify() is Verdict.SOUND
    assert list((place.store.folder / ".pull").iterdir()) == []


@pytest.mark.slow
def test_a_pull_can_be_killed_at_any_moment(server: StandIn, place: Place) -> None:
    server.pause_s = 0.02
    for tenths in range(6, 30):
        process = place.start("pull", CHECKPOINT, "--no-keep-download")
        time.sleep(tenths / 10)
        process.kill()
        process.wait()
        assert [stored.name for stored in place.store.models() if stored.verify() is not Verdict.SOUND] == []
        for stored in place.store.models():  # it had finished; once more
            place.store.remove(stored.name)
    assert place.pull(CHECKPOINT).verify() is Verdict.SOUND
    assert list((place.store.folder / ".pull").iterdir()) == []


def _size(path: Path) -> int:
    """0 where the file has just got its final name."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def test_an_interrupted_pull_keeps_what_has_arrived(server: StandIn, place: Place) -> None:
    server.pause_s = 0.2  # a pull that is not over before the signal arrives
    process = place.start("pull", CHECKPOINT)
    wait_for(lambda: [p for p in place.partial() if _size(p) >= 3 * PIECE], process)
    process.send_signal(signal.SIGINT)
    assert process.wait() == 130
    assert [p.stat().st_size >= 3 * PIECE for p in place.partial()] == [True]
    assert list((place.store.folder / ".pull").iterdir()) == []


def test_a_pull_killed_while_it_converts_leaves_nothing_that_looks_whole(server: StandIn, place: Place) -> None:
    program = (
        "import os\n"
        "from localdepth.cli.models import Hub, Store, choose_converter, plan, pull\n"
        "from localdepth_export import convert\n"
        "def half(folder, out, **_):\n"
        "    out.write_bytes(b'GGUF half a file')\n"
        "    os.kill(os.getpid(), 9)\n"
        "convert.to_gguf = half\n"
        "store, hub = Store(), Hub()\n"
        f"pull(plan({CHECKPOINT!r}, store, hub, choose_converter()), store, hub)"
    )
    done = subprocess.run([sys.executable, "-c", program], env=place.env)
    assert done.returncode == -signal.SIGKILL
    assert (place.store.models(), find("huginn-small-Q8_0", place.store.folder)) == ([], None)
    assert len(list((place.store.folder / ".pull").rglob("*.gguf"))) == 1
    place.pull(LOOPED)  # of another name: it clears up, too
    assert list((place.store.folder / ".pull").iterdir()) == []


def test_a_second_pull_of_the_same_waits_and_finds_it(server: StandIn, place: Place) -> None:
    server.pause_s = 0.02
    first = place.start("pull", CHECKPOINT)
    wait_for(place.partial, first)
    assert place.pull(CHECKPOINT).verify() is Verdict.SOUND
    assert first.wait() == 0
    assert server.sent[WEIGHTS] <= len(server.repos[CHECKPOINT].files[WEIGHTS]) + 2 * 100_001


# --- without a network ------------------------------------------------------------------------------------------------


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def fill_cache(place: Place, reference: str) -> None:
    """Have it in the cache, and not in the store."""
    place.store.remove(place.pull(reference).name)


@pytest.mark.parametrize("reference", [LOOPED, CHECKPOINT])
def test_what_the_cache_has_is_imported_without_a_network(
    reference: str, server: StandIn, place: Place, request: pytest.FixtureRequest
) -> None:
    fill_cache(place, reference)
    request.getfixturevalue("offline")
    server.asked.clear()
    stored = place.pull(reference)
    assert stored.verify() is Verdict.SOUND
    assert stored.manifest.license == {LOOPED: "mit", CHECKPOINT: "mit"}[reference]  # as the file says
    assert server.asked == []


def test_what_the_cache_has_is_imported_while_the_hub_fails(server: StandIn, place: Place) -> None:
    fill_cache(place, LOOPED)
    server.status["/"] = 500
    assert place.pull(LOOPED).verify() is Verdict.SOUND


def test_what_another_tool_downloaded_is_found_and_imported(place: Place) -> None:
    huggingface_hub.snapshot_download(CHECKPOINT, cache_dir=place.hub.cache, endpoint=place.env["HF_ENDPOINT"])
    huggingface_hub.snapshot_download(LOOPED, cache_dir=place.hub.cache, endpoint=place.env["HF_ENDPOINT"])
    found = list(importable(place.store, place.hub, choose_converter()))
    assert [(item.reference, item.file) for item in found] == [(CHECKPOINT, None), (LOOPED, "looped-Q8_0.gguf")]
    assert [item.reference for item in importable(place.store, place.hub, choose_converter())] == [CHECKPOINT, LOOPED]
    place.pull(LOOPED)
    assert [item.reference for item in importable(place.store, place.hub, choose_converter())] == [CHECKPOINT]


@pytest.mark.usefixtures("offline")
def test_offline_says_what_is_missing_and_what_to_do(place: Place) -> None:
    with pytest.raises(
        MachineError, match=r"HF_HUB_OFFLINE is set; unset it\. The cache in .* does not have it either"
    ):
        place.pull(LOOPED)
    assert list(importable(place.store, place.hub, choose_converter())) == []


def test_no_connection_says_so(place: Place) -> None:
    place.hub = Hub("http://127.0.0.1:9", place.hub.cache)
    with pytest.raises(MachineError, match=r"asking for lab/looped@main failed: ConnectError: .* check the connection"):
        place.pull(LOOPED)


def test_a_part_of_a_checkpoint_in_the_cache_is_not_enough(
    place: Place, server: StandIn, request: pytest.FixtureRequest
) -> None:
    url = place.env["HF_ENDPOINT"]
    huggingface_hub.hf_hub_download(CHECKPOINT, "config.json", cache_dir=place.hub.cache, endpoint=url)
    request.getfixturevalue("offline")
    with pytest.raises(MachineError, match=r"the Hugging Face cache lacks 'model\.safetensors' of lab/huginn-small"):
        place.pull(CHECKPOINT)


def test_a_snapshot_of_two_names_is_offered_once(place: Place) -> None:
    fill_cache(place, LOOPED)
    refs = place.hub.cache / "models--lab--looped" / "refs"
    (refs / "v1").write_text((refs / "main").read_text())
    assert [item.reference for item in importable(place.store, place.hub, choose_converter())] == [LOOPED]


def test_a_damaged_file_in_the_cache_is_not_imported(place: Place, request: pytest.FixtureRequest) -> None:
    fill_cache(place, LOOPED)
    [cached] = place.hf_home.rglob("*.gguf")
    cached.resolve().write_bytes(b"damaged")
    request.getfixturevalue("offline")
    with pytest.raises(ModelFileError, match=r"in the Hugging Face cache is damaged"):
        place.pull(LOOPED)


# --- the models folder ------------------------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path: Path, model_file: Path) -> Store:
    """A folder with one file that somebody dropped in."""
    folder = tmp_path / "models"
    folder.mkdir()
    (folder / "mine.gguf").write_bytes(model_file.read_bytes())
    return Store(folder)


MANIFEST = Manifest(
    sha256="0" * 64,
    n_bytes=1,
    repo=LOOPED,
    revision="main",
    commit="c",
    file=None,
    quant="Q8_0",
    license=None,
    pulled="2025-01-01T00:00:00+00:00",
)


def test_a_manifest_comes_back_as_it_was_written(tmp_path: Path) -> None:
    MANIFEST.write(tmp_path / "m.json")
    assert Manifest.read(tmp_path / "m.json") == MANIFEST
    assert [path.name for path in tmp_path.iterdir()] == ["m.json"]


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b"{}", b"[" * 10**5, b"\xff\xfe", b'{"sha256": 1}', b" " * 10**6, None]
)
def test_a_manifest_that_is_damaged_counts_as_none(content: bytes | None, store: Store) -> None:
    path = store.folder / "mine.gguf.json"
    path.mkdir() if content is None else path.write_bytes(content)
    [stored] = store.models()
    assert stored.manifest is None
    assert stored.verify() is Verdict.SOUND  # by the checksum inside the file


def test_a_manifest_of_wrong_types_counts_as_none(store: Store) -> None:
    MANIFEST.write(store.folder / "mine.gguf.json")
    record = json.loads((store.folder / "mine.gguf.json").read_text())
    (store.folder / "mine.gguf.json").write_text(json.dumps({**record, "n_bytes": "1"}))
    assert store.get("mine").manifest is None


def test_a_file_of_another_size_is_damaged(store: Store) -> None:
    MANIFEST.write(store.folder / "mine.gguf.json")
    assert store.get("mine").verify() is Verdict.DAMAGED


@pytest.mark.parametrize("name", ["../mine", "/etc/passwd", "mine.gguf", "", ".", "..", "*", "mi?e", "mine\0", "MINE"])
def test_only_the_names_in_the_folder_are_found(name: str, store: Store) -> None:
    (store.folder.parent / "mine.gguf").write_bytes(b"outside")
    assert find(name, store.folder) is None
    with pytest.raises(ModelFileError, match="models list"):
        store.remove(name)
    assert (store.folder.parent / "mine.gguf").exists()


def test_links_are_removed_and_not_what_they_point_to(store: Store, model_file: Path, tmp_path: Path) -> None:
    (store.folder / "link.gguf").symlink_to(model_file)
    (store.folder / "link.gguf.json").symlink_to(tmp_path / "secret")
    (tmp_path / "secret").write_text("keep")
    (store.folder / "dangling.gguf").symlink_to("nowhere")
    (store.folder / "loop.gguf").symlink_to("loop.gguf")
    (store.folder / "folder.gguf").mkdir()
    assert [stored.name for stored in store.models()] == ["link", "mine"]
    assert store.remove("link") == 0
    assert model_file.is_file()
    assert (tmp_path / "secret").read_text() == "keep"
    assert [stored.name for stored in store.models()] == ["mine"]


def test_folders_are_linked_and_removed_as_files_are(store: Store, tmp_path: Path) -> None:
    target = tmp_path / "elsewhere"
    shutil.copytree(DEFAULT_ONNX, target)
    (store.folder / "link.onnx").symlink_to(target)
    shutil.copytree(DEFAULT_ONNX, store.folder / "own.onnx")
    (store.folder / "own.onnx" / ".DS_Store").write_bytes(b"left by a file manager")
    (store.folder / "single.onnx").write_bytes(b"a graph with its weights is no folder")
    n_bytes = sum(path.stat().st_size for path in target.iterdir())
    assert [(stored.name, stored.n_bytes, stored.verify()) for stored in store.models()[::2]] == [
        ("link", n_bytes, Verdict.SOUND),
        ("own", n_bytes, Verdict.SOUND),
    ]
    assert (store.remove("link"), store.remove("own")) == (0, n_bytes)
    assert len(list(target.iterdir())) == len(list(DEFAULT_ONNX.iterdir()))
    assert [stored.name for stored in store.models()] == ["mine"]


def test_the_checksum_of_a_folder_is_that_of_its_list_of_checksums(tmp_path: Path) -> None:
    (tmp_path / "m" / "B").mkdir(parents=True)
    for name in ("b", "a", "B/c"):
        (tmp_path / "m" / name).write_bytes(name.encode())
    line = "find . -type f | cut -c3- | LC_ALL=C sort | xargs sha256sum | sha256sum"
    done = subprocess.run(["sh", "-c", line], cwd=tmp_path / "m", capture_output=True, text=True, check=True)
    assert checksum(tmp_path / "m") == done.stdout.split()[0]


def test_a_file_and_a_folder_of_one_name_are_called_by_their_whole_names(store: Store) -> None:
    shutil.copytree(DEFAULT_ONNX, store.folder / "mine.onnx")
    assert [stored.name for stored in store.models()] == ["mine.gguf", "mine.onnx"]
    assert find("mine", store.folder) is None
    assert find("mine.onnx", store.folder) == store.folder / "mine.onnx"
    store.remove("mine.gguf")
    assert find("mine", store.folder) == store.folder / "mine.onnx"


def test_removing_says_what_it_frees(place: Place) -> None:
    converted, linked, folder = place.pull(CHECKPOINT), place.pull(LOOPED), place.pull(GRAPHS)
    assert place.store.remove(converted.name) == converted.n_bytes
    assert place.store.remove(linked.name) == 0  # the cache holds the same bytes
    assert place.store.remove(folder.name) == 0
    assert list(place.store.folder.glob("[!.]*")) == []


def test_pulling_over_a_link_leaves_its_target(place: Place, tmp_path: Path) -> None:
    stored = place.pull(LOOPED)
    (tmp_path / "target").write_text("keep")
    stored.path.unlink()
    stored.path.symlink_to(tmp_path / "target")
    assert place.pull(LOOPED).verify() is Verdict.SOUND
    assert (tmp_path / "target").read_text() == "keep"


def test_a_folder_that_does_not_exist_is_empty(tmp_path: Path) -> None:
    assert Store(tmp_path / "none").models() == []


# --- the commands -----------------------------------------------------------------------------------------------------


def one_line(done: Any) -> dict[str, Any]:
    assert done.stdout.count("\n") == 1, (done.stdout, done.stderr)
    record: dict[str, Any] = json.loads(done.stdout)
    return record


def test_the_commands_from_pull_to_rm(server: StandIn, place: Place) -> None:
    pulled = place.run("pull", CHECKPOINT, "--quant", "q8_0")
    assert pulled.returncode == 0, pulled.stderr
    assert pulled.stdout.startswith("huginn-small-Q8_0: 297 kB in ")
    assert "apache-2.0: 1.07 MB to download; becomes the GGUF file huginn-small-Q8_0, converted" in pulled.stderr
    assert "\x1b" not in pulled.stderr
    assert one_line(place.run("pull", LOOPED, "--json"))["name"] == "looped-Q8_0"

    listed = one_line(place.run("list", "--json"))
    assert [row["name"] for row in listed["models"]] == ["default", "huginn-small-Q8_0", "looped-Q8_0"]
    converted = listed["models"][1]
    assert (converted["quant"], converted["max_depth"]) == ("Q8_0", 64)
    assert (converted["license"], converted["check"], converted["from"]) == ("apache-2.0", "unverified", CHECKPOINT)
    assert listed["importable"] == []
    shown = place.run("list").stdout
    assert "1..64 apache-2.0 unverified" in shown

    facts = one_line(place.run("show", "looped-Q8_0", "--json"))
    assert facts["manifest"]["commit"] == server.repos[LOOPED].commit
    assert facts["config"]["n_embd"] == 64
    assert f"repo      {LOOPED}" in place.run("show", "looped-Q8_0").stdout

    verified = place.run("verify")
    assert (verified.returncode, verified.stdout) == (0, "huginn-small-Q8_0  sound\nlooped-Q8_0        sound\n")
    assert place.run("rm", "looped-Q8_0").returncode == 2  # nobody to ask
    assert one_line(place.run("rm", "looped-Q8_0", "--yes", "--json")) == {"removed": "looped-Q8_0", "freed_bytes": 0}
    removed = place.run("rm", "huginn-small-Q8_0", "-y")
    assert removed.stdout == "removed huginn-small-Q8_0, 297 kB freed\n"
    assert [(row["reference"], row["file"]) for row in one_line(place.run("list", "--json"))["importable"]] == [
        (CHECKPOINT, None),
        (LOOPED, "looped-Q8_0.gguf"),
    ]
    assert "looped-Q8_0.gguf" in place.run("list").stdout


def test_the_commands_know_folders(server: StandIn, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    pulled = place.run("pull", CHECKPOINT, "--format", "onnx", "--bits", "4", "--name", "small")
    assert pulled.returncode == 0, pulled.stderr
    assert "becomes the ONNX folder small, converted to INT4" in pulled.stderr
    assert one_line(place.run("pull", GRAPHS, "--json"))["format"] == "onnx"
    listed = one_line(place.run("list", "--json"))["models"]
    assert [(row["name"], row["format"], row["quant"]) for row in listed[1:]] == [
        ("graphs-INT8", "onnx", "INT8"),
        ("small", "onnx", "INT4"),
    ]
    assert one_line(place.run("show", "small", "--json"))["manifest"]["quant"] == "INT4"
    assert place.run("verify").stdout == "graphs-INT8  sound\nsmall        sound\n"
    removed = place.run("rm", "graphs-INT8", "-y").stdout
    assert removed.startswith("removed graphs-INT8, 0 bytes freed; the Hugging Face cache")
    importing = place.run("list").stdout.partition("to import")[2].splitlines()
    assert any(line.startswith(GRAPHS) and line.endswith("ONNX folder") for line in importing)
    monkeypatch.setattr("localdepth.cli.converters.find_libraries", lambda: None)
    assert one_line(place.run("pull", CHECKPOINT, "--json"))["name"] == "huginn-small-INT8"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--quant", "Q8_0", "--bits", "8"), "--quant=Q8_0 is for GGUF files and --bits=8 for ONNX folders"),
        (("--quant", "Q8_0", "--format", "onnx"), "ONNX folders take --bits, one of 32, 16, 8, 4"),
        (("--bits", "8", "--format", "gguf"), "GGUF files take --quant, such as Q8_0"),
        (("--bits", "3"), "--bits=3 is not one of 32, 16, 8, 4"),
    ],
)
def test_options_of_the_other_format_are_refused(options: tuple[str, ...], message: str, place: Place) -> None:
    done = place.run("pull", CHECKPOINT, *options, "--json")
    assert (done.returncode, message in one_line(done)["error"]["message"]) == (2, True)


def test_verify_fails_for_what_is_damaged(place: Place) -> None:
    stored = place.pull(LOOPED, name="good")
    (place.store.folder / "bad.gguf").write_bytes(b"no model")
    done = place.run("verify", "--json")
    assert (done.returncode, one_line(done)) == (1, {"models": {"bad": "damaged", "good": "sound"}})
    assert place.run("verify", "good").returncode == 0
    listed = one_line(place.run("list", "--json"))["models"]
    assert [(row["name"], row["from"], bool(row["error"])) for row in listed] == [
        ("default", "localdepth", False),
        ("bad", "no manifest", True),
        ("good", LOOPED, False),
    ]
    assert "damaged no manifest" in place.run("list").stdout
    stored.path.unlink()
    assert place.run("verify", "good").returncode == 2


def test_errors_of_a_pull_are_one_line_of_json(place: Place, request: pytest.FixtureRequest) -> None:
    done = place.run("pull", "lab/none", "--json")
    assert (done.returncode, one_line(done)["error"]["type"]) == (2, "ModelFileError")
    request.getfixturevalue("offline")
    done = place.run("pull", LOOPED, "--json")
    assert (done.returncode, one_line(done)["error"]["type"]) == (3, "MachineError")


def test_odd_file_names_are_listed_and_removed(place: Place) -> None:
    place.store.folder.mkdir(parents=True)
    for name in ("--json", "new\nline", "[red]", "\x1b[31mred", "ü"):
        (place.store.folder / f"{name}.gguf").write_bytes(b"")
    (place.store.folder / os.fsdecode(b"\xff.gguf")).write_bytes(b"")
    done = place.run("list")
    assert (done.returncode, "\x1b" in done.stdout) == (0, False), done.stderr
    assert len(one_line(place.run("list", "--json"))["models"]) == 7
    assert place.run("rm", "--yes", "--", "--json").returncode == 0
    assert place.run("rm", "--yes", "[red]").stdout.startswith("removed [red]")
    assert place.run("rm", "--yes", "new\nline").returncode == 0
    assert len(place.store.models()) == 3


def test_the_default_model_is_verified_by_its_own_checksum_and_stays(place: Place) -> None:
    assert place.run("verify", "default").stdout == "default  sound\n"
    done = place.run("rm", "default", "--yes")
    assert (done.returncode, "pip uninstall localdepth" in done.stderr) == (2, True)
