"""Documents become the tokens that the runtime would make of them, between the marks the checkpoint asks for."""

import json
from pathlib import Path
from typing import Any

import pytest

from localdepth.errors import TrainError
from localdepth.tokenizer import Tokenizer
from localdepth_train.checkpoint.special_tokens import SpecialTokens, special_tokens
from localdepth_train.text.documents import Document
from localdepth_train.text.encoding import DocumentTokenizer
from localdepth_train.text.packing import IGNORED
from tests.conftest import tokenizer_json

BOS, EOS, USER, ANSWER = range(4)
BABYLLAMA = "data/weights/babyllama-105"
TEXTS = ["the cat sat", " on  the mat\n", "七 rats 🐀 ate — oats", "naïve \x00 \u0627\u0644", "\t"]


@pytest.fixture(scope="module")
def tokenizer() -> DocumentTokenizer:
    return DocumentTokenizer(tokenizer_json(), bos=BOS, eos=EOS)


@pytest.fixture(scope="module")
def runtime() -> Tokenizer:
    return Tokenizer.from_json(tokenizer_json(), n_vocab=300, bos=BOS, eos=(EOS,), add_bos=True)


def test_only_answers_are_labelled(tokenizer: DocumentTokenizer, runtime: Tokenizer) -> None:
    [document] = tokenizer.encode([Document("sat on", "the cat <answer> mat", ("<user>", "<answer>"))])
    ids, labels = document.ids.tolist(), document.labels.tolist()
    assert ids[:2] == [BOS, USER]
    assert ids.count(ANSWER) == 1, "the frame names a control token, the same name in a prompt is text"
    first = ids.index(ANSWER)
    assert labels == [IGNORED] * first + [*ids[first + 1 :], IGNORED]
    assert runtime.decode(ids[first + 1 : -1]) == "sat on"


def test_tokens_are_those_of_the_runtime(tokenizer: DocumentTokenizer, runtime: Tokenizer) -> None:
    for document, text in zip(tokenizer.encode([Document(text) for text in TEXTS]), TEXTS, strict=True):
        assert document.ids.tolist() == [*runtime.encode(text), EOS]
        assert document.labels.tolist() == [*document.ids.tolist()[1:], IGNORED]
    [asked] = tokenizer.encode([Document("mat", "the cat", ("<user>", "<answer>"))])
    prompt = runtime.encode("<user>the cat<answer>", special=True)
    assert asked.ids.tolist()[: len(prompt)] == prompt


def test_a_frame_that_names_bos_does_not_double_it(tokenizer: DocumentTokenizer) -> None:
    [document] = tokenizer.encode([Document("mat", "the cat", ("<bos>", ""))])
    assert document.ids.tolist().count(BOS) == 1


def test_a_tokenizer_file_that_cuts_or_fills_texts_does_neither_here() -> None:
    settings = json.loads(tokenizer_json())
    settings["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    cutting = DocumentTokenizer(json.dumps(settings), bos=None, eos=EOS)
    [document] = cutting.encode([Document("the cat sat on the mat")])
    assert len(document.ids) > 5


def test_text_that_spells_a_control_token_stays_text(tokenizer: DocumentTokenizer) -> None:
    [document] = tokenizer.encode([Document("a <eos> b <bos>")])
    assert document.ids.tolist().count(EOS) == document.ids.tolist().count(BOS) == 1


def test_a_checkpoint_says_how_texts_begin_and_end(fixtures: Path) -> None:
    tokenizer = DocumentTokenizer.from_folder(fixtures / BABYLLAMA, n_vocab=105)
    [document] = tokenizer.encode([Document("hi")])
    assert (document.ids[0], document.ids[-1], tokenizer.eos) == (1, 2, 2), "</s>, though <s> ends an answer too"
    with pytest.raises(TrainError, match="ids up to 104, the model 100 tokens"):
        DocumentTokenizer.from_folder(fixtures / BABYLLAMA, n_vocab=100)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "cannot read .*tokenizer.json"),
        ({"tokenizer.json": "{"}, "not valid JSON"),
        ({"tokenizer.json": "[]"}, "must hold a JSON object, not list"),
        ({"tokenizer.json": '{"model": 1}', "tokenizer_config.json": "{}"}, "names no eos token"),
        ({"tokenizer.json": '{"model": 1}', "generation_config.json": '{"eos_token_id": 1}'}, "cannot be read"),
    ],
)
def test_tokenizers_that_cannot_be_used_are_refused(tmp_path: Path, files: dict[str, str], message: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(TrainError, match=message):
        DocumentTokenizer.from_folder(tmp_path, n_vocab=300)


@pytest.mark.parametrize(
    ("settings", "generation", "found"),
    [
        ({"bos_token": "<a>", "eos_token": {"content": "<b>"}}, {}, SpecialTokens(7, False, 8, (8,))),
        ({"bos_token": "<a>", "add_bos_token": True}, {"eos_token_id": [9, 8]}, SpecialTokens(7, True, 9, (9, 8))),
        ({"eos_token": "<b>"}, {"bos_token_id": 5, "eos_token_id": [9, 8]}, SpecialTokens(5, False, 8, (9, 8))),
        ({"bos_token": "<none>", "eos_token": None, "add_bos_token": True}, {}, SpecialTokens(None, False, None, ())),
    ],
)
def test_a_text_ends_as_the_tokenizer_says_and_an_answer_by_any_end(
    settings: dict[str, Any], generation: dict[str, Any], found: SpecialTokens
) -> None:
    added = [{"content": "<a>", "id": 7}, {"content": "<b>", "id": 8}]
    assert special_tokens({"added_tokens": added}, settings, generation) == found


def test_a_post_processor_may_ask_for_bos() -> None:
    step = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<a>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "special_tokens": {"<a>": {"id": "<a>", "ids": [7], "tokens": ["<a>"]}},
    }
    rules = {
        "added_tokens": [{"content": "<a>", "id": 7}],
        "post_processor": {"type": "Sequence", "processors": [step]},
    }
    assert special_tokens(rules, {"bos_token": "<a>"}, {}).add_bos
