"""What a checkpoint directory says about its tokenizer and licence, gathered from its files."""

import re
from collections.abc import Mapping
from typing import Any

from localdepth.chat import ChatTemplate
from localdepth.prompt import build_tokenizer
from localdepth.record import TokenizerRecord
from localdepth_train.checkpoint import Checkpoint, front_matter
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
    rules, settings, generation = (
        checkpoint.settings(name) for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
    )
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
    """What the model card names as ``license``, several with commas between; None where it names none."""
    fields = front_matter(checkpoint.card())
    value = re.sub(r"(^|\s)#.*", "", fields.get("license") or fields.get("license_name") or "")
    names = [word for word in re.findall(r"""[^\s,'"\[\]]+""", value) if word != "-"]
    return ", ".join(names) or None


def _template(settings: Mapping[str, Any]) -> str | None:
    """The chat template; where a file has several by name, the one called default."""
    template = settings.get("chat_template")
    if isinstance(template, list):
        records = (item for item in template if isinstance(item, dict))
        template = next((record.get("template") for record in records if record.get("name") == "default"), None)
    return template if isinstance(template, str) else None
