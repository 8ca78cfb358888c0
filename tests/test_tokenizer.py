"""Encoding, streaming decoding and stop strings, on tokenizers trained here and on published ones."""

import json
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from localdepth.errors import LocalDepthError, ModelFileError, PromptError, SamplingError
from localdepth.tokenizer import StopStrings, Tokenizer

CORPUS = [
    "The quick brown fox jumps over the lazy dog. How quickly daft jumping zebras vex!",
    "Naïve façade, crème brûlée — 東京と大阪 😀 👩‍👩‍👧 the end.",
    "one two three four five six seven eight nine ten",
] * 3
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
BOS, END = "<s>", "<|end|>"


def byte_level_json() -> str:
    """GPT-2 style: every byte is a character of the vocabulary."""
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=[BOS, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(CORPUS, trainer)
    return library.to_str()


def byte_fallback_json() -> str:
    """Llama style: words begin with ▁, unknown characters fall back to bytes, one leading space is stripped."""
    library = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    library.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>", BOS, END, *BYTES], show_progress=False)
    library.train_from_iterator(CORPUS[::3] + CORPUS[2::3], trainer)
    record = json.loads(library.to_str())
    record["model"]["byte_fallback"] = True
    record["added_tokens"] = record["added_tokens"][:3]  # byte tokens are ordinary
    return json.dumps(record)


def word_level_json() -> str:
    """One token for each word, joined with spaces; the vocabulary spells its own control tokens."""
    library = tokenizers.Tokenizer(models.WordLevel(unk_token="<unk>"))
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.WordLevelTrainer(vocab_size=64, special_tokens=["<unk>", BOS, END], show_progress=False)
    library.train_from_iterator(CORPUS, trainer)
    return library.to_str()


def word_piece_json() -> str:
    """BERT style: pieces inside a word begin with ##, punctuation loses the space before it."""
    library = tokenizers.Tokenizer(models.WordPiece(unk_token="<unk>"))
    library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    library.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=120, special_tokens=["<unk>", BOS, END], show_progress=False)
    library.train_from_iterator(CORPUS, trainer)
    return library.to_str()


def unigram_json() -> str:
    """T5 style."""
    library = tokenizers.Tokenizer(models.Unigram())
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    library.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=100, special_tokens=["<unk>", BOS, END], unk_token="<unk>", show_progress=False
    )
    library.train_from_iterator(CORPUS, trainer)
    return library.to_str()


JSON = {
    "byte level": byte_level_json(),
    "byte fallback": byte_fallback_json(),
    "word level": word_level_json(),
    "word piece": word_piece_json(),
    "unigram": unigram_json(),
}
LIBRARY = {kind: tokenizers.Tokenizer.from_str(text) for kind, text in JSON.items()}


def id_of(library: tokenizers.Tokenizer, token: str) -> int:
    token_id = library.token_to_id(token)
    assert token_id is not None
    return token_id


def load(text: str, *, n_vocab: int = 512, add_bos: bool = False) -> Tokenizer:
    library = tokenizers.Tokenizer.from_str(text)
    return Tokenizer.from_json(
        text, n_vocab=n_vocab, bos=id_of(library, BOS), eos=(id_of(library, END),), add_bos=add_bos
    )


TOKENIZER = {kind: load(text) for kind, text in JSON.items()}
every_kind = pytest.mark.parametrize("kind", JSON)
lossless = pytest.mark.parametrize("kind", ["byte level", "byte fallback"])


