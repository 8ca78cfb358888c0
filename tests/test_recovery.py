"""An export that is killed, stopped or out of room leaves what was there, and the next one tidies up."""

import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from localdepth.engine.toy import random_weights
from localdepth.errors import CheckpointError, ModelFileError, StorageError
from localdepth.gguf import read
from localdepth.quant import Quant
from localdepth.record import Check, CheckStatus
from localdepth_export.convert import to_gguf
from localdepth_export.gguf_writer import write_check
from localdepth_train.checkpoint import Checkpoint, save
from localdepth_train.output import replacing, replacing_folder
from tests import engines
from tests.bases import BASES, make_base, write_weights
from tests.gguf_parts import sound
from tests.published import EXPECTED

OLD = b"GGUF, an older model"
UNTRAINED = {"README.md": "by `localdepth retrofit`, not trained since"}  # what the next retrofit may replace
START_S = 60.0  # until an export has begun to write; a busy machine imports slowly


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven million numbers, which take more than a second to store as Q4_K."""
    config = replace(EXPECTED["retrofit_llama"], n_embd=512, n_ff=2048, n_vocab=512)
    return save(tmp_path_factory.mktemp("checkpoint"), config, random_weights(config, seed=1))


def exporting(checkpoint: Path, out: Path, prepare: Callable[[], None] | None = None) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "localdepth", "export", "gguf", str(checkpoint), "-o", str(out), "--quant", "Q4_K"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=prepare,
    )


def hidden(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.name.startswith("."))


def wait_for_writing(process: "subprocess.Popen[str]", folder: Path, n_bytes: int) -> None:
    """Until the hidden file has grown to some size, or the export has ended."""
    deadline = time.monotonic() + START_S
    while process.poll() is None and time.monotonic() < deadline:
        with suppress(FileNotFoundError):  # it has just got its name
            if any(path.stat().st_size >= n_bytes for path in hidden(folder)):
                return
        time.sleep(0.002)


def kill_once(checkpoint: Path, out: Path, n_bytes: int) -> bool:
    """Kill an export that has written some bytes; True where that came before its end."""
    out.write_bytes(OLD)
    process = exporting(checkpoint, out)
    try:
        wait_for_writing(process, out.parent, n_bytes)
    finally:
        process.kill()
        process.communicate()
    if out.read_bytes() != OLD:
        read(out).close()  # it had just been finished, and is whole
        return False
    return True


def test_a_killed_export_leaves_the_old_file_and_the_next_one_tidies_up(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.gguf"
    assert kill_once(checkpoint, out, n_bytes=1 << 20)
    [left] = hidden(tmp_path)
    with pytest.raises(ModelFileError):
        read(left)
    process = exporting(checkpoint, out)
    said, _ = process.communicate()
    assert process.returncode == 0, said
    assert os.listdir(tmp_path) == [out.name]
    with read(out) as file:
        assert file.is_intact()


@pytest.mark.slow
def test_exports_killed_at_any_moment_leave_nothing_that_looks_whole(checkpoint: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    out = tmp_path / "model.gguf"
    caught = sum(kill_once(checkpoint, out, n_bytes=int(rng.integers(0, 4_500_000))) for _ in range(25))
    assert caught >= 15
    assert len(hidden(tmp_path)) <= 1  # every export tidied up after the one before


def test_a_terminated_export_ends_like_an_interrupted_one(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.gguf"
    out.write_bytes(OLD)
    process = exporting(checkpoint, out)
    wait_for_writing(process, tmp_path, 1 << 16)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, said
    assert os.listdir(tmp_path) == [out.name]
    assert out.read_bytes() == OLD


def test_an_export_without_room_says_so_and_leaves_the_old_file(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.gguf"
    out.write_bytes(OLD)
    process = exporting(checkpoint, out, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20)))
    said, _ = process.communicate()
    assert process.returncode == StorageError.exit_code, said
    assert "cannot be written" in said
    assert os.listdir(tmp_path) == [out.name]
    assert out.read_bytes() == OLD


def test_writers_of_one_folder_leave_each_other_alone(tmp_path: Path) -> None:
    with replacing(tmp_path / "a") as first:
        first.append(b"a")
        with replacing(tmp_path / "b") as second:
            second.append(b"b")
            assert len(hidden(tmp_path)) == 2
        first.append(b"a")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a": b"aa", "b": b"b"}


def test_many_writers_at_once_all_succeed(tmp_path: Path) -> None:
    failed: list[BaseException] = []

    def write_often(name: str) -> None:
        try:
            for i in range(100):
                with replacing(tmp_path / name) as output:
                    output.append(str(i).encode())
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=write_often, args=(str(name),)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {str(name): b"99" for name in range(4)}


def test_only_abandoned_files_of_ours_are_removed(tmp_path: Path) -> None:
    abandoned = tmp_path / ".localdepth-0123456789ab.tmp"
    abandoned.write_bytes(b"half a model")
    others = [tmp_path / ".localdepth-notes.txt", tmp_path / ".other-0123456789ab.tmp"]
    for path in others:
        path.write_bytes(b"not ours")
    (tmp_path / ".localdepth-dir.tmp").mkdir()
    (tmp_path / ".localdepth-link.tmp").symlink_to(others[0])
    os.mkfifo(tmp_path / ".localdepth-pipe.tmp")
    with replacing(tmp_path / "model.gguf") as output:
        output.append(b"whole")
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {
        "model.gguf",
        *(path.name for path in others),
        *(f".localdepth-{k}.tmp" for k in ("dir", "link", "pipe")),
    }


# --- checksum ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path: Path) -> Path:
    config = EXPECTED["huginn"]
    return engines.write_model(tmp_path / "model.gguf", config, random_weights(config, seed=2), Quant.F16)


def is_intact(path: Path) -> bool | None:
    with read(path) as file:
        return file.is_intact()


def test_a_bit_that_flips_in_any_tensor_is_seen(model: Path) -> None:
    raw = model.read_bytes()
    assert is_intact(model)
    with read(model) as file:
        places = [info.offset + info.n_bytes // 2 for info in file.tensors.values()]
    for place in places:
        model.write_bytes(raw[:place] + bytes([raw[place] ^ 0x10]) + raw[place + 1 :])
        assert is_intact(model) is False


def test_the_checksum_outlives_a_change_of_other_keys(model: Path) -> None:
    write_check(model, Check(CheckStatus.VERIFIED, (1,), (0.0,), (0.0,), (1.0,)))
    assert is_intact(model)


def test_a_file_may_have_no_checksum_or_a_wrong_one(tmp_path: Path) -> None:
    parts, path = sound(), tmp_path / "model.gguf"
    path.write_bytes(parts.encode())
    assert is_intact(path) is None
    parts.set("localdepth.checksum", "x" * 64)
    path.write_bytes(parts.encode())
    assert is_intact(path) is False


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_an_export_never_replaces_what_is_no_model_file(checkpoint: Path, tmp_path: Path, name: str) -> None:
    own = tmp_path / "own"
    shutil.copytree(checkpoint, own)
    (own / "tokenizer.json").write_text("{}", encoding="utf-8")
    before = (own / name).read_bytes()
    with pytest.raises(StorageError, match="holds something else and would be lost"):
        to_gguf(checkpoint, own / name)
    assert (own / name).read_bytes() == before


# --- folders ----------------------------------------------------------------------------------------------------------


def retrofitting(base: Path, out: Path) -> "subprocess.Popen[str]":
    choice = ("--prelude", "0", "--core", "1-2", "--coda", "3")
    return subprocess.Popen(
        [sys.executable, "-m", "localdepth", "retrofit", str(base), "-o", str(out), *choice],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain model of 67 million numbers, which take a while to write."""
    shape = {"hidden_size": 512, "intermediate_size": 4096, "vocab_size": 65536, "num_hidden_layers": 4}
    folder = make_base(tmp_path_factory.mktemp("base"), "llama3", **shape)
    write_weights(folder, {**BASES["llama3"], **shape}, ml_dtypes.bfloat16)
    return folder


