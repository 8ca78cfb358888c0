"""Documents come from files of every format as they are, one at a time, and what is no document is said clearly."""

import gzip
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

arrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

from localdepth.errors import LocalDepthError, MissingExtra, TrainError  # noqa: E402
from localdepth_train.text.documents import MAX_BYTES, BadRow, Document  # noqa: E402
from localdepth_train.text.settings import Format, OnBadRow, SourceRecipe, TextRecipe  # noqa: E402
from localdepth_train.text.shuffling import ShuffledDocuments  # noqa: E402
from localdepth_train.text.sources import open_source  # noqa: E402
from localdepth_train.toml_records import parse  # noqa: E402

# One text holds an empty line, so it cannot stand in a .txt file whose documents are separated by such.
TEXTS = ["one", "zwei\ndrei", "  四 🐀 \u0627\u0644", "a\x00b", "naïve </s> <eos>", "last"]
ROWS = [{"text": text, "n": i} for i, text in enumerate(TEXTS)]
GROWTH_MB = 40  # while 60 MB are read; pyarrow alone reserves 26 MB, for a file of any size
MEASURE = """
import sys
import psutil
import pyarrow.parquet
from localdepth_train.text.settings import SourceRecipe
from localdepth_train.text.sources import open_source

memory = psutil.Process().memory_info
before = most = memory().rss
for i, _ in enumerate(open_source(SourceRecipe(path=sys.argv[1])).read(0, 0), 1):
    if i % 100 == 0:
        most = max(most, memory().rss)
print(i, (most - before) / 2**20)
"""


def jsonl(rows: list[Any]) -> bytes:
    return "".join(f"{json.dumps(row)}\n" for row in rows).encode()


def zstd(data: bytes) -> bytes:
    sink = arrow.BufferOutputStream()
    with arrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return bytes(sink.getvalue())


def in_two(pack: Callable[[bytes], bytes]) -> Callable[[bytes], bytes]:
    """Compressed as two streams one after the other, as parallel compressors write them."""
    return lambda data: pack(data[:9]) + pack(data[9:])


def write_parquet(path: Path) -> None:
    parquet.write_table(arrow.Table.from_pylist(ROWS), path, row_group_size=2)


def lines(folder: Path, name: str, pack: Callable[[bytes], bytes] = bytes) -> None:
    folder.joinpath(name).write_bytes(pack(jsonl(ROWS)))


def text(folder: Path, name: str, separator: str, pack: Callable[[bytes], bytes] = bytes) -> None:
    folder.joinpath(name).write_bytes(pack(f"\n{separator}\n".join(TEXTS).encode()))


FORMATS: dict[str, tuple[Callable[[Path], object], dict[str, Any]]] = {
    "a.jsonl": (lambda folder: lines(folder, "a.jsonl"), {}),
    "a.ndjson": (lambda folder: lines(folder, "a.ndjson"), {}),
    "a.jsonl.gz": (lambda folder: lines(folder, "a.jsonl.gz", gzip.compress), {}),
    "b.jsonl.gz": (
        lambda folder: lines(folder, "b.jsonl.gz", lambda d: gzip.compress(d[:9]) + gzip.compress(d[9:])),
        {},
    ),
    "a.jsonl.zst": (lambda folder: lines(folder, "a.jsonl.zst", zstd), {}),
    "b.jsonl.zst": (lambda folder: lines(folder, "b.jsonl.zst", in_two(zstd)), {}),
    "a.parquet": (lambda folder: write_parquet(folder / "a.parquet"), {}),
    "a.txt": (lambda folder: text(folder, "a.txt", " \n"), {}),
    "b.txt": (lambda folder: text(folder, "b.txt", "<|end|>"), {"separator": "<|end|>"}),
    "a.txt.gz": (lambda folder: text(folder, "a.txt.gz", "", gzip.compress), {}),
    "a.txt.zst": (lambda folder: text(folder, "a.txt.zst", "", zstd), {}),
    "*.jsonl": (lambda folder: [(folder / f"{i}.jsonl").write_bytes(jsonl([r])) for i, r in enumerate(ROWS)], {}),
    ".": (lambda folder: [lines(folder, "a.jsonl"), (folder / "README.md").write_text("not a document")], {}),
    "whole": (
        lambda folder: [(folder / f"{i}.txt").write_text(f"{t}\n", "utf-8") for i, t in enumerate(TEXTS)],
        {"whole_files": True},
    ),
    "data.bin": (lambda folder: lines(folder, "data.bin"), {"format": Format.JSONL}),
}