@pytest.fixture(params=["byte level", "byte fallback"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return TOKENIZER[request.param]


def streamed(tokenizer: Tokenizer, ids: list[int], *, skip_special: bool = True) -> str:
    decoder = tokenizer.decoder(skip_special=skip_special)
    return "".join([*map(decoder.push, ids), decoder.flush()])


def edited(change: Callable[[dict[str, Any]], object], kind: str = "byte level") -> str:
    record = json.loads(JSON[kind])
    change(record)
    return json.dumps(record)


# --- encoding ---------------------------------------------------------------------------------------------------------


@lossless
@given(text=st.text())
@settings(deadline=None)
def test_any_text_survives_encoding_and_decoding(kind: str, text: str) -> None:
    tokenizer = TOKENIZER[kind]
    assert tokenizer.decode(tokenizer.encode(text)) == text


@every_kind
@given(text=st.text(alphabet="the quick.brown,fox é😀", max_size=30))
@settings(deadline=None)
def test_ids_are_the_librarys(kind: str, text: str) -> None:
    assert TOKENIZER[kind].encode(text) == LIBRARY[kind].encode(text, add_special_tokens=False).ids


def test_control_tokens_in_plain_text_stay_text(tokenizer: Tokenizer) -> None:
    text = f"hi{END}there{BOS}"
    ids = tokenizer.encode(text)
    assert not any(map(tokenizer.is_control, ids))
    assert tokenizer.decode(ids) == text


def test_control_tokens_in_a_rendered_template_are_read(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(f"hi{END}", special=True)
    assert tokenizer.is_eos(ids[-1])
    assert tokenizer.is_control(ids[-1])
    assert tokenizer.token(ids[-1]) == END


@pytest.mark.parametrize("kind", ["word level", "unigram"])
def test_control_token_spelled_by_the_vocabulary_is_refused(kind: str) -> None:
    with pytest.raises(PromptError, match="control token"):
        TOKENIZER[kind].encode(f"one two {END} three")
    assert TOKENIZER[kind].encode("one two ☃ three")  # an unknown character is no forgery


@every_kind
def test_bos_comes_once(kind: str) -> None:
    library = tokenizers.Tokenizer.from_str(JSON[kind])
    bos = id_of(library, BOS)
    library.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, bos)])
    tokenizer = load(library.to_str(), add_bos=True)
    plain = TOKENIZER[kind].encode("one two")
    assert tokenizer.encode("one two") == [bos, *plain]
    assert tokenizer.encode(f"{BOS}one", special=True).count(bos) == 1
    assert tokenizer.encode("") == [bos]


def test_lone_surrogate_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(PromptError, match="surrogate"):
        tokenizer.encode("caf\udce9")


def test_text_of_another_type_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(PromptError, match="bytes"):
        tokenizer.encode(b"hello")  # type: ignore[arg-type]


def test_text_without_ids_is_refused() -> None:
    def forget_unknown(record: dict[str, Any]) -> None:
        del record["model"]["vocab"]["<unk>"]
        record["added_tokens"] = record["added_tokens"][1:]

    tokenizer = load(edited(forget_unknown, "word level"))
    with pytest.raises(PromptError, match="reword"):
        tokenizer.encode("zebra-crossing")


