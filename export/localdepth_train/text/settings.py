"""Which text to train on, as plain settings that a recipe file can fill."""

import math
from dataclasses import dataclass
from enum import StrEnum

from localdepth.errors import TrainError

__all__ = ["PROMPT", "Format", "OnBadRow", "SourceRecipe", "TextRecipe"]

PROMPT = "{prompt}"  # where ``prompt_format`` wants the prompt


class Format(StrEnum):
    """How a source is stored."""

    AUTO = "auto"  # by the ending of each file
    JSONL = "jsonl"
    PARQUET = "parquet"
    TEXT = "text"
    DATASETS = "datasets"  # a hub id, or a folder that the library ``datasets`` can open


class OnBadRow(StrEnum):
    """What to do with a row that is no document; one whose text is empty is passed over like a blank line."""

    STOP = "stop"
    SKIP = "skip"  # and count it


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceRecipe:
    """One source of documents.

    With ``prompt_field`` and ``answer_field`` a row is a question and its answer, and only the answer is labelled.

    Attributes:
        path: a file, a glob, a folder (all files of one format below it), or a hub id. Files are
            .jsonl, .ndjson, .txt, each also .gz or .zst, and .parquet.
        weight: share of the tokens, relative to the other sources.
        field: which field of a row is the text.
        prompt_format: what the model reads before an answer; names of control tokens mean these tokens here.
        separator: the line between two documents of a text file; empty stands for blank lines.
        whole_files: a text file is one document.
        split, subset: of a hub dataset; an empty subset is the dataset's default.
    Raises:
        TrainError: when a value is out of its range.
    """

    path: str
    weight: float = 1.0
    format: Format = Format.AUTO
    field: str = "text"
    prompt_field: str = ""
    answer_field: str = ""
    prompt_format: str = PROMPT + "\n"
    separator: str = ""
    whole_files: bool = False
    split: str = "train"
    subset: str = ""

    def __post_init__(self) -> None:
        if not self.path:
            raise TrainError("path is empty; name a file, a glob, a folder or a hub dataset")
        if not (self.weight > 0 and math.isfinite(self.weight)):
            raise TrainError(f"weight={self.weight} of {self.path} must be above 0; leave the source out instead")
        if bool(self.prompt_field) != bool(self.answer_field):
            raise TrainError(
                f"prompt_field={self.prompt_field!r} and answer_field={self.answer_field!r} of {self.path} "
                "go together; give both, or neither and field"
            )
        if not self.field:
            raise TrainError(f"field of {self.path} is empty; name the field that holds the text")
        if self.prompt_format.count(PROMPT) != 1:
            raise TrainError(f"prompt_format={self.prompt_format!r} of {self.path} must hold {PROMPT} once")

    @property
    def columns(self) -> tuple[str, ...]:
        """The fields a row must have: the text, or prompt and answer."""
        return (self.prompt_field, self.answer_field) if self.prompt_field else (self.field,)


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRecipe:
    """Sources and how their documents become rows.

    Attributes:
        n_tokens: length of a row.
        shuffle_buffer: documents of a source that are shuffled together; 1 keeps the order within a file.
        held_out_one_in: one document in so many is kept for evaluation and never trained on; 0 keeps none.
        held_out_documents: how many of these are read for an evaluation, at most.
        isolate: attention stays within one document of a row.
    Raises:
        TrainError: when a value is out of its range.
    """

    sources: tuple[SourceRecipe, ...]
    n_tokens: int
    shuffle_buffer: int = 4096
    held_out_one_in: int = 0
    held_out_documents: int = 64
    on_bad_row: OnBadRow = OnBadRow.STOP
    isolate: bool = True

    def __post_init__(self) -> None:
        if not self.sources:
            raise TrainError("sources is empty; name at least one")
        for name, value, least in (
            ("n_tokens", self.n_tokens, 2),
            ("shuffle_buffer", self.shuffle_buffer, 1),
            ("held_out_documents", self.held_out_documents, 1),
        ):
            if value < least:
                raise TrainError(f"{name}={value} must be at least {least}")
        if self.held_out_one_in < 0 or self.held_out_one_in == 1:
            raise TrainError(
                f"held_out_one_in={self.held_out_one_in} leaves nothing to train on; give 2 or more, or 0 for none"
            )
