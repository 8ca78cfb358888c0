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
from localdepth_train.checkpoint.special_tokens import special_tokens

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
    special = special_tokens(rules, settings, generation)
    template = checkpoint.text("chat_template.jinja") or _template(settings)
    record = TokenizerRecord(
        json=text,
        bos=special.bos,
        eos=special.end_of_answer,
        add_bos=special.add_bos,
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


def _template(settings: Mapping[str, Any]) -> str | None:
    """The chat template; where a file has several by name, the one called default."""
    template = settings.get("chat_template")
    if isinstance(template, list):
        named = {item.get("name"): item.get("template") for item in template if isinstance(item, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None
