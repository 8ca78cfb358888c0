"""Expressions that published tokenizers bring are read; those that try too many ways are told apart before they run."""

import time

import pytest
from hypothesis import assume, given, reject, settings
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers

from localdepth.backtracking import MANY, count_ways

SECONDS = 1.0  # for a page of text, which bounded ways match in hundredths; a hostile expression takes minutes
LIMIT = 8 * MANY

PUBLISHED = {
    "gpt2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "llama3": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    "cl100k": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$"
    r"|\s*[\r\n]|\s+(?!\S)|\s",
    "o200k": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t)?|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "case apart": r"[^\r\n\p{L}\p{N}]?((?=[\p{L}])([^a-z]))*((?=[\p{L}])([^A-Z]))+(?:'[sS]|'[tT])?|\p{N}{1,3}",
    "deepseek": r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "digits from the right": r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))|\d{3}(?=(?:\d{3})*\b)",
    "words with marks": r"[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}|\s*[\r\n]|\s+(?!\S)|\s+",
    "spaces by powers of two": r"\s*[\r\n]+|\s{512}(?!\S)|\s{256}(?!\S)|\s{1,2}(?!\S)|\s{1}",
    "bloom": r" ?[^(\s|[.,!?…。，、।۔،])]+",
    "without han": r"[^\r\n\p{L}\p{N}&&[^\p{Han}]]?[\p{L}&&[^\p{Han}]]+|[\p{Han}]+",
    "normalizers": r"^\s+|\s+$| {2,}|(?<=\S) +(?=\S)",
}
HARMLESS = [
    "",
    "a",
    r"\x{20}+|\x41*",
    ".{1,4096}",
    "[]a-]+b",
    "[^]a[b]]+b",
    "a{b",
    "a{,}b",
    "(?<name>a)b",
    r"(?i)a*b|c",
    "(a+)+",
]
ENDLESS = [
    "(a+)+b",
    "(a|a)*b",
    "(a?)*b",
    "a*a*b",
    r"\s*\s*x",
    "(?:a?){30}b",
    "a?" * 30 + "b",
    "(?:(?:a{1,1000}){1,1000}){1,1000}b",
    "(?=(a+)+b)",
    "(?!a*a*b)",
    "(?>a*a*b)",
    "a+a++b",
    "a*(?=a*)b",
    "(?:a*(?:b|c)*)*d",
    "x(?i)a*|a*a*c",
    "(?:a{1,3}){1,100}b",
    "a{9,1}*b",
    "a**b",
    "(?:a+?)+?b",
    "a{1,90}a{1,90}b",
]
FOREIGN = [
    r"(a)\1",
    r"\g<0>",
    r"\k<n>",
    "(?~ab)",
    "(?x)a",
    "(?(1)a)",
    "(*FAIL)",
    "a{3}?",
    "(?{1})",
    "(a",
    "a)",
    "[a",
    "*a",
    "(",
]


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_expression_is_within_the_limit(name: str) -> None:
    assert count_ways(PUBLISHED[name]) <= 4 * MANY
    Regex(PUBLISHED[name])


@pytest.mark.parametrize("pattern", HARMLESS)
def test_a_harmless_expression_is_within_the_limit(pattern: str) -> None:
    assert count_ways(pattern) <= MANY
    Regex(pattern)


@pytest.mark.parametrize("pattern", ENDLESS)
def test_an_expression_with_too_many_ways_is_known(pattern: str) -> None:
    assert count_ways(pattern) > LIMIT
    Regex(pattern)


@pytest.mark.parametrize("pattern", FOREIGN)
def test_what_tokenizers_do_not_need_is_no_expression(pattern: str) -> None:
    with pytest.raises(ValueError, match=r"bracket|class|place"):
        count_ways(pattern)


def test_deep_nesting_is_an_error_of_python() -> None:
    with pytest.raises(RecursionError):
        count_ways("(" * 5000 + ")" * 5000)


def patterns() -> st.SearchStrategy[str]:
    """Expressions over a and b, rich in repetitions."""
    repeats = st.sampled_from(["", "", "*", "+", "?", "*?", "+?", "++", "{2}", "{1,3}", "{0,9}", "{3,}", "{,4}"])
    atoms = st.sampled_from(["a", "b", ".", "[ab]", r"\w", "^", r"\b"])
    return st.recursive(
        st.tuples(atoms, repeats).map("".join),
        lambda inner: st.one_of(
            st.lists(inner, min_size=2, max_size=4).map("".join),
            st.tuples(inner, inner).map(lambda two: f"(?:{two[0]}|{two[1]})"),
            st.tuples(st.sampled_from(["(?:", "(", "(?=", "(?!", "(?>"]), inner, repeats).map(
                lambda three: f"{three[0]}{three[1]}){three[2]}"
            ),
        ),
        max_leaves=8,
    )


@settings(max_examples=100, deadline=None)
@given(patterns().map("{}c".format))
def test_an_expression_within_the_limit_ends_soon(pattern: str) -> None:
    assume(count_ways(pattern) <= LIMIT)
    try:
        splitter = pre_tokenizers.Split(Regex(pattern), "isolated")
    except Exception:  # the library knows no better class; it refuses to repeat an anchor
        reject()
    for page in ("a" * 2000, "ab" * 1000, "aab" * 600):
        start = time.thread_time()
        splitter.pre_tokenize_str(page + "!c")
        assert time.thread_time() - start < SECONDS


def test_what_the_limit_is_for() -> None:
    with pytest.raises(BaseException, match="retry-limit"):  # a panic of the library, whose class cannot be imported
        pre_tokenizers.Split(Regex("(a+)+b"), "isolated").pre_tokenize_str("a" * 100 + "!b")
