"""A tokenizer or chat template out of a file cannot take the machine's time or memory, whatever it holds."""

import base64
import json
import struct
from collections.abc import Callable, Iterator
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from localdepth.errors import ModelFileError
from localdepth.tokenizer import Tokenizer
from tests.conftest import tokenizer_json
from tests.victim import Victim

SECONDS = 5.0  # of one file; what is allowed takes a second, what the limits are for takes minutes


@pytest.fixture(scope="module")
def victim() -> Iterator[Victim]:
    with Victim(SECONDS) as process:
        yield process


# --- tokenizers -------------------------------------------------------------------------------------------------------

Change = Callable[[dict[str, Any]], object]
WORDS = {"type": "WordLevel", "vocab": {"<unk>": 0, "a": 1}, "unk_token": "<unk>"}


def record(change: Change) -> str:
    """A tokenizer of two words, changed."""
    made: dict[str, Any] = {"version": "1.0", "added_tokens": [], "model": dict(WORDS)}
    made |= dict.fromkeys(("normalizer", "pre_tokenizer", "post_processor", "decoder"))
    change(made)
    return json.dumps(made)


def steps(part: str, *listed: dict[str, Any]) -> Change:
    key = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "decoder": "decoders"}[part]
    return lambda made: made.update({part: {"type": "Sequence", key: list(listed)}})


def split(expression: str) -> Change:
    return steps(
        "pre_tokenizer",
        {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False},
    )


def added(contents: list[str], special: bool = False) -> Change:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tokens = [{"id": 2 + i, "content": content, "special": special, **flags} for i, content in enumerate(contents)]
    return lambda made: made.update(added_tokens=tokens)


def model(**settings: Any) -> Change:
    return lambda made: made.update(model=settings)


def swap(old: str, new: str, *, regex: bool = False) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"Regex" if regex else "String": old}, "content": new}


