"""``verify`` on ONNX folders: right numbers pass at every depth, a wrong one is found, the record says so."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from localdepth.engine.toy import random_weights
from localdepth.errors import ConfigError, ModelFileError, StorageError
from localdepth.onnx_folder import folder as onnx_folder
from localdepth.record import Check, CheckStatus
from localdepth_export.carry import gguf_to_onnx
from localdepth_export.convert import to_gguf
from localdepth_export.importance import collect
from localdepth_export.onnx_graphs.convert import to_onnx
from localdepth_export.onnx_graphs.folder import write_check
from localdepth_export.verification import verify
from localdepth_train.checkpoint import save
from tests.published import EXPECTED, FAMILIES, make_checkpoint

WIDE = replace(EXPECTED["retrofit_llama"], n_prelude=1, n_core=1, n_coda=0, n_embd=256, head_dim=64, n_ff=256)
STORED = [(32, None, "F32"), (16, None, "F16"), (8, None, "INT8"), (4, None, "INT4"), (4, 8, "INT4")]


@pytest.mark.parametrize("kind", FAMILIES)
def test_folders_of_float32_are_verified_and_say_so(kind: str, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "c", kind)
    to_onnx(checkpoint, tmp_path / "m")
    report = verify(tmp_path / "m", checkpoint, depths=(1, 2, 8))
    assert report.passed, report
    assert max(report.check.max_abs) < 1e-4
    with onnx_folder.read(tmp_path / "m") as folder:
        assert folder.check == report.check
        assert folder.check.status is CheckStatus.VERIFIED
        assert folder.is_intact()


@pytest.mark.parametrize(("bits", "core_bits", "quant"), STORED)
def test_one_wrong_tensor_fails_and_is_named(bits: int, core_bits: int | None, quant: str, tmp_path: Path) -> None:
    weights = random_weights(WIDE, 1)
    checkpoint = save(tmp_path / "c", WIDE, weights)
    to_onnx(checkpoint, tmp_path / "m", bits=bits, core_bits=core_bits)
    report = verify(tmp_path / "m", checkpoint, depths=(1, 4))
    assert (report.passed, report.exact, report.quant) == (True, True, quant)
    weights["core.0.attn_q.weight"] = weights["core.0.attn_q.weight"][::-1].copy()
    to_onnx(save(tmp_path / "wrong", WIDE, weights), tmp_path / "m", bits=bits, core_bits=core_bits)
    report = verify(tmp_path / "m", checkpoint, depths=(1,))
    assert (report.passed, report.wrong_tensors) == (False, ("core.0.attn_q.weight",))
    assert "core.0.attn_q.weight" in report.verdict
    with onnx_folder.read(tmp_path / "m") as folder:
        assert folder.check is not None
        assert folder.check.status is CheckStatus.FAILED


@pytest.mark.parametrize("bits", [32, 8])
def test_one_wrong_number_fails(bits: int, tmp_path: Path) -> None:
    checkpoint = save(tmp_path / "c", WIDE, random_weights(WIDE, 1))
    to_onnx(checkpoint, tmp_path / "m", bits=bits)
    with onnx_folder.read(tmp_path / "m") as folder:
        place = folder.layout["core.0.ffn_up.weight"].offset + 40
    raw = bytearray((tmp_path / "m" / "weights.bin").read_bytes())
    raw[place] ^= 0x80
    (tmp_path / "m" / "weights.bin").write_bytes(raw)
    report = verify(tmp_path / "m", checkpoint, depths=(1,))
    assert (report.intact, report.wrong_tensors) == (False, ("core.0.ffn_up.weight",))


@pytest.mark.parametrize("quant", ["BF16", "Q8_0", "Q4_0", "Q4_0,core=Q8_0"])
def test_numbers_that_ggml_has_rounded_are_judged_as_such(quant: str, tmp_path: Path) -> None:
    weights = random_weights(WIDE, 1)
    checkpoint = save(tmp_path / "c", WIDE, weights)
    to_gguf(checkpoint, tmp_path / "m.gguf", quant=quant)
    gguf_to_onnx(tmp_path / "m.gguf", tmp_path / "m")
    report = verify(tmp_path / "m", checkpoint, depths=(1, 4))
    assert report.wrong_tensors == ()
    weights["core.0.attn_q.weight"] = weights["core.0.attn_q.weight"][::-1].copy()
    other = save(tmp_path / "other", WIDE, weights)
    assert verify(tmp_path / "m", other, depths=(1,)).wrong_tensors == ("core.0.attn_q.weight",)


def test_importance_is_asked_for_and_checked(tmp_path: Path) -> None:
    checkpoint = save(tmp_path / "c", WIDE, random_weights(WIDE, 1))
    to_gguf(checkpoint, tmp_path / "f32.gguf", quant="F32")
    importance = collect(tmp_path / "f32.gguf", [[1, 2, 3, 4, 5, 6, 7]])
    to_gguf(checkpoint, tmp_path / "m.gguf", quant="Q4_0", importance=importance)
    gguf_to_onnx(tmp_path / "m.gguf", tmp_path / "m")
    assert not verify(tmp_path / "m", checkpoint, depths=(1,)).exact
    report = verify(tmp_path / "m", checkpoint, depths=(1,), importance=importance)
    assert (report.exact, report.wrong_tensors) == (True, ())
    to_onnx(checkpoint, tmp_path / "m", bits=4)
    with pytest.raises(ConfigError, match="was rounded with no importance"):
        verify(tmp_path / "m", checkpoint, depths=(1,), importance=importance)


def test_a_folder_of_another_model_is_not_compared(tmp_path: Path) -> None:
    to_onnx(make_checkpoint(tmp_path / "a", "retrofit_llama"), tmp_path / "m")
    other = make_checkpoint(tmp_path / "b", "retrofit_llama3")
    with pytest.raises(ConfigError, match=r"rope_base 10000\.0 against 500000\.0"):
        verify(tmp_path / "m", other)
    with pytest.raises(ModelFileError, match="not a folder of ours"):
        verify(tmp_path / "a", tmp_path / "a")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
@pytest.mark.parametrize("kind", [to_gguf, to_onnx])
def test_what_could_not_be_recorded_is_not_compared(kind: Callable[..., Any], tmp_path: Path) -> None:
    checkpoint, place = save(tmp_path / "c", WIDE, random_weights(WIDE, 1)), tmp_path / "place"
    place.mkdir()
    kind(checkpoint, place / "m")
    closed = place / "m" if kind is to_onnx else place
    closed.chmod(0o555)
    try:
        with pytest.raises(StorageError, match=r"into .*/place/m: Permission denied; .* --no-record"):
            verify(place / "m", checkpoint, depths=(1,))
        assert verify(place / "m", checkpoint, depths=(1,), record=False).check.depths == (1,)
    finally:
        closed.chmod(0o755)


def test_a_file_that_cannot_be_written_anew_is_not_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = save(tmp_path / "c", WIDE, random_weights(WIDE, 1))
    n_bytes = to_gguf(checkpoint, tmp_path / "m.gguf").n_bytes
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage._replace(free=n_bytes - 1))
    with pytest.raises(StorageError, match=f"that takes {n_bytes:,} bytes and {n_bytes - 1:,} are free"):
        verify(tmp_path / "m.gguf", checkpoint, depths=(1,))


def test_a_new_check_leaves_the_rest_of_the_record_as_it_is(tmp_path: Path) -> None:
    to_onnx(make_checkpoint(tmp_path / "c", "huginn"), tmp_path / "m", bits=4, core_bits=8)
    before = json.loads((tmp_path / "m" / "config.json").read_text())
    check = Check(CheckStatus.FAILED, depths=(1, 2), max_abs=(np.inf, 1.0), kl=(np.nan, 0.5), top1=(0.0, 1.0))
    write_check(tmp_path / "m", check)
    after = json.loads((tmp_path / "m" / "config.json").read_text())
    assert after.pop("check")["status"] == "failed"
    assert after == {key: value for key, value in before.items() if key != "check"}
    assert not list((tmp_path / "m").glob(".*"))
