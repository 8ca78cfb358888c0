"""The loss on a text by depth: every token once, characters counted exactly, whatever the engine."""

import gzip
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import repeat
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localdepth.config import ModelConfig
from localdepth.engine.toy import random_weights
from localdepth.errors import DepthError, PromptError, RequestError
from localdepth.loading import load
from localdepth.model import Model
from localdepth.record import TokenizerRecord
from localdepth_apps.text_curve import measure
from tests import engines
from tests.conftest import tokenizer_json
from tests.published import EXPECTED
from tests.test_cli import localdepth, one_line

TEXT = "the cat sat on the mat and the rat ate the oats " * 12  # longer than a context of 64
ROUNDING = 1e-4  # of float32 logits, between engines and groups of rows

CONFIG = replace(EXPECTED["retrofit_llama"], n_vocab=300, n_ctx=64)


def written(path: Path, config: ModelConfig = CONFIG, *, add_bos: bool = True, head: float = 1.0) -> Path:
    """A model with random weights, whose head is scaled by ``head``."""
    weights = random_weights(config, seed=2)
    weights["output.weight"] *= np.float32(head)
    record = TokenizerRecord(tokenizer_json(), bos=0, eos=(1,), add_bos=add_bos)
    return engines.write_model(path, config, weights, tokenizer=record)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    with load(written(tmp_path_factory.mktemp("toy") / "m.gguf"), engine="toy", kv_type="f32") as model:
        yield model


def surprise(model: Model, context: list[int], token: int, depth: int) -> float:
    """Negative log-likelihood of one token after some others."""
    logits = model.logits(context, depth=depth)[-1].astype(np.float64)
    return float(np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[token])