def read(path: Path, skip: int = 0, **settings: Any) -> list[Document | BadRow]:
    """Every row of every part but the first ``skip`` of each."""
    source = open_source(SourceRecipe(path=str(path), **settings))
    return [row for part in range(source.n_parts) for row in source.read(part, skip)]


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_documents(tmp_path: Path, name: str) -> None:
    write, settings = FORMATS[name]
    write(tmp_path)
    path = tmp_path if name in (".", "whole") else tmp_path / name
    assert read(path, **settings) == [Document(text) for text in TEXTS]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.zst", "a.parquet", "a.txt.gz"])
def test_reading_begins_after_any_row(tmp_path: Path, name: str) -> None:
    FORMATS[name][0](tmp_path)
    for skip in range(len(TEXTS) + 2):
        assert read(tmp_path / name, skip) == [Document(text) for text in TEXTS[skip:]]


@pytest.mark.parametrize("saved", [False, True])
def test_a_folder_of_the_datasets_library_is_streamed(
    tmp_path: Path, saved: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets = pytest.importorskip("datasets")
    folder = tmp_path / "data"
    if saved:
        datasets.disable_progress_bars()
        datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(folder)
    else:
        folder.mkdir()
        for i in range(3):
            folder.joinpath(f"train-{i}.jsonl").write_bytes(jsonl(ROWS[2 * i : 2 * i + 2]))
    found = read(folder, format=Format.DATASETS)
    assert found == [Document(text) for text in TEXTS]
    source = open_source(SourceRecipe(path=str(folder), format=Format.DATASETS))
    assert source.n_parts == (1 if saved else 3)
    assert list(source.read(0, 1)) == [Document(text) for text in (TEXTS[1:] if saved else TEXTS[1:2])]
    with pytest.raises(TrainError, match=r"cannot open the dataset.*nope"):
        read(folder, format=Format.DATASETS, split="nope")
    with pytest.raises(TrainError, match=r"cannot open the dataset.*body"):
        read(folder, format=Format.DATASETS, field="body")


def test_bytes_marks_and_line_ends_of_other_systems_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n\r\nthree")
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n\r\n{"text": "two"}')
    assert read(tmp_path / "a.txt") == [Document("one\ntwo"), Document("three")]
    assert read(tmp_path / "a.jsonl") == [Document("one"), Document("two")]


def test_prompt_and_answer_are_two_fields(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl([{"q": "why?", "a": "so", "text": 3}]))
    settings = {"prompt_field": "q", "answer_field": "a", "prompt_format": "Q: {prompt}\nA:"}
    assert read(tmp_path / "a.jsonl", **settings) == [Document("so", "why?", ("Q: ", "\nA:"))]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.jsonl", b'{"text": "x"', "is not valid JSON"),
        ("a.jsonl", b"[" * 100_000, "is not valid JSON"),
        ("a.jsonl", b'{"text": "\xff"}', "is not valid JSON: .*utf-8"),
        ("a.jsonl", b'["text"]', "holds list, not an object"),
        ("a.jsonl", b'{"body": "x"}', "has no field 'text', only body"),
        ("a.jsonl", b'{"text": null}', "'text' that is NoneType, not text"),
        ("a.jsonl", b'{"text": "\\ud83d"}', "half of a surrogate pair"),
        ("a.jsonl", b'{"text": "%s"}' % (b"x" * MAX_BYTES), "is longer than 4,194,304 bytes; split it"),
        ("a.txt", b"gr\xfcn", "not UTF-8"),
        ("a.txt", b"x" * 3 * MAX_BYTES, "is longer than"),
        ("a.txt", b"line\n" * MAX_BYTES, "is longer than"),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else value,
)
def test_a_bad_row_is_told_with_its_place(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    separator = b"\n\n" if name.endswith(".txt") else b"\n"
    good = (b"good", b"good") if name.endswith(".txt") else (b'{"text": "good"}',) * 2
    (tmp_path / name).write_bytes(separator.join((good[0], content, good[1])))
    first, bad, last = read(tmp_path / name)
    assert first == last == Document("good")
    assert isinstance(bad, BadRow)
    assert bad.place == f"{tmp_path / name}, line {3 if name.endswith('.txt') else 2}"
    assert re.search(reason, bad.reason)


def test_a_bad_row_of_a_table_is_told_with_its_number(tmp_path: Path) -> None:
    rows = [{"text": "good"}, {"text": None}, {"text": "é" * (MAX_BYTES // 2 + 1)}]
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    good, missing, long = read(tmp_path / "a.parquet")
    assert good == Document("good")
    assert missing == BadRow(f"{tmp_path / 'a.parquet'}, row 2", "has a field 'text' that is NoneType, not text")
    assert isinstance(long, BadRow)
    assert "4,194,306 bytes, over the limit" in long.reason


def documents(path: Path, on_bad: OnBadRow, buffer: int = 2) -> ShuffledDocuments:
    source = open_source(SourceRecipe(path=str(path)))
    return ShuffledDocuments(str(path), source, "seed", buffer, lambda document: document.text != "unwanted", on_bad)


def test_a_bad_row_stops_or_is_counted(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl([ROWS[0], 3, ROWS[1], {"text": "unwanted"}, ROWS[2]]))
    with pytest.raises(
        TrainError, match=r"a\.jsonl, line 2 holds int.*on_bad_row = \"skip\" in \[phases\.text\] and go on, or mend"
    ):
        documents(tmp_path, OnBadRow.STOP).upcoming(1)
    skipping = documents(tmp_path, OnBadRow.SKIP)
    found = []
    for _ in range(6):
        found += [document.text for document in skipping.upcoming(1)]
        skipping.advance()
    assert sorted(found[:3]) == sorted(found[3:]) == sorted(TEXTS[:3])
    assert skipping.skipped == 2


@pytest.mark.parametrize("on_bad", OnBadRow)
def test_an_empty_text_is_passed_over_as_a_blank_line_is(tmp_path: Path, on_bad: OnBadRow) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl([ROWS[0], {"text": ""}, {"text": " \n"}, ROWS[1]]))
    found = documents(tmp_path, on_bad, buffer=9)
    assert sorted(document.text for document in found.upcoming(9)) == sorted(TEXTS[:2])
    assert found.skipped == 0


def test_half_a_pair_is_a_bad_row(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl([{"q": "why?", "a": ""}, {"q": " ", "a": "so"}]))
    no_answer, no_question = read(tmp_path / "a.jsonl", prompt_field="q", answer_field="a")
    assert no_answer == BadRow(f"{tmp_path / 'a.jsonl'}, line 1", "has a field 'a' that is empty")
    assert no_question == BadRow(f"{tmp_path / 'a.jsonl'}, line 2", "has a field 'q' that is empty")


def test_a_failed_reading_begins_again_where_it_failed(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl([*ROWS[:3], 3, *ROWS[3:]]))
    stopping = documents(path, OnBadRow.STOP)
    first = stopping.upcoming(2)
    for _ in first:
        stopping.advance()
    for _ in range(2):
        with pytest.raises(TrainError, match="line 4"):
            stopping.upcoming(1)
    path.write_bytes(jsonl([*ROWS[:3], ROWS[0], *ROWS[3:]]))
    assert sorted(document.text for document in stopping.upcoming(2)) == sorted([TEXTS[2], TEXTS[0]])


def test_a_source_without_documents_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl([3, {"text": "unwanted"}]))
    with pytest.raises(TrainError, match=r"has no document to train on \(1 bad rows\)"):
        documents(tmp_path, OnBadRow.SKIP).upcoming(1)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
@pytest.mark.parametrize("damage", ["cut", "foreign"])
def test_a_damaged_file_stops_the_reading(tmp_path: Path, name: str, damage: str) -> None:
    FORMATS[name][0](tmp_path)
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:-9] if damage == "cut" else b"no such format, whatever the name says")
    with pytest.raises(TrainError, match=r"cannot read .*/a\..*get the file again"):
        read(path)


