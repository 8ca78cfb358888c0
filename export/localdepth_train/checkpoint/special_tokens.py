"""Which tokens begin and end a text, as the files beside a checkpoint's weights say."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["SpecialTokens", "special_tokens"]


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """Ids with a meaning of their own.

    Attributes:
        bos: begins a text, where ``add_bos``; None if the files name none.
        end_of_text: follows every text in training; None if the files name none.
        end_of_answer: any of these ends what a model generates.
    """

    bos: int | None
    add_bos: bool
    end_of_text: int | None
    end_of_answer: tuple[int, ...]


def special_tokens(
    tokenizer: Mapping[str, Any], settings: Mapping[str, Any], generation: Mapping[str, Any]
) -> SpecialTokens:
    """Read tokenizer.json, tokenizer_config.json and generation_config.json; the last two may be empty.

    What is not as these files have it names no token; the tokenizer itself is for its library to judge.
    """
    ids = _added(tokenizer)
    named_eos, listed_eos = _named(settings.get("eos_token"), ids), _ids(generation.get("eos_token_id"))
    bos = next(iter((*_ids(generation.get("bos_token_id")), *_named(settings.get("bos_token"), ids))), None)
    return SpecialTokens(
        bos=bos,
        add_bos=bos is not None and bool(settings.get("add_bos_token", _begins_with(tokenizer, bos))),
        end_of_text=next(iter((*named_eos, *listed_eos)), None),
        end_of_answer=tuple(dict.fromkeys((*listed_eos, *named_eos))),
    )


def _added(tokenizer: Mapping[str, Any]) -> dict[str, int]:
    return {
        token["content"]: token["id"]
        for token in map(_table, _list(tokenizer.get("added_tokens")))
        if isinstance(token.get("content"), str) and isinstance(token.get("id"), int)
    }


def _begins_with(tokenizer: Mapping[str, Any], bos: int) -> bool:
    """Whether the tokenizer's own post-processor puts ``bos`` before a text, as that of Llama 3 does."""
    processor = _table(tokenizer.get("post_processor"))
    return any(_puts_first(_table(step), bos) for step in _list(processor.get("processors", [processor])))


def _puts_first(step: Mapping[str, Any], bos: int) -> bool:
    first = next(map(_table, _list(step.get("single"))), {})
    name = _table(first.get("SpecialToken")).get("id")
    if step.get("type") != "TemplateProcessing" or not isinstance(name, str):
        return False
    return bos in _ids(_table(_table(step.get("special_tokens")).get(name)).get("ids"))


def _named(token: Any, ids: Mapping[str, int]) -> tuple[int, ...]:
    """Id of a token given by name; some files wrap the name in a record."""
    name = token.get("content") if isinstance(token, dict) else token
    return (ids[name],) if isinstance(name, str) and name in ids else ()


def _ids(value: Any) -> tuple[int, ...]:
    values = value if isinstance(value, list) else [value]
    return tuple(item for item in values if isinstance(item, int) and not isinstance(item, bool))


def _table(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
