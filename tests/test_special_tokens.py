"""Special tokens of files that are not as they should be: none are named, and nothing breaks."""

from typing import Any

import pytest
from hypothesis import given

from localdepth_train.checkpoint.special_tokens import SpecialTokens, special_tokens
from tests.strategies import json_values

NONE = SpecialTokens(bos=None, add_bos=False, end_of_text=None, end_of_answer=())
TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<a>", "type_id": 0}}],
    "special_tokens": {"<a>": {"id": "<a>", "ids": [7], "tokens": ["<a>"]}},
}
KEYS = (
    *("added_tokens", "content", "id", "ids", "post_processor", "processors", "type", "TemplateProcessing", "single"),
    *("SpecialToken", "special_tokens", "bos_token", "eos_token", "eos_token_id", "bos_token_id", "<a>"),
)


@pytest.mark.parametrize(
    "processor",
    [
        {**TEMPLATE, "special_tokens": ["<a>"]},
        {**TEMPLATE, "special_tokens": {"<a>": 7}},
        {**TEMPLATE, "special_tokens": {"<a>": {"ids": None}}},
        {**TEMPLATE, "single": [{"SpecialToken": None}]},
        {**TEMPLATE, "single": [{"SpecialToken": {"id": ["<a>"]}}]},
        {**TEMPLATE, "single": [None]},
        {**TEMPLATE, "single": "<a>"},
        {"type": "Sequence", "processors": None},
        {"type": "Sequence", "processors": 5},
        {"type": "Sequence", "processors": [None, [TEMPLATE]]},
        [TEMPLATE],
        "TemplateProcessing",
    ],
)
def test_a_post_processor_of_another_shape_asks_for_nothing(processor: Any) -> None:
    rules = {"added_tokens": [{"content": "<a>", "id": 7}], "post_processor": processor}
    assert special_tokens(rules, {"bos_token": "<a>"}, {}) == SpecialTokens(7, False, None, ())


@pytest.mark.parametrize("added", [5, "x", {"<a>": 7}, [None, 5, ["<a>"], {"content": ["<a>"], "id": 7}], [{"id": 7}]])
def test_added_tokens_of_another_shape_name_nothing(added: Any) -> None:
    assert special_tokens({"added_tokens": added}, {"bos_token": "<a>", "eos_token": ["<a>"]}, {}) == NONE


@given(json_values(*KEYS), json_values(*KEYS), json_values(*KEYS), json_values(*KEYS))
def test_any_files_are_read(tokens: Any, processor: Any, settings: Any, generation: Any) -> None:
    rules = {"added_tokens": tokens, "post_processor": processor}
    found = special_tokens(rules, {"bos_token": settings, "eos_token": settings}, {"eos_token_id": generation})
    assert all(isinstance(i, int) for i in found.end_of_answer)