def test_files_that_are_not_there_or_not_clear_are_refused(tmp_path: Path) -> None:
    lines(tmp_path, "a.jsonl")
    lines(tmp_path, "a.json")
    with pytest.raises(TrainError, match=r"no text found at .*nowhere.*format = \"datasets\""):
        read(tmp_path / "nowhere")
    with pytest.raises(TrainError, match="no text found"):
        read(tmp_path, format=Format.PARQUET)
    with pytest.raises(TrainError, match=r"ending of .*a\.json says nothing.*'jsonl'"):
        read(tmp_path / "a.json")
    (tmp_path / "license.txt").write_text("all rights")
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "b.txt").write_text("no rights")
    for path in (tmp_path, tmp_path / "*[lt]"):
        with pytest.raises(TrainError, match=r"several formats \(jsonl, text\); name those of one: ") as refused:
            read(path)
        one, other = re.findall("'([^']+)'", str(refused.value).partition("name")[2])
        assert len(read(Path(one))) == len(TEXTS)
        assert len(read(Path(other))) == (2 if path == tmp_path else 1)
    assert len(read(tmp_path, format=Format.JSONL)) == len(TEXTS)
    write_parquet(tmp_path / "b.parquet")
    with pytest.raises(TrainError, match="no column 'body', only text, n"):
        read(tmp_path / "b.parquet", field="body")