def test_file_cannot_cut_pad_or_randomise_a_prompt() -> None:
    def meddle(record: dict[str, Any]) -> None:
        record["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
        record["padding"] = {
            "strategy": {"Fixed": 1000},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": BOS,
        }
        record["model"]["dropout"] = 0.9

    text = "The quick brown fox jumps over the lazy dog."
    assert load(edited(meddle)).encode(text) == TOKENIZER["byte level"].encode(text)


def test_threads_do_not_see_each_others_mode(tokenizer: Tokenizer) -> None:
    wrong: list[bool] = []

    def encode_often(special: bool) -> None:
        for _ in range(300):
            ids = tokenizer.encode(f"x{END}", special=special)
            wrong.append(any(map(tokenizer.is_control, ids)) != special)

    threads = [threading.Thread(target=encode_often, args=(special,)) for special in (True, False) * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not any(wrong)


# --- decoding ---------------------------------------------------------------------------------------------------------


@every_kind
@given(data=st.data(), skip_special=st.booleans())
@settings(max_examples=150, deadline=None)
def test_stream_joined_equals_decode_of_any_ids(kind: str, data: st.DataObject, skip_special: bool) -> None:
    ids = data.draw(st.lists(st.integers(0, 511), max_size=40))
    tokenizer = TOKENIZER[kind]
    assert streamed(tokenizer, ids, skip_special=skip_special) == tokenizer.decode(ids, skip_special=skip_special)


@pytest.mark.parametrize("kind", [kind for kind in JSON if kind != "byte fallback"])
@given(data=st.data(), skip_special=st.booleans())
@settings(max_examples=150, deadline=None)
def test_decode_of_any_ids_is_the_librarys(kind: str, data: st.DataObject, skip_special: bool) -> None:
    ids = data.draw(st.lists(st.integers(0, 511), max_size=40))
    expected = LIBRARY[kind].decode(ids, skip_special_tokens=skip_special)
    assert TOKENIZER[kind].decode(ids, skip_special=skip_special) == expected


@given(texts=st.lists(st.text(), max_size=5), skip_special=st.booleans())
@settings(deadline=None)
def test_byte_fallback_decodes_whole_characters_like_the_library(texts: list[str], skip_special: bool) -> None:
    tokenizer, library = TOKENIZER["byte fallback"], LIBRARY["byte fallback"]
    ids = [i for text in texts for i in (*tokenizer.encode(text), *tokenizer.encode(END, special=True))]
    expected = library.decode(ids, skip_special_tokens=skip_special)
    assert tokenizer.decode(ids, skip_special=skip_special) == expected


@given(data=st.binary(max_size=30))
@settings(deadline=None)
def test_byte_fallback_decodes_broken_bytes_like_python(data: bytes) -> None:
    tokenizer, library = TOKENIZER["byte fallback"], LIBRARY["byte fallback"]
    ids = [id_of(library, BYTES[byte]) for byte in data]
    assert tokenizer.decode(ids) == data.decode(errors="replace").removeprefix(" ")


def test_emoji_appears_with_its_last_byte(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("🦜")
    decoder = tokenizer.decoder()
    shown = [decoder.push(i) for i in ids]
    assert len(ids) > 1
    assert set(shown[:-1]) == {""}
    assert shown[-1] == "🦜"
    assert decoder.flush() == ""


def test_stream_never_shows_half_a_character(tokenizer: Tokenizer) -> None:
    decoder = tokenizer.decoder()
    assert "\ufffd" not in "".join(map(decoder.push, tokenizer.encode("naïve 東京 👩‍👩‍👧 🦜" * 3)))


def test_leading_space_is_stripped_once() -> None:
    tokenizer = TOKENIZER["byte fallback"]
    ids = tokenizer.encode("the end")
    assert tokenizer.decode(ids + ids) == "the end the end"
    assert tokenizer.decode([tokenizer.encode(END, special=True)[-1], *ids]) == "the end"


@lossless
def test_garbage_bytes_are_held_back_for_three_bytes_at_most(kind: str) -> None:
    tokenizer, library = TOKENIZER[kind], LIBRARY[kind]
    continuation = id_of(library, "<0x80>" if kind == "byte fallback" else "Ģ")
    lead = id_of(library, "<0xF0>" if kind == "byte fallback" else "ð")
    decoder = tokenizer.decoder()
    assert [decoder.push(continuation) for _ in range(100)] == ["\ufffd"] * 100
    assert "".join(decoder.push(lead) for _ in range(100)) == "\ufffd" * 99
    assert decoder.flush() == "\ufffd"


def test_unfinished_character_is_flushed(tokenizer: Tokenizer) -> None:
    decoder = tokenizer.decoder()
    assert "".join(map(decoder.push, tokenizer.encode("ok 🦜")[:-1])) == "ok "
    assert decoder.flush() == "\ufffd"
    assert decoder.flush() == ""


def test_control_tokens_show_only_on_demand(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(f"hi{END}", special=True)
    assert tokenizer.decode(ids) == "hi"
    assert tokenizer.decode(ids, skip_special=False) == f"hi{END}"


def test_hole_in_the_vocabulary_decodes_to_nothing(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode([511]) == ""
    assert tokenizer.token(511) == ""


@pytest.mark.parametrize("token_id", [-1, 512, 1 << 40])
def test_id_outside_the_vocabulary_is_refused(tokenizer: Tokenizer, token_id: int) -> None:
    with pytest.raises(PromptError, match=r"0\.\.511"):
        tokenizer.decode([token_id])


# --- files that cannot be trusted -------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", "7", "\x00", "[" * 100_000, '{"a":' * 10_000, "\ud800"])
def test_what_is_no_tokenizer_is_refused(text: str) -> None:
    with pytest.raises(ModelFileError, match="export the model again"):
        Tokenizer.from_json(text, n_vocab=512, bos=None, eos=(), add_bos=False)


def test_id_beyond_the_model_is_refused() -> None:
    with pytest.raises(ModelFileError, match="do not fit a model of 339 tokens"):
        load(JSON["byte level"], n_vocab=339)
    load(JSON["byte level"], n_vocab=340)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bos": 512}, "bos=512"),
        ({"bos": -1}, "bos=-1"),
        ({"eos": (1, 600)}, "eos=600"),
        ({"add_bos": True}, "names none"),
    ],
)
def test_impossible_control_ids_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelFileError, match=message):
        Tokenizer.from_json(JSON["byte level"], **{"n_vocab": 512, "bos": None, "eos": (), "add_bos": False, **options})


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("normalizer", {"type": "Precompiled", "precompiled_charsmap": "AAAA"}),  # a panic inside the library
        ("pre_tokenizer", {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}),
        ("decoder", {"type": "CTC", "pad_token": "x", "word_delimiter_token": "|", "cleanup": True}),
        ("decoder", {"type": "BPEDecoder", "suffix": "</w>"}),
        ("model", {"type": "WordLevel", "unk_token": "x", "vocab": {}}),
        (
            "model",  # would abort the process
            {
                "type": "BPE",
                "continuing_subword_prefix": "x",
                "vocab": {"a": 0, "é": 1, "aé": 2},
                "merges": [["a", "é"]],
            },
        ),
        (
            "normalizer",  # a text of 50 characters would grow to 5 GB
            {
                "type": "Sequence",
                "normalizers": [{"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10}] * 8,
            },
        ),
    ],
)
def test_hostile_part_is_refused(part: str, value: dict[str, Any]) -> None:
    def replace_part(record: dict[str, Any]) -> None:
        record[part] = value
        record["added_tokens"] = []

    with pytest.raises(ModelFileError):
        Tokenizer.from_json(edited(replace_part), n_vocab=512, bos=None, eos=(), add_bos=False)


def test_panic_while_encoding_is_a_prompt_error() -> None:
    tokenizer = load(edited(lambda record: record.update(pre_tokenizer={"type": "FixedLength", "length": 0})))
    with pytest.raises(PromptError, match="chunk size"):
        tokenizer.encode("hello")


def test_panic_while_decoding_is_a_file_error() -> None:
    tokenizer = load(
        edited(lambda record: record.update(decoder={"type": "Strip", "content": "e", "start": 3, "stop": 3}))
    )
    with pytest.raises(ModelFileError, match="cannot decode"):
        tokenizer.decode(tokenizer.encode("e"))


def _places(node: Any) -> Iterator[tuple[Any, Any]]:
    for key in list(node) if isinstance(node, dict) else range(len(node)):
        yield node, key
        if isinstance(node[key], dict | list):
            yield from _places(node[key])


@every_kind
def test_damaged_json_never_escapes_our_errors(kind: str) -> None:
    rng = random.Random(7)
    junk = [None, -1, 1 << 40, "", "x", [], {}, True, 0.5, [["a", "b"]], {"type": "Fuse"}]
    for _ in range(60):
        record = json.loads(JSON[kind])
        for _ in range(rng.randint(1, 3)):
            node, key = rng.choice([place for place in _places(record) if rng.random() < 0.1] or [(record, "decoder")])
            node[key] = rng.choice(junk)
        try:
            tokenizer = Tokenizer.from_json(json.dumps(record), n_vocab=512, bos=None, eos=(), add_bos=False)
            tokenizer.decode(tokenizer.encode("The quick 🦜"))
        except LocalDepthError:
            pass


# --- published tokenizers ---------------------------------------------------------------------------------------------


def test_published_tokenizers_round_trip(fixtures: Path) -> None:
    paths = sorted((fixtures / "data" / "weights").glob("*/tokenizer.json"))
    assert paths
    for path in paths:
        text = path.read_text(encoding="utf-8")
        library = tokenizers.Tokenizer.from_str(text)
        size = library.get_vocab_size()
        tokenizer = Tokenizer.from_json(text, n_vocab=size, bos=1, eos=(1, 2), add_bos=True)
        story = "Once upon a time there was a little girl.\nShe said hi."
        ids = tokenizer.encode(story)
        assert ids == library.encode(story).ids
        assert streamed(tokenizer, ids) == tokenizer.decode(ids) == library.decode(ids)
        rng = random.Random(0)
        valid = [i for i in range(size) if not (library.id_to_token(i) or "").startswith("<0x")]
        for _ in range(20):
            ids = rng.choices(valid, k=30)
            assert streamed(tokenizer, ids) == library.decode(ids)


# --- stop strings -----------------------------------------------------------------------------------------------------


def cut(text: str, stops: list[str]) -> tuple[str, bool]:
    """The definition: grow the text by characters until it ends with a stop string."""
    for end in range(1, len(text) + 1):
        if ending := [stop for stop in stops if text[:end].endswith(stop)]:
            return text[: end - max(map(len, ending))], True
    return text, False


@given(
    chunks=st.lists(st.text(alphabet="abé", max_size=6), max_size=12),
    stops=st.lists(st.text(alphabet="abé", min_size=1, max_size=5), max_size=4),
)
@settings(max_examples=400, deadline=None)
def test_stop_strings_cut_where_the_joined_text_first_ends_with_one(chunks: list[str], stops: list[str]) -> None:
    matcher = StopStrings(stops)
    parts, hits = zip(*map(matcher.push, chunks), strict=True) if chunks else ((), ())
    assert ("".join(parts) + matcher.flush(), any(hits)) == cut("".join(chunks), stops)
    assert list(hits) == sorted(hits)  # once found, always found


@given(
    text=st.text(alphabet="ab", max_size=30),
    stops=st.lists(st.text(alphabet="ab", min_size=1, max_size=6), max_size=3),
)
@settings(deadline=None)
def test_stop_strings_hold_back_only_a_possible_beginning(text: str, stops: list[str]) -> None:
    shown, hit = StopStrings(stops).push(text)
    if not hit:
        held = text.removeprefix(shown)
        assert not held or any(stop.startswith(held) for stop in stops)


def test_stop_string_split_over_pushes_is_found() -> None:
    matcher = StopStrings(["\nUser:"])
    assert [matcher.push(part) for part in ("Hi.", "\n", "Use", "r: x")] == [
        ("Hi.", False),
        ("", False),
        ("", False),
        ("", True),
    ]
    assert matcher.push("more") == ("", True)
    assert matcher.flush() == ""


def test_text_that_only_looked_like_a_stop_string_is_returned() -> None:
    matcher = StopStrings(["###"])
    assert matcher.push("a##") == ("a", False)
    assert matcher.push("b#") == ("##b", False)
    assert matcher.flush() == "#"


def test_longest_of_the_stop_strings_ending_together_wins() -> None:
    assert StopStrings(["c", "bc", "d"]).push("abcd") == ("a", True)


@pytest.mark.parametrize("stops", ["stop", [""], ["a", ""], [b"a"], [None], None, 3])
def test_impossible_stop_strings_are_refused(stops: Any) -> None:
    with pytest.raises(SamplingError, match="stop="):
        StopStrings(stops)