def charsmap(longest: int) -> dict[str, Any]:
    raw = struct.pack("<I", 1024) + bytes(1024) + b"x" * longest + b"\0"
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(raw).decode()}


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
LOWER = {"type": "Lowercase"}
REFUSED: dict[str, tuple[Change, str]] = {
    "ways without end": (split("(a+)+b"), "too many ways"),
    "ways to the third": (split(r"\s*\s*c"), "too many ways"),
    "ways in a normalizer": (steps("normalizer", swap("(a|a)*c", "", regex=True)), "too many ways"),
    "ways in a decoder": (steps("decoder", swap("(a|aa)+c", "", regex=True)), "too many ways"),
    "recursion": (split(r"(?<x>a\g<x>?)"), "no place"),
    "long expression": (split("|".join(["x" * 50] * 20_000)), "over 16384"),
    "deep expression": (split("(" * 7000 + ")" * 7000), "recursion"),
    "replacement of nothing": (steps("normalizer", swap("", "a" * 100, regex=True)), "100 times longer"),
    "replacements in a row": (steps("normalizer", *[swap("a", "aaa")] * 6), "729 times longer"),
    "bytes of bytes": (steps("normalizer", *[BYTES] * 30), "times longer"),
    "bytes of words": (steps("pre_tokenizer", *[BYTES] * 30), "times longer"),
    "both kinds of bytes": (
        lambda made: [steps(part, *[BYTES] * 4)(made) for part in ("normalizer", "pre_tokenizer")],
        "times longer",
    ),
    "long prepended": (steps("normalizer", *[{"type": "Prepend", "prepend": "a" * 500_000}] * 20), "over 16384"),
    "long map": (steps("normalizer", charsmap(100_000)), "times longer"),
    "thousands of steps": (steps("normalizer", *[LOWER] * 20_000), "over 64"),
    "deep steps": (
        lambda made: made.update(
            normalizer=reduce(lambda a, _: {"type": "Sequence", "normalizers": [a]}, range(90), LOWER)
        ),
        "over 64",
    ),
    "long added tokens": (added([str(i) + "x" * 100_000 for i in range(50)]), "over 4194304"),
    "thousands of control tokens": (added([f"<{i}>" for i in range(20_000)], special=True), "over 16384"),
    "long words": (
        model(type="WordPiece", vocab={"a": 0, "##a": 1}, unk_token="a", max_input_chars_per_word=10**9),
        "over 1024",
    ),
    "long prefix": (
        model(type="WordPiece", vocab={"a": 0}, unk_token="a", continuing_subword_prefix="#" * 10**6),
        "over 16384",
    ),
    "long words without a type": (model(vocab={"a": 0}, unk_token="a", max_input_chars_per_word=10**9), "over 1024"),
    "long pieces without a type": (model(unk_id=0, vocab=[["a" * 1500, -1.0]]), "over 1024"),
    "long pieces": (model(type="Unigram", unk_id=0, vocab=[["a" * i, -1.0] for i in range(1500)]), "over 1024"),
    "huge id": (model(**{**WORDS, "vocab": {"<unk>": 0, "a": 1 << 31}}), "do not fit"),
    "huge number": (lambda made: made["model"].update(vocab={"<unk>": 0, "a": 10**4000}), "cannot be read"),
    "infinite number": (model(type="Unigram", unk_id=0, vocab=[["a", float("inf")]]), "cannot be read"),
    "foreign model": (model(type="None"), "cannot be read"),
}
USED: dict[str, Change] = {
    "many added tokens": added([f"<{i}>" for i in range(50_000)]),
    "equal added tokens": added(["<a>"] * 50_000),
    "empty added token": added(["", "\0", " "], special=True),
    "added tokens inside others": added(["a" * i for i in range(1, 1000)]),
    "long loops": split("(?:[a-z]){100,100000}"),
    "published expression": split(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+(?!\S)|\s+"),
    "every kind of form": steps("normalizer", *[{"type": form} for form in ("NFKD", "NFKC", "NFD", "NFC")] * 8),
    "nothing stripped": steps("decoder", {"type": "Strip", "content": "a", "start": 1 << 40, "stop": 1 << 40}),
    "half a byte": model(type="BPE", vocab={"<0xF0>": 0, "<0xZZ>": 1, "<0x9F>": 2}, merges=[], byte_fallback=True),
    "long suffix": model(type="BPE", vocab={"a": 0}, merges=[], end_of_word_suffix="x" * 10_000),
    "pieces of every length": model(type="Unigram", unk_id=0, vocab=[["a" * i, -1.0] for i in range(1, 500)]),
    "long chunks": steps("pre_tokenizer", {"type": "FixedLength", "length": 1 << 60}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_hostile_tokenizer_is_refused(name: str) -> None:
    change, rule = REFUSED[name]
    with pytest.raises(ModelFileError, match=rule):
        Tokenizer.from_json(record(change), n_vocab=1 << 16, bos=None, eos=(), add_bos=False)


@pytest.mark.parametrize("name", USED)
def test_a_strange_tokenizer_does_no_harm(victim: Victim, tmp_path: Path, name: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(record(USED[name]))
    outcome = victim.use(path)
    assert outcome.harmless, outcome


def test_a_tokenizer_larger_than_its_model_is_refused_before_it_is_built() -> None:
    vocab = {f"t{i}": i for i in range(200_000)}
    with pytest.raises(ModelFileError, match="200000 tokens of the tokenizer do not fit a model of 1000"):
        Tokenizer.from_json(record(model(**{**WORDS, "vocab": vocab})), n_vocab=1000, bos=None, eos=(), add_bos=False)


JUNK = st.one_of(
    st.sampled_from([None, True, -1, 0, 1 << 31, 1 << 64, 1e308, "", "a", "(", "a*", {}, [], [[]], {"Regex": "a*a*c"}]),
    st.sampled_from(["Sequence", "Replace", "Split", "ByteLevel", "Strip", "NFKC", "Prepend", "BPE", "WordPiece"]),
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=5),
)


def places(node: Any) -> Iterator[tuple[Any, Any]]:
    """Every value of a record, as what holds it and under which key."""
    for key in list(node) if isinstance(node, dict) else range(len(node)):
        yield node, key
        if isinstance(node[key], dict | list):
            yield from places(node[key])


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_a_damaged_tokenizer_is_used_or_refused(victim: Victim, tmp_path_factory: Any, data: st.DataObject) -> None:
    made = json.loads(tokenizer_json())
    made["normalizer"] = {"type": "Sequence", "normalizers": [LOWER, swap(" ", "_"), {"type": "NFC"}]}
    made["model"]["vocab"] = dict(list(made["model"]["vocab"].items())[:40])
    made["model"]["merges"] = made["model"]["merges"][:5]
    for _ in range(data.draw(st.integers(1, 4))):
        node, key = data.draw(st.sampled_from(list(places(made))))
        node[key] = data.draw(JUNK)
    path = tmp_path_factory.getbasetemp() / "damaged.json"
    path.write_text(json.dumps(made))
    outcome = victim.use(path)
    assert outcome.harmless, outcome


# --- chat templates ---------------------------------------------------------------------------------------------------

VALUES = [
    "messages",
    "m",
    "s",
    "ns.x",
    "l",
    "1",
    "-1",
    "10**9",
    "1.5",
    "''",
    "'a'",
    "none",
    "true",
    "[]",
    "{}",
    "r",
    "f",
]
FILTERS = [
    "length",
    "list",
    "upper",
    "join",
    "join('x')",
    "sort",
    "unique",
    "reverse",
    "tojson",
    "string",
    "int",
    "trim",
]
FILTERS += ["map('upper')", "map(attribute='content')", "select('in', l)", "reject('none')", "indent(1000)", "first"]
FILTERS += ["replace('a', 'aaaa')", "replace('', s)", "tojson(indent=s)", "items", "dictsort", "max", "title", "float"]
NAMES = ["content", "x", "__class__", "__init__", "split('a')", "strip(s)", "rfind(s)", "join(l)", "replace('a', s)"]
NAMES += ["items()", "copy()", "format(1)", "center(10**9)", "append(1)", "gi_frame", "__globals__", "count('a')"]


def expressions() -> st.SearchStrategy[str]:
    def around(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
        return st.one_of(
            st.tuples(
                inner, st.sampled_from(["+", "-", "*", "/", "//", "%", "**", "~", "==", "<", "in", "and"]), inner
            ).map(lambda three: f"({three[0]} {three[1]} {three[2]})"),
            st.tuples(inner, st.sampled_from(FILTERS)).map(lambda two: f"({two[0]}|{two[1]})"),
            st.tuples(inner, st.sampled_from(NAMES)).map(lambda two: f"{two[0]}.{two[1]}"),
            st.tuples(inner, inner).map(lambda two: f"{two[0]}[{two[1]}]"),
            st.tuples(inner, inner).map(lambda two: f"[{two[0]}, {two[1]}]"),
            st.tuples(inner, inner).map(lambda two: f"f({two[0]}, {two[1]})"),
            inner.map(lambda one: f"range({one})"),
            inner.map(lambda one: f"({one} * 1000)"),
        )

    return st.recursive(st.sampled_from(VALUES), around, max_leaves=6)


def statements() -> st.SearchStrategy[str]:
    def around(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
        return st.one_of(
            st.lists(inner, min_size=2, max_size=3).map("".join),
            st.tuples(expressions(), inner).map(lambda two: f"{{% for m in {two[0]} %}}{two[1]}{{% endfor %}}"),
            st.tuples(expressions(), inner).map(lambda two: f"{{% if {two[0]} %}}{two[1]}{{% endif %}}"),
            inner.map(lambda body: f"{{% set s %}}{body}{{% endset %}}"),
            inner.map(lambda body: f"{{% for m in range(100) %}}{body}{{% endfor %}}"),
            inner.map(lambda body: f"{{% macro f(a, b) %}}{body}{{% endmacro %}}"),
            inner.map(lambda body: f"{{% filter replace('a', 'aa') %}}{body}{{% endfilter %}}"),
        )

    leaf = st.one_of(
        expressions().map(lambda one: f"{{{{ {one} }}}}"),
        expressions().map(lambda one: f"{{% set ns.x = {one} %}}"),
        st.sampled_from(
            ["{% set ns.x = ns.x + ns.x %}", "{% set l = l + l %}", "{% set s = s ~ s %}", "{{ f(s, l) }}"]
        ),
    )
    return st.recursive(leaf, around, max_leaves=5)


START = "{% set ns = namespace(x='a') %}{% set s = 'ab' * 1000 %}{% set l = ['a', 1, 'b'] %}{% set r = range(9999) %}"
START += "{% macro f(a, b) %}{{ a }}{{ caller() if caller }}{% endmacro %}"


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(body=statements())
def test_any_template_ends_soon_in_a_text_or_an_error(victim: Victim, tmp_path_factory: Any, body: str) -> None:
    path = tmp_path_factory.getbasetemp() / "any.jinja"
    path.write_text(START + body)
    outcome = victim.use(path)
    assert outcome.harmless, outcome