def test_a_file_that_vanishes_is_told(tmp_path: Path) -> None:
    lines(tmp_path, "a.jsonl")
    source = open_source(SourceRecipe(path=str(tmp_path / "a.jsonl")))
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(TrainError, match=r"cannot read .*No such file"):
        list(source.read(0, 0))


@pytest.mark.parametrize(
    ("package", "name"), [("pyarrow", "a.jsonl.zst"), ("pyarrow", "a.parquet"), ("datasets", "hub/id")]
)
def test_a_missing_library_is_named(tmp_path: Path, package: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if package == "pyarrow":
        FORMATS[name][0](tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtra, match=rf'package {package}: pip install "localdepth\[train\]"'):
        read(tmp_path / name, format=Format.DATASETS if package == "datasets" else Format.AUTO)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"path": ""}, "path is empty"),
        ({"weight": 0.0}, "weight=0.0 of x must be above 0"),
        ({"weight": float("inf")}, "weight=inf"),
        ({"prompt_field": "q"}, "go together"),
        ({"field": ""}, "field of x is empty"),
        ({"prompt_format": "{answer}"}, "must hold {prompt} once"),
    ],
)
def test_sources_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(LocalDepthError, match=message):
        SourceRecipe(**{"path": "x", **settings})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sources": ()}, "sources is empty"),
        ({"n_tokens": 1}, "n_tokens=1 must be at least 2"),
        ({"shuffle_buffer": 0}, "shuffle_buffer=0"),
        ({"held_out_documents": 0}, "held_out_documents=0"),
        ({"held_out_one_in": 1}, "leaves nothing to train on"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainError, match=message):
        TextRecipe(**{"sources": (SourceRecipe(path="x"),), "n_tokens": 16, **settings})


def test_a_recipe_file_fills_the_settings() -> None:
    text = """
    n_tokens = 16
    on_bad_row = "skip"
    [[sources]]
    path = "a.jsonl.gz"
    [[sources]]
    path = "owner/name"
    format = "datasets"
    weight = 0.5
    """
    sources = (SourceRecipe(path="a.jsonl.gz"), SourceRecipe(path="owner/name", format=Format.DATASETS, weight=0.5))
    assert parse(TextRecipe, text, "x") == TextRecipe(sources=sources, n_tokens=16, on_bad_row=OnBadRow.SKIP)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet", "a.txt"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, name: str) -> None:
    rows = [{"text": f"{i} {'words ' * 250}"} for i in range(40_000)]  # 60 MB
    if name == "a.parquet":
        parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / name)
    else:
        data = "\n\n".join(row["text"] for row in rows).encode() if name == "a.txt" else jsonl(rows)
        (tmp_path / name).write_bytes(gzip.compress(data, 1) if name.endswith(".gz") else data)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / name)], capture_output=True, text=True, check=True
    )
    n_rows, growth_mb = done.stdout.split()
    assert int(n_rows) == len(rows)
    assert float(growth_mb) < GROWTH_MB
