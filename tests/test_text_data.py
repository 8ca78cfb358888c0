"""Text becomes rows: packed without loss, mixed by weight, split between processes, resumed to the row."""

import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from localdepth.errors import TrainError
from localdepth.tokenizer import Tokenizer
from localdepth_train.text.documents import Document, is_held_out
from localdepth_train.text.encoding import DocumentTokenizer
from localdepth_train.text.held_out import held_out_rows
from localdepth_train.text.packing import IGNORED, PackedRow, TokenDocument, pack
from localdepth_train.text.settings import OnBadRow, SourceRecipe, TextRecipe
from localdepth_train.text.stream import TextStream
from tests.conftest import tokenizer_json

BOS, EOS = 0, 1
WORDS = ("the", "cat", "sat", "on", "a", "mat", "—", "and", "七", "rats", "🐀", "ate", "<eos>", "oats")


@pytest.fixture(scope="module")
def tokenizer() -> DocumentTokenizer:
    return DocumentTokenizer(tokenizer_json(), bos=BOS, eos=EOS)


def write_jsonl(path: Path, rows: Sequence[object]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def sentences(n: int, seed: int, longest: int = 30) -> list[str]:
    """Distinct texts of 1 to ``longest`` words."""
    rng = random.Random(seed)
    return [f"{seed}.{i} {' '.join(rng.choices(WORDS, k=rng.randint(1, longest)))}" for i in range(n)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> TextRecipe:
    """Stories in three files, one of them longer than many rows, and questions with answers."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "stories").mkdir()
    for i in range(3):
        texts = [*sentences(9, i), " ".join(sentences(40, 10 + i))]
        write_jsonl(folder / "stories" / f"{i}.jsonl", [{"text": text} for text in texts])
    questions = [{"q": text, "a": text[::-1]} for text in sentences(13, 5, longest=4)]
    sources = (
        SourceRecipe(path=str(folder / "stories"), weight=3),
        SourceRecipe(path=str(write_jsonl(folder / "qa.jsonl", questions)), prompt_field="q", answer_field="a"),
    )
    return TextRecipe(sources=sources, n_tokens=24, shuffle_buffer=4, held_out_one_in=7)


def equal(a: Sequence[PackedRow], b: Sequence[PackedRow]) -> bool:
    pairs = [pair for x, y in zip(a, b, strict=True) for pair in ((x.ids, y.ids), (x.labels, y.labels))]
    pairs += [(x.documents, y.documents) for x, y in zip(a, b, strict=True)]
    return all(np.array_equal(x, y) for x, y in pairs)


def documents_of(rows: Iterator[PackedRow]) -> Iterator[list[int]]:
    """Ids between one eos and the next, without the eos."""
    found: list[int] = []
    for token in (int(i) for row in rows for i in row.ids):
        if token == EOS:
            yield found
            found = []
        else:
            found.append(token)


@cache
def runtime() -> Tokenizer:
    """The same tokenizer as the runtime has it."""
    return Tokenizer.from_json(tokenizer_json(), n_vocab=300, bos=BOS, eos=(EOS,), add_bos=True)


def decode(ids: list[int]) -> str:
    return runtime().decode(ids)


def token_documents() -> st.SearchStrategy[list[tuple[int, int]]]:
    """Lengths of documents, each with how much of it is a prompt."""
    lengths = st.integers(1, 40)
    return st.lists(lengths.flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n - 1))), min_size=1, max_size=12)


def numbered(shapes: list[tuple[int, int]]) -> list[TokenDocument]:
    """Documents whose ids count up without end, so that none is like another."""
    starts = np.cumsum([0, *(n for n, _ in shapes)])
    return [
        TokenDocument.labelled(np.arange(start, start + n, dtype=np.int32), n_prompt)
        for start, (n, n_prompt) in zip(starts, shapes, strict=False)
    ]


@given(token_documents(), st.integers(1, 50))
def test_packing_loses_repeats_and_reorders_nothing(shapes: list[tuple[int, int]], n_tokens: int) -> None:
    rows = [row for row, _ in pack(numbered(shapes), n_tokens)]
    total = sum(n for n, _ in shapes)
    assert len(rows) == total // n_tokens
    assert [int(i) for row in rows for i in row.ids] == list(range(len(rows) * n_tokens))
    assert all(array.dtype == np.int32 for row in rows for array in (row.ids, row.labels, row.documents))


@given(token_documents(), st.integers(1, 50))
def test_a_label_is_the_next_token_of_the_same_document_unless_that_is_prompt(
    shapes: list[tuple[int, int]], n_tokens: int
) -> None:
    owner = np.repeat(np.arange(len(shapes)), [n for n, _ in shapes])
    given_away = np.concatenate([np.arange(n) < n_prompt for n, n_prompt in shapes])
    for row, _ in pack(numbered(shapes), n_tokens):
        for token, label, document in zip(row.ids, row.labels, row.documents, strict=True):
            follows = token + 1 < len(owner) and owner[token + 1] == owner[token] and not given_away[token + 1]
            assert label == (token + 1 if follows else IGNORED)
            assert document == owner[token] - owner[row.ids[0]]


@given(token_documents(), st.integers(1, 50), st.data())
def test_packing_goes_on_inside_a_document(shapes: list[tuple[int, int]], n_tokens: int, data: st.DataObject) -> None:
    whole = list(pack(numbered(shapes), n_tokens))
    if not whole:
        return
    at = data.draw(st.integers(0, len(whole) - 1))
    row, done = whole[at]
    drawn = int(np.searchsorted(np.cumsum([n for n, _ in shapes]), int(row.ids[-1]) + 1))
    rest = numbered(shapes)[drawn if done else drawn + 1 :]
    assert equal([row for row, _ in pack(rest, n_tokens, done)], [row for row, _ in whole[at + 1 :]])


@given(
    seed=st.integers(0, 3),
    n_tokens=st.integers(2, 60),
    buffer=st.integers(1, 12),
    stops=st.lists(st.integers(0, 30), max_size=4),
)
def test_a_stream_that_is_stopped_anywhere_goes_on_with_the_same_rows(
    corpus: TextRecipe, tokenizer: DocumentTokenizer, seed: int, n_tokens: int, buffer: int, stops: list[int]
) -> None:
    recipe = replace(corpus, n_tokens=n_tokens, shuffle_buffer=buffer)
    wanted = list(islice(TextStream(recipe, tokenizer, seed=seed), sum(stops) + 8))
    rows: list[PackedRow] = []
    stream = TextStream(recipe, tokenizer, seed=seed)
    for stop in stops:
        rows += islice(stream, stop)
        saved = json.dumps(stream.state())
        list(islice(stream, stop % 3))  # work that is lost
        stream = TextStream(recipe, tokenizer, seed=seed)
        stream.restore(json.loads(saved))
        assert json.dumps(stream.state()) == saved
    assert equal(rows + list(islice(stream, 8)), wanted)


def test_a_stream_goes_on_the_same_after_three_epochs(corpus: TextRecipe, tokenizer: DocumentTokenizer) -> None:
    stream = TextStream(corpus, tokenizer, seed=0)
    while min(stream.epochs.values()) < 3:
        next(stream)
    other = TextStream(corpus, tokenizer, seed=0)
    other.restore(stream.state())
    assert equal(list(islice(stream, 50)), list(islice(other, 50)))
    assert other.epochs == stream.epochs


@given(world=st.integers(1, 4), before=st.integers(0, 12), new_world=st.integers(1, 3))
def test_ranks_together_see_the_order_of_one_process(
    corpus: TextRecipe, tokenizer: DocumentTokenizer, world: int, before: int, new_world: int
) -> None:
    alone = list(islice(TextStream(corpus, tokenizer, seed=1), world * before + new_world * 3))
    ranks = [TextStream(corpus, tokenizer, seed=1, rank=rank, world=world) for rank in range(world)]
    together = [next(rank) for _ in range(before) for rank in ranks]
    assert len({json.dumps(rank.state()) for rank in ranks}) == 1
    fewer = [TextStream(corpus, tokenizer, seed=1, rank=rank, world=new_world) for rank in range(new_world)]
    for rank in fewer:
        rank.restore(ranks[0].state())
    together += [next(rank) for _ in range(3) for rank in fewer]
    assert equal(together, alone)


def test_a_rank_outside_the_world_is_refused(corpus: TextRecipe, tokenizer: DocumentTokenizer) -> None:
    with pytest.raises(TrainError, match="rank=2 is outside"):
        TextStream(corpus, tokenizer, seed=0, rank=2, world=2)


def test_an_epoch_gives_every_document_once_and_the_next_another_order(
    tmp_path: Path, tokenizer: DocumentTokenizer
) -> None:
    texts = sentences(30, 0)
    for i in range(3):
        write_jsonl(tmp_path / f"{i}.jsonl", [{"text": text} for text in texts[10 * i : 10 * i + 10]])
    recipe = TextRecipe(sources=(SourceRecipe(path=str(tmp_path)),), n_tokens=16, shuffle_buffer=6)

    def order(seed: int) -> list[str]:
        return [decode(ids) for ids in islice(documents_of(TextStream(recipe, tokenizer, seed=seed)), 60)]

    first = order(seed=0)
    assert sorted(first[:30]) == sorted(first[30:]) == sorted(texts)
    assert first[:30] != first[30:]
    assert first == order(seed=0) != order(seed=1)


def test_a_buffer_of_one_keeps_the_order_of_a_file(tmp_path: Path, tokenizer: DocumentTokenizer) -> None:
    texts = sentences(20, 0)
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    recipe = TextRecipe(sources=(SourceRecipe(path=str(path)),), n_tokens=16, shuffle_buffer=1)
    found = islice(documents_of(TextStream(recipe, tokenizer, seed=0)), 20)
    assert [decode(ids) for ids in found] == texts


def test_weights_are_shares_of_tokens(tmp_path: Path, tokenizer: DocumentTokenizer) -> None:
    weights, longest = (5.0, 2.0, 1.0), (3, 60, 12)
    sources = tuple(
        SourceRecipe(
            path=str(
                write_jsonl(tmp_path / f"{i}.jsonl", [{"text": f"{i} {t}"} for t in sentences(50, i, longest[i])])
            ),
            weight=weights[i],
        )
        for i in range(3)
    )
    stream = TextStream(TextRecipe(sources=tuple(sources), n_tokens=64), tokenizer, seed=0)
    tokens = [0, 0, 0]
    for ids in islice(documents_of(stream), 2000):
        tokens[int(decode(ids)[0])] += len(ids) + 1
    assert np.allclose(np.array(tokens) / sum(tokens), np.array(weights) / sum(weights), atol=0.005)


def test_held_out_documents_are_never_trained_on(corpus: TextRecipe, tokenizer: DocumentTokenizer) -> None:
    rows = held_out_rows(corpus, tokenizer)
    assert equal(rows, held_out_rows(corpus, tokenizer))
    kept = {tuple(ids) for ids in documents_of(iter(rows)) if ids}
    stream = TextStream(corpus, tokenizer, seed=0)
    trained = set()
    for ids in documents_of(stream):
        trained.add(tuple(ids))
        if min(stream.epochs.values()) == 2:
            break
    assert kept
    assert not kept & trained
    assert len(kept | trained) == 3 * 10 + 13


def test_the_last_held_out_row_is_filled_up_without_labels(corpus: TextRecipe, tokenizer: DocumentTokenizer) -> None:
    rows = held_out_rows(replace(corpus, n_tokens=1000, held_out_documents=2), tokenizer)
    last = rows[-1]
    n_filled = int((last.documents == last.documents[-1]).sum())
    assert set(last.ids[-n_filled:]) == {EOS}
    assert set(last.labels[-n_filled:]) == {IGNORED}
    assert sum(1 for ids in documents_of(iter(rows)) if ids) == 2


def test_a_held_out_part_that_is_empty_is_refused(corpus: TextRecipe, tokenizer: DocumentTokenizer) -> None:
    with pytest.raises(TrainError, match="held_out_one_in=100000 keeps no document"):
        held_out_rows(replace(corpus, held_out_one_in=100_000), tokenizer)


def test_an_empty_text_is_never_held_out(tmp_path: Path, tokenizer: DocumentTokenizer) -> None:
    one_in = next(n for n in range(2, 1000) if is_held_out(Document(""), n))
    texts = next([text] for text in sentences(9999, 0, longest=4) if is_held_out(Document(text), one_in))
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in ("", *texts)])
    recipe = TextRecipe(sources=(SourceRecipe(path=str(path)),), n_tokens=64, held_out_one_in=one_in)
    assert [decode(ids) for ids in documents_of(iter(held_out_rows(recipe, tokenizer))) if ids] == texts


def test_the_same_question_is_held_out_whatever_its_answer(tmp_path: Path, tokenizer: DocumentTokenizer) -> None:
    rows = [{"q": f"question {i}", "a": f"{answer}"} for i in range(40) for answer in range(3)]
    source = SourceRecipe(path=str(write_jsonl(tmp_path / "a.jsonl", rows)), prompt_field="q", answer_field="a")
    recipe = TextRecipe(sources=(source,), n_tokens=64, held_out_one_in=4, held_out_documents=1000)
    asked = [decode(ids).splitlines()[0] for ids in documents_of(iter(held_out_rows(recipe, tokenizer))) if ids]
    assert {asked.count(question) for question in asked} == {3}


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda recipe: replace(recipe, n_tokens=25), "settings"),
        (lambda recipe: replace(recipe, shuffle_buffer=5), "settings"),
        (lambda recipe: replace(recipe, sources=recipe.sources[:1]), "settings, names of files, sizes of files"),
        (lambda recipe: replace(recipe, sources=recipe.sources[::-1]), "settings, names of files, sizes of files"),
    ],
)
def test_a_place_in_other_text_is_refused(
    corpus: TextRecipe, tokenizer: DocumentTokenizer, change: Callable[[TextRecipe], TextRecipe], what: str
) -> None:
    state = TextStream(corpus, tokenizer, seed=0).state()
    with pytest.raises(TrainError, match=f"belongs to other text; what differs: {what}; bring back"):
        TextStream(change(corpus), tokenizer, seed=0).restore(state)
    with pytest.raises(TrainError, match="what differs: seed;"):
        TextStream(corpus, tokenizer, seed=1).restore(state)
    with pytest.raises(TrainError, match="what differs: tokenizer;"):
        TextStream(corpus, DocumentTokenizer(tokenizer_json(), bos=None, eos=EOS), seed=0).restore(state)


@pytest.mark.parametrize(
    "damage", [{"identity": "4f"}, {"done": -1}, {"done": "1"}, {"sources": []}, {"sources": [{}, {}]}, {"sources": 3}]
)
def test_a_damaged_place_is_refused(
    corpus: TextRecipe, tokenizer: DocumentTokenizer, damage: dict[str, object]
) -> None:
    stream = TextStream(corpus, tokenizer, seed=0)
    with pytest.raises(TrainError, match="is damaged"):
        stream.restore({**stream.state(), **damage})


def test_a_changed_file_is_noticed_and_a_moved_one_is_not(tmp_path: Path, tokenizer: DocumentTokenizer) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in sentences(20, 0)])
    recipe = TextRecipe(sources=(SourceRecipe(path=str(path)),), n_tokens=16)
    stream = TextStream(recipe, tokenizer, seed=0)
    next(stream)
    (tmp_path / "new").mkdir()
    moved = path.rename(tmp_path / "new" / "a.jsonl")
    recipe = replace(recipe, sources=(SourceRecipe(path=str(moved)),))
    TextStream(recipe, tokenizer, seed=0).restore(stream.state())
    moved.write_text(moved.read_text() + '{"text": "more"}\n')
    with pytest.raises(TrainError, match="what differs: sizes of files;"):
        TextStream(recipe, tokenizer, seed=0).restore(stream.state())


def test_a_run_that_met_a_bad_row_can_go_on_by_skipping_it(tmp_path: Path, tokenizer: DocumentTokenizer) -> None:
    good = [{"text": text} for text in sentences(20, 0)]
    path = write_jsonl(tmp_path / "a.jsonl", [*good[:10], {"text": 3}, *good[10:]])
    recipe = TextRecipe(sources=(SourceRecipe(path=str(path)),), n_tokens=16, shuffle_buffer=4)
    stream = TextStream(recipe, tokenizer, seed=0)
    rows: list[PackedRow] = []
    with pytest.raises(TrainError, match="line 11 has a field 'text' that is int, not text; pass over such rows"):
        rows.extend(stream)
    assert rows
    assert list(stream) == [], "nothing follows an error"
    skipping = TextStream(replace(recipe, on_bad_row=OnBadRow.SKIP), tokenizer, seed=0)
    skipping.restore(stream.state())
    wanted = TextStream(replace(recipe, on_bad_row=OnBadRow.SKIP), tokenizer, seed=0)
    assert equal([*rows, *islice(skipping, 30)], list(islice(wanted, len(rows) + 30)))
    assert skipping.skipped == {f"{path} (source 1)": skipping.epochs[f"{path} (source 1)"] + 1}


def test_nothing_heavy_is_imported_before_it_is_needed() -> None:
    program = (
        "import sys, localdepth_train.text.stream, localdepth_train.text.held_out\n"
        "print({'torch', 'pyarrow', 'datasets'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
