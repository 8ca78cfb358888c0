"""What a tokenizer.json may ask of this machine.

The library trusts its files: some of what they can say aborts the process, fills the memory or takes for ever. Every
limit is far beyond what published tokenizers need.
"""

import base64
import math
import struct
from collections.abc import Iterator
from typing import Any

from localdepth.backtracking import MANY, count_ways
from localdepth.errors import ModelFileError

__all__ = ["MAX_JSON_CHARS", "limited"]

MAX_JSON_CHARS = 1 << 26  # the largest published tokenizers are below 40 MB
_MAX_STEPS = 64
_MAX_SETTING = 1 << 14  # characters; the longest published expression has a few thousand
_MAX_GROWTH = 64.0  # bytes of a text after normalising for each before
_MAX_WAYS = 8 * MANY
_MAX_ADDED_CHARS = 1 << 22  # of all added tokens together: the library builds an automaton of them
_MAX_CONTROL = 1 << 14
_MAX_WORD = 1024  # where the time grows with the square of a word's length

_DECODERS = frozenset({"ByteFallback", "ByteLevel", "Fuse", "Metaspace", "Replace", "Sequence", "Strip", "WordPiece"})
_PARTS = ("normalizer", "pre_tokenizer", "decoder")


def limited(record: dict[str, Any], n_vocab: int) -> dict[str, Any]:
    """The record without what would cut, pad, extend or randomise a prompt.

    Args:
        record: a whole tokenizer.json; whoever calls takes any exception for a damaged one.
        n_vocab: tokens of the model.
    Raises:
        ModelFileError: it asks for more than the limits, or decodes in a way that cannot stream.
    """
    _check_model(record["model"], n_vocab)
    _check_added(record.get("added_tokens") or [], n_vocab)
    steps = {part: list(_steps(record.get(part))) for part in _PARTS}
    for part, listed in steps.items():
        _check_settings(part, listed)
    for parts in (("normalizer", "pre_tokenizer"), ("decoder",)):
        if (growth := math.prod(_growth(step) for part in parts for step in steps[part])) > _MAX_GROWTH:
            raise ModelFileError(
                f"the file's {' and '.join(parts)} can make text {growth:.0f} times longer; do not use this file"
            )
    if foreign := {step["type"] for step in steps["decoder"]} - _DECODERS:
        raise ModelFileError(
            f"the file's tokenizer decodes with {', '.join(sorted(foreign))}, which cannot stream; "
            f"use a model that decodes with {', '.join(sorted(_DECODERS))}"
        )
    model = {key: value for key, value in record["model"].items() if key != "dropout"}
    return {**record, "model": model, "truncation": None, "padding": None, "post_processor": None}  # bos: `encode`


def _check_model(model: dict[str, Any], n_vocab: int) -> None:
    vocab = model["vocab"]
    if len(vocab) > n_vocab:
        raise ModelFileError(
            f"{len(vocab)} tokens of the tokenizer do not fit a model of {n_vocab} tokens; "
            "export the model again with its own tokenizer"
        )
    if model.get("type") != "WordPiece" and model.get("continuing_subword_prefix"):
        # The library cuts merges at this many bytes, inside a character if so asked, and the process aborts.
        raise ModelFileError("the file's tokenizer has a BPE continuing_subword_prefix; use a model without one")
    # old files name no type, and the library goes by what they hold
    _at_most("max_input_chars_per_word", model.get("max_input_chars_per_word", 0), _MAX_WORD)
    if isinstance(vocab, list):  # Unigram
        _at_most("longest token", max((len(piece) for piece, _ in vocab), default=0), _MAX_WORD)
    for key, value in model.items():
        if isinstance(value, str):
            _at_most(key, len(value), _MAX_SETTING)


def _check_added(added: list[dict[str, Any]], n_vocab: int) -> None:
    _at_most("number of added tokens", len(added), n_vocab)
    _at_most("length of all added tokens", sum(len(token["content"]) for token in added), _MAX_ADDED_CHARS)
    _at_most("number of control tokens", sum(token["special"] for token in added), _MAX_CONTROL)


def _check_settings(part: str, steps: list[dict[str, Any]]) -> None:
    for step in steps:
        for key, value in step.items():
            pattern = value.get("Regex") if isinstance(value, dict) else None
            if isinstance(pattern, str):
                _check_pattern(part, pattern)
            elif isinstance(value, str | dict) and key != "precompiled_charsmap":
                _at_most(f"{part}'s {key}", len(str(value)), _MAX_SETTING)


def _check_pattern(part: str, pattern: str) -> None:
    _at_most(f"{part}'s expression", len(pattern), _MAX_SETTING)
    if count_ways(pattern) > _MAX_WAYS:
        raise ModelFileError(
            f"the {part}'s expression {pattern!r:.60} can match in too many ways ever to end; do not use this file"
        )


def _at_most(name: str, value: int, limit: int) -> None:
    if value > limit:
        raise ModelFileError(f"the tokenizer's {name} is {value}, over {limit}; do not use this file")


def _steps(part: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """The steps of a part, sequences opened."""
    waiting = [part] if part else []
    n_steps = 0
    while waiting:
        step = waiting.pop()
        n_steps += 1
        _at_most("number of steps", n_steps, _MAX_STEPS)
        yield step
        for key in ("normalizers", "pretokenizers", "decoders"):
            waiting += step.get(key, [])


def _growth(step: dict[str, Any]) -> float:
    """Upper bound of output over input bytes of one step."""
    match step["type"]:
        case "ByteLevel":
            return 2.0  # every byte above 127 becomes a character of two
        case "Replace":
            pattern = step["pattern"].get("String", "")  # a regular expression may match very little
            return max(1.0, len(step["content"].encode()) / max(1, len(pattern.encode())))
        case "Precompiled":
            raw = base64.b64decode(step["precompiled_charsmap"])
            (n_bytes,) = struct.unpack_from("<I", raw)  # of the table before the replacements, which end with zeros
            return float(max(map(len, raw[4 + n_bytes :].split(b"\0"))))
    return 1.0
