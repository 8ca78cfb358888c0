"""Files as rows, one function for each format.

Lines are read one at a time and parquet in small batches, so memory does not depend on the size of a file. Reading
may begin after ``skip`` rows; those are counted, not parsed.
"""

import io
import json
from collections.abc import Iterator
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from typing import IO, Any

from localdepth.errors import MissingExtra, TrainError, install_line
from localdepth_train.text.documents import MAX_BYTES, BadRow, Document, document_from
from localdepth_train.text.settings import SourceRecipe

__all__ = ["COMPRESSIONS", "read_jsonl", "read_parquet", "read_text"]

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
_BUFFER = 1 << 20  # bytes
_PARQUET_ROWS = 64  # at a time
_DAMAGED = "get the file again"
_LONG = f"is longer than {MAX_BYTES:,} bytes; split it"

_Line = tuple[int, bytes | None]  # number from 1, and content; None where that is too long to be kept


def read_jsonl(path: Path, recipe: SourceRecipe, skip: int) -> Iterator[Document | BadRow]:
    """A document a line; blank lines are passed over."""
    filled = (item for item in _lines(path) if item[1] is None or item[1].strip())
    for number, line in islice(filled, skip, None):
        place = f"{path}, line {number}"
        if line is None:
            yield BadRow(place, _LONG)
            continue
        try:
            record = json.loads(line.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            yield BadRow(place, f"is not valid JSON: {error}")
        else:
            yield document_from(record, recipe, place)


def read_text(path: Path, recipe: SourceRecipe, skip: int) -> Iterator[Document | BadRow]:
    """What lies between separator lines, or the whole file."""
    separator = recipe.separator.strip().encode()
    groups = groupby(_lines(path), lambda item: not recipe.whole_files and _is(item[1], separator))
    passages = (_joined(lines) for separates, lines in groups if not separates)
    filled = (item for item in passages if item[1] is None or item[1].strip())
    for number, raw in islice(filled, skip, None):
        place = f"{path}, line {number}"
        if raw is None:
            yield BadRow(place, f"begins a document that {_LONG}")
            continue
        try:
            text = raw.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            yield BadRow(place, f"begins a document that is not UTF-8: {error}")
        else:
            yield Document(text.replace("\r\n", "\n").strip("\n"))


def read_parquet(path: Path, recipe: SourceRecipe, skip: int) -> Iterator[Document | BadRow]:
    """A document a row; row groups that are skipped are not read."""
    arrow = _arrow(path)
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path, pre_buffer=False, buffer_size=_BUFFER) as file:
            if missing := [name for name in recipe.columns if name not in file.schema_arrow.names]:
                raise TrainError(f"{path} has no column {missing[0]!r}, only {', '.join(file.schema_arrow.names)}")
            sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
            group, before = 0, 0
            while group < len(sizes) and before + sizes[group] <= skip:
                before += sizes[group]
                group += 1
            batches = file.iter_batches(
                _PARQUET_ROWS, list(range(group, len(sizes))), list(recipe.columns), use_threads=False
            )
            records = (record for batch in batches for record in batch.to_pylist())
            for number, record in enumerate(islice(records, skip - before, None), skip + 1):
                yield document_from(record, recipe, f"{path}, row {number}")
    except (OSError, arrow.ArrowException) as error:
        raise TrainError(f"cannot read {path}: {error}; {_DAMAGED}") from error


def _lines(path: Path) -> Iterator[_Line]:
    """Lines of a file, compressed or not."""
    try:
        with _opened(path) as file:
            for number, line in enumerate(iter(partial(file.readline, MAX_BYTES + 1), b""), 1):
                whole = len(line) <= MAX_BYTES
                while len(line) > MAX_BYTES and not line.endswith(b"\n"):
                    line = file.readline(MAX_BYTES + 1)
                yield number, line if whole else None
    except OSError as error:
        raise TrainError(f"cannot read {path} to its end: {error}; {_DAMAGED}") from error


def _opened(path: Path) -> IO[bytes]:
    compression = COMPRESSIONS.get(path.suffix)
    if compression is None:
        return path.open("rb", buffering=_BUFFER)
    stream: Any = _arrow(path).input_stream(str(path), compression=compression)
    return io.BufferedReader(stream, _BUFFER)


def _arrow(path: Path) -> Any:
    """The library that reads compressed files and parquet, and tells where one was cut off."""
    try:
        import pyarrow
    except ImportError as error:
        raise MissingExtra(f"{path} needs the package pyarrow: {install_line('train')}") from error
    return pyarrow


def _is(line: bytes | None, separator: bytes) -> bool:
    return line is not None and line.strip() == separator


def _joined(lines: Iterator[_Line]) -> _Line:
    """Lines as one text, numbered as the first of them."""
    first, size = 0, 0
    kept: list[bytes] = []
    for number, line in lines:
        first = first or number
        size += MAX_BYTES + 1 if line is None else len(line)
        if line is not None and size <= MAX_BYTES:
            kept.append(line)
    return first, b"".join(kept) if size <= MAX_BYTES else None