def test_every_token_is_predicted_once_from_half_a_window_or_more(toy: Model) -> None:
    ids = toy.tokenize(TEXT)[:100]
    text = "".join(map(toy.token_text, ids[1:]))
    assert toy.tokenize(text) == ids
    found = measure(toy, [text], [2], 10_000)
    expected = []
    for at in range(1, len(ids)):
        block = 1 + 32 * ((at - 1) // 32)  # half of the context of 64
        expected.append(surprise(toy, ids[max(0, block - 32) : at], ids[at], 2))
    assert found.n_tokens == len(expected) == 99
    assert found.n_characters == len(text)
    assert found.loss == {2: pytest.approx(np.mean(expected), abs=ROUNDING)}


def test_a_model_that_knows_nothing_needs_the_logarithm_of_its_vocabulary(tmp_path: Path) -> None:
    with load(written(tmp_path / "m.gguf", head=0.0)) as model:
        found = measure(model, [TEXT], [1, 3], 200)
    for depth in (1, 3):
        assert found.loss[depth] == pytest.approx(math.log(300))
        bits = math.log2(300) * found.n_tokens / found.n_characters
        assert found.bits_per_character[depth] == pytest.approx(bits)
        assert found.top1[depth] == 0  # the first of equals is <bos>, which no text holds


def test_engines_agree(tmp_path: Path) -> None:
    path = written(tmp_path / "m.gguf")
    curves = []
    for engine in ("toy", "ggml"):
        with load(path, engine=engine, kv_type="f32") as model:
            curves.append(measure(model, [TEXT, "the mat"], [1, 4], 150))
    toy, ggml = curves
    assert toy.loss == pytest.approx(ggml.loss, abs=ROUNDING)
    assert toy.top1 == pytest.approx(ggml.top1, abs=0.02)
    assert (toy.n_tokens, toy.n_characters) == (ggml.n_tokens, ggml.n_characters)


def test_without_a_start_token_the_first_token_is_given(tmp_path: Path) -> None:
    with load(written(tmp_path / "m.gguf", add_bos=False), engine="toy") as model:
        found = measure(model, ["the cat"], [1], 100)
        ids = model.tokenize("the cat")
        assert found.n_tokens == len(ids) - 1
        assert found.n_characters == len("the cat") - len(model.token_text(ids[0]))


@settings(deadline=None, max_examples=40)
@given(text=st.text(st.sampled_from("the cat\nä€😀"), min_size=1, max_size=40), max_tokens=st.integers(4, 30))
def test_a_cut_text_is_counted_exactly(toy: Model, text: str, max_tokens: int) -> None:
    found = measure(toy, [text], [1], max_tokens)
    assert 1 <= found.n_tokens <= max_tokens
    assert len(toy.tokenize(text[: found.n_characters])) == found.n_tokens + 1


def test_nothing_is_read_beyond_the_last_token(toy: Model) -> None:
    endless = repeat("the cat sat on the mat")
    one = measure(toy, ["the cat sat on the mat"], [1], 1000).n_tokens
    assert measure(toy, endless, [1], 5 * one).n_tokens == 5 * one
    assert measure(toy, endless, [1], 5 * one - 1).n_tokens <= 5 * one - 1


def test_progress_counts_windows_of_all_depths(toy: Model) -> None:
    seen: list[tuple[int, int]] = []
    measure(toy, ["the cat", "the mat"], [1, 2], 100, lambda done, total: seen.append((done, total)))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_measurements_that_cannot_be_made_are_refused(toy: Model, tmp_path: Path) -> None:
    with pytest.raises(DepthError, match=r"1\.\.64"):
        measure(toy, (pytest.fail("read too early") for _ in range(1)), [1, 65], 100)
    for documents in ([], [""]):
        with pytest.raises(RequestError, match="nothing to predict"):
            measure(toy, documents, [1], 100)
    bare = engines.write_model(tmp_path / "bare.gguf", CONFIG, random_weights(CONFIG, 0))
    with load(bare, engine="toy") as model, pytest.raises(PromptError, match="no tokenizer"):
        measure(model, ["the cat"], [1], 100)


def test_the_command_says_what_the_library_finds(tmp_path: Path) -> None:
    model_file = written(tmp_path / "m.gguf")
    texts = ["the cat sat", "on the mat\n\nand the rat"]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in (*texts, " "))
    (tmp_path / "t.jsonl").write_text(lines)
    (tmp_path / "t.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "t.txt").write_text(texts[1])
    with load(model_file) as model:
        both, last = (measure(model, some, [1, 3], 16_384) for some in (texts, texts[1:]))
    for name, expected in (("t.jsonl", both), ("t.jsonl.gz", both), ("t.txt", last)):
        done = localdepth("curve", "-m", model_file, "--text", tmp_path / name, "--depths", "1,3", "--json")
        assert one_line(done) == expected.to_dict(), name
    shown = localdepth("curve", "-m", model_file, "--text", tmp_path / "t.txt", "--depths", "3", "--max-tokens", 4)
    with load(model_file) as model:
        found = measure(model, texts[1:], [3], 4)
    head, row, note = shown.stdout.splitlines()
    assert head.split() == ["depth", "nats", "a", "token", "bits", "a", "character", "likeliest"]
    numbers = (f"{found.loss[3]:.4f}", f"{found.bits_per_character[3]:.4f}", f"{100 * found.top1[3]:.1f}")
    assert row.split() == ["3", *numbers, "%"]
    assert note == f"{found.n_tokens} tokens, {found.n_characters} characters of {tmp_path / 't.txt'}"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, "no text found"),
        ("t.toml", "the cat", "the ending of"),
        ("t.jsonl", '{"text": "the cat"}\n{"story": "the mat"}\n', "line 2 has no field 'text'"),
        ("t.txt", " ", "nothing to predict"),
    ],
)
def test_texts_that_cannot_be_read_are_named(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    done = localdepth("curve", "-m", written(tmp_path / "m.gguf"), "--text", tmp_path / name, "--depths", "1")
    assert done.returncode == 2
    assert message in done.stderr


def test_a_model_whose_context_no_question_fits_is_measured_on_a_text(tmp_path: Path) -> None:
    done = localdepth("curve", "-m", written(tmp_path / "m.gguf"), "--depths", "1", "--steps", "8", "--per-cell", 9)
    assert done.returncode == 2
    note, error = done.stderr.strip().split("ContextOverflow: ")
    assert " ".join(note.split()).startswith("fresh questions are for models trained on such")
    assert " ".join(error.split()).endswith("measure any other on a text with --text FILE")


def test_questions_and_a_text_are_not_measured_together(tmp_path: Path) -> None:
    done = localdepth("curve", "--text", "t.txt", "--data", tmp_path / "q.jsonl")
    assert done.returncode == 2
    assert "one at a time" in done.stderr