def kill_retrofit(base: Path, folder: Path) -> bool:
    """Kill a retrofit that is writing; True where that came before its end."""
    process = retrofitting(base, folder / "out")
    try:
        deadline = time.monotonic() + START_S
        while process.poll() is None and time.monotonic() < deadline:
            with suppress(FileNotFoundError):  # it has just got its name
                if any(path.stat().st_size > 1 << 20 for path in folder.glob(".*/.*")):
                    break
            time.sleep(0.002)
    finally:
        process.kill()
        process.communicate()
    return bool(hidden(folder))


def test_a_killed_retrofit_leaves_the_old_folder_and_the_next_one_tidies_up(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for _ in range(5):
        save(out, EXPECTED["huginn"], random_weights(EXPECTED["huginn"], seed=1), UNTRAINED)
        if kill_retrofit(base, tmp_path):
            break
    [left] = hidden(tmp_path)
    assert Checkpoint(out).config == EXPECTED["huginn"]
    assert not (left / "config.json").exists()
    with pytest.raises(CheckpointError):
        Checkpoint(left)
    process = retrofitting(base, out)
    said, _ = process.communicate()
    assert process.returncode == 0, said
    assert os.listdir(tmp_path) == ["out"]
    assert Checkpoint(out).config.n_core == 2


def test_a_folder_without_room_is_an_error_of_ours_and_nothing_changes(tmp_path: Path) -> None:
    def fill() -> None:
        with replacing_folder(tmp_path / "out", lambda folder: True) as folder:
            (folder / "a").write_text("new")
            raise StorageError("full")

    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a").write_text("old")
    with pytest.raises(StorageError, match="full"):
        fill()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "a"]
    assert (tmp_path / "out" / "a").read_text() == "old"


def test_folders_appear_whole_and_replace_only_their_own_kind(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    for text in ("one", "two"):
        with replacing_folder(out, lambda folder: (folder / "a").exists()) as folder:
            (folder / "a").write_text(text)
            assert not out.exists() or (out / "a").read_text() == "one"
        assert (out / "a").read_text() == text
    with pytest.raises(StorageError, match="holds something else"), replacing_folder(out, lambda folder: False):
        pass
    with pytest.raises(StorageError, match="is a file"), replacing_folder(out / "a", lambda folder: True):
        pass
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_writers_of_folders_leave_each_other_alone_and_remove_what_was_abandoned(tmp_path: Path) -> None:
    abandoned = tmp_path / ".localdepth-0123456789ab.tmp.d"
    abandoned.mkdir()
    (abandoned / "half").write_text("a model")
    kept = tmp_path / ".localdepth-0123456789ab.old"
    kept.mkdir()
    with replacing_folder(tmp_path / "a", lambda folder: False) as first:
        with replacing_folder(tmp_path / "b", lambda folder: False) as second:
            assert first.is_dir()
            assert second.is_dir()
        (first / "x").write_text("x")
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b", kept.name}
    assert (tmp_path / "a" / "x").read_text() == "x"
