"""Nothing a model file holds can hurt the process: mutated real files are used in another one, which must survive."""

import math
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from localdepth.config import ModelConfig
from localdepth.engine.toy import random_weights
from localdepth.loading import DEFAULT_MODEL
from localdepth.quant import Quant
from localdepth.record import TokenizerRecord
from tests import engines
from tests.conftest import ROOT, TEMPLATE, tokenizer_json
from tests.gguf_parts import BOOL, F64, STRING, U32, taken_apart, text
from tests.mutations import Mutant, mutants
from tests.published import FAMILIES
from tests.victim import Outcome, Victim

SECONDS = 10.0  # of one file; sound ones take some hundredths


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hostile")


@pytest.fixture(scope="module")
def victim() -> Iterator[Victim]:
    with Victim(SECONDS) as process:
        yield process


@pytest.fixture(scope="module")
def real_files(folder: Path) -> dict[str, bytes]:
    """The default model, and a small one of every family in every quant; every other one has a tokenizer."""
    files = {"default": (ROOT / "localdepth" / "models" / DEFAULT_MODEL).read_bytes()}
    speaking = TokenizerRecord(tokenizer_json(), bos=0, eos=(1,), add_bos=True, chat_template=TEMPLATE)
    for kind in FAMILIES:
        for quant in Quant:
            config, record = sizes(kind, quant), speaking if len(files) % 2 else None
            weights = random_weights(config, seed=len(files))
            path = engines.write_model(folder / "real.gguf", config, weights, quant, tokenizer=record)
            files[f"{kind} {quant}"] = path.read_bytes()
    return files


def sizes(kind: str, quant: Quant) -> ModelConfig:
    """Three layers, as narrow as the quant's blocks allow."""
    width = {1: 48, 32: 64, 256: 256}[quant.block]
    return replace(FAMILIES[kind], n_vocab=300, n_ctx=256, n_prelude=1, n_core=1, n_coda=1, n_embd=width, n_ff=width)


def survives(mutant: Mutant, victim: Victim, folder: Path) -> Outcome:
    path = folder / "mutant.gguf"  # the last one stays: where a test fails, the smallest that was found to hurt
    path.write_bytes(mutant.raw)
    outcome = victim.use(path)
    assert outcome.harmless, f"{path}, {mutant}, {outcome.end}: {outcome.said}"
    return outcome


def test_whole_files_are_used(real_files: dict[str, bytes], victim: Victim, folder: Path) -> None:
    for name, raw in real_files.items():
        assert taken_apart(raw).encode() == raw
        assert survives(Mutant(name, (), raw), victim, folder) == Outcome("used")


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_a_mutated_file_is_used_or_refused(
    real_files: dict[str, bytes], victim: Victim, folder: Path, data: st.DataObject
) -> None:
    survives(data.draw(mutants(real_files)), victim, folder)


@pytest.mark.slow
@settings(max_examples=3000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_thousands_of_mutated_files_are_used_or_refused(
    real_files: dict[str, bytes], victim: Victim, folder: Path, data: st.DataObject
) -> None:
    survives(data.draw(mutants(real_files)), victim, folder)


@pytest.mark.slow
def test_a_file_cut_anywhere_before_its_weights_is_refused(
    real_files: dict[str, bytes], victim: Victim, folder: Path
) -> None:
    raw = real_files["huginn F32"]
    for size in range(1, len(taken_apart(raw).header()), 7):
        outcome = survives(Mutant("huginn F32", (f"cut at {size}",), raw[:size]), victim, folder)
        assert outcome.said.startswith("ModelFileError")


@pytest.mark.slow
def test_every_entry_bears_extreme_values(real_files: dict[str, bytes], victim: Victim, folder: Path) -> None:
    sound = taken_apart(real_files["retrofit_llama3 F32"])
    for place, (key, raw) in enumerate(sound.entries):
        for content in extremes(raw[0]):
            entries = [*sound.entries[:place], (key, content), *sound.entries[place + 1 :]]
            mutant = Mutant(
                "retrofit_llama3 F32", (f"{key!r} is {content!r}",), replace(sound, entries=entries).encode()
            )
            survives(mutant, victim, folder)


def extremes(kind: int) -> list[bytes]:
    """Values of a type that are its ends, or close to those of what a model may be."""
    match kind:
        case 4:
            numbers = (0, 1, 2, 3, 64, 255, 4096, 4097, 1 << 22, 1 << 24, (1 << 31) - 1, (1 << 32) - 1)
            return [struct.pack("<II", U32, n) for n in numbers]
        case 12:
            floats = (0.0, 1e-300, 1e-45, 1e-6, 1.0, 1e30, 3.4e38, 1e39, 1.7e308, -1.0, math.nan, math.inf)
            return [struct.pack("<Id", F64, x) for x in floats]
        case 7:
            return [struct.pack("<IB", BOOL, n) for n in range(3)]
    words = ("", "none", "add", "pre", "post_branch", "full", "interleaved", "llama3", "normal", "[" * 9999, "{}")
    return [struct.pack("<I", STRING) + text(word) for word in words]


@pytest.mark.parametrize("number", [math.nan, math.inf, 3e38, 1e-45])
@pytest.mark.parametrize("name", ["token_embd.weight", "core.0.attn_q.weight", "output_norm.weight"])
def test_weights_that_are_no_numbers_give_a_clear_error(
    real_files: dict[str, bytes], victim: Victim, folder: Path, name: str, number: float
) -> None:
    parts = taken_apart(real_files["retrofit_llama F32"])
    record = parts.record(name)
    n = math.prod(record.dims)
    weights = struct.pack("<f", number) * n
    parts.data = parts.data[: record.offset] + weights + parts.data[record.offset + 4 * n :]
    outcome = survives(Mutant("retrofit_llama F32", (f"{name} is {number}",), parts.encode()), victim, folder)
    if math.isnan(number):
        assert "the model file or the engine is broken" in outcome.said
