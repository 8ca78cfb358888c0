"""What a checkpoint directory says about its tokenizer and licence, gathered from its files."""

import json
import re
from collections.abc import Mapping
from typing import Any

from localdepth.chat import ChatTemplate
from localdepth.errors import CheckpointError
from localdepth.gguf import TokenizerRecord
from localdepth.prompt import build_tokenizer
from localdepth_train.checkpoint import Checkpoint

__all__ = ["read_license", "read_tokenizer"]


def read_tokenizer(checkpoint: Checkpoint) -> TokenizerRecord | None:
    """The record for a model file, checked by building tokenizer and template; None without a tokenizer.json.

    Raises:
        CheckpointError: a file that is not JSON, or special tokens that contradict the vocabulary.
        ModelFileError: a tokenizer or template that cannot be used.
    """
    text = checkpoint.text("tokenizer.json")
    if text is None:
        return None
    settings, generation = _json(checkpoint, "tokenizer_config.json"), _json(checkpoint, "generation_config.json")
    rules = _parse(checkpoint, "tokenizer.json", text)
    ids = _special_ids(rules)
    bos = _first(_ids(generation.get("bos_token_id")), _named(settings.get("bos_token"), ids))
    eos = tuple(dict.fromkeys((*_ids(generation.get("eos_token_id")), *_named(settings.get("eos_token"), ids))))
    template = checkpoint.text("chat_template.jinja") or _template(settings)
    record = TokenizerRecord(
        json=text,
        bos=bos,
        eos=eos,
        add_bos=bos is not None and bool(settings.get("add_bos_token", _begins_with_bos(rules, bos))),
        chat_template=template,
    )
    build_tokenizer(record, checkpoint.config.n_vocab)
    if template is not None:
        ChatTemplate(template)
    return record


def read_license(checkpoint: Checkpoint) -> str | None:
    """The ``license`` line in the front matter of the model card, where there is one."""
    card = checkpoint.text("README.md") or ""
    front = re.match(r"---\n(.*?)\n---", card, re.DOTALL)
    found = re.search(r"^license(?:_name)?:\s*(\S+)\s*$", front.group(1), re.MULTILINE) if front else None
    return found.group(1) if found else None


def _json(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    text = checkpoint.text(name)
    return {} if text is None else _parse(checkpoint, name, text)


def _parse(checkpoint: Checkpoint, name: str, text: str) -> dict[str, Any]:
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{checkpoint.path / name} is not valid JSON: {error}; download it again") from error
    if not isinstance(record, dict):
        raise CheckpointError(f"{checkpoint.path / name} must hold a JSON object; download it again")
    return record


def _special_ids(tokenizer: Mapping[str, Any]) -> dict[str, int]:
    added = tokenizer.get("added_tokens") or []
    return {
        token["content"]: token["id"]
        for token in added
        if isinstance(token, dict) and isinstance(token.get("content"), str) and isinstance(token.get("id"), int)
    }


def _begins_with_bos(rules: Mapping[str, Any], bos: int) -> bool:
    """Whether the tokenizer's own post-processor puts ``bos`` before a text, as that of Llama 3 does."""
    processor = rules.get("post_processor") or {}
    steps = processor.get("processors", [processor]) if isinstance(processor, dict) else []
    for step in (step for step in steps if isinstance(step, dict) and step.get("type") == "TemplateProcessing"):
        first = (step.get("single") or [{}])[0]
        name = first.get("SpecialToken", {}).get("id") if isinstance(first, dict) else None
        special = step.get("special_tokens") or {}
        if name in special and bos in _ids(special[name].get("ids")):
            return True
    return False


def _named(token: Any, ids: Mapping[str, int]) -> tuple[int, ...]:
    """Id of a token given by name; some files wrap the name in a record."""
    name = token.get("content") if isinstance(token, dict) else token
    return (ids[name],) if isinstance(name, str) and name in ids else ()


def _ids(value: Any) -> tuple[int, ...]:
    values = value if isinstance(value, list) else [value]
    return tuple(item for item in values if isinstance(item, int) and not isinstance(item, bool))


def _first(*choices: tuple[int, ...]) -> int | None:
    return next((choice[0] for choice in choices if choice), None)


def _template(settings: Mapping[str, Any]) -> str | None:
    """The chat template; where a file has several by name, the one called default."""
    template = settings.get("chat_template")
    if isinstance(template, list):
        named = {item.get("name"): item.get("template") for item in template if isinstance(item, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None
