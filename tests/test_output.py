"""Folders that are replaced keep their mode, the current one is never replaced, and a kill in between loses nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from localdepth.errors import StorageError
from localdepth_train.output import replacing_folder

# Replaces the folder argv[1], and is killed after the rename of this number.
KILLED = """
import os, sys
from pathlib import Path
from localdepth_train.output import replacing_folder

left, rename = int(sys.argv[2]), Path.rename

def last_rename(path, target):
    global left
    rename(path, target)
    left -= 1
    if not left:
        os._exit(9)

Path.rename = last_rename
with replacing_folder(Path(sys.argv[1]), lambda folder: True) as folder:
    (folder / "a").write_text("new")
"""


def make(path: Path, text: str) -> Path:
    path.mkdir()
    (path / "a").write_text(text)
    return path


def kill_after(n_renames: int, out: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(out), str(n_renames)])
    assert done.returncode == 9


def test_a_folder_killed_between_old_and_new_is_put_back_by_the_next_writer(tmp_path: Path) -> None:
    out = make(tmp_path / "out", "old")
    kill_after(1, out)
    assert not out.exists()
    with pytest.raises(StorageError, match="holds something else"), replacing_folder(out, lambda folder: False):
        pass
    assert (out / "a").read_text() == "old"
    assert len(os.listdir(tmp_path)) == 2  # the new one waits for a writer that gets further
    with replacing_folder(out, lambda folder: True) as folder:
        (folder / "a").write_text("newer")
    assert os.listdir(tmp_path) == ["out"]
    assert (out / "a").read_text() == "newer"


@pytest.mark.parametrize("n_renames", [2, 3])
def test_an_old_folder_that_was_replaced_before_a_kill_is_removed_by_the_next_writer(
    n_renames: int, tmp_path: Path
) -> None:
    out = make(tmp_path / "out", "old")
    kill_after(n_renames, out)
    assert (out / "a").read_text() == "new"
    assert len(os.listdir(tmp_path)) == 2
    with replacing_folder(out, lambda folder: (folder / "a").read_text() == "new") as folder:
        (folder / "a").write_text("newer")
    assert os.listdir(tmp_path) == ["out"]
    assert (out / "a").read_text() == "newer"


def test_a_folder_that_cannot_take_its_place_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, rename = make(tmp_path / "out", "old"), Path.rename

    def refuse(path: Path, target: Path) -> Path:
        if path.suffix == ".d":
            raise PermissionError(13, "Permission denied")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(StorageError, match="Permission denied"), replacing_folder(out, lambda folder: True) as folder:
        (folder / "a").write_text("new")
    assert os.listdir(tmp_path) == ["out"]
    assert (out / "a").read_text() == "old"


@pytest.mark.parametrize("mode", [0o700, 0o750])
def test_a_folder_keeps_its_mode_when_it_is_replaced(mode: int, tmp_path: Path) -> None:
    out = make(tmp_path / "out", "old")
    out.chmod(mode)
    with replacing_folder(out, lambda folder: True) as folder:
        assert folder.stat().st_mode & 0o777 == mode
        (folder / "a").write_text("new")
    assert out.stat().st_mode & 0o777 == mode


@pytest.mark.parametrize("text", ["old", None])
def test_the_current_folder_is_not_replaced(text: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    make(out, text) if text else out.mkdir()
    monkeypatch.chdir(out)
    for path in (Path("."), out, Path("../out")):
        with (
            pytest.raises(StorageError, match="is the current folder, which cannot be replaced; name another one"),
            replacing_folder(path, lambda folder: True),
        ):
            pass
    assert os.listdir(tmp_path) == ["out"]
