"""The head of a model card, in the spellings that are in circulation, and the licence it names."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localdepth_export.tokenizer_record import read_license
from localdepth_train.checkpoint import Checkpoint, front_matter
from tests.published import make_checkpoint


@pytest.mark.parametrize(
    ("card", "fields", "license_name"),
    [
        (b"---\nlicense: mit\ntags:\n- a\n- b\n---\ntext", {"license": " mit", "tags": "\n- a\n- b"}, "mit"),
        (b"---\r\nlicense: mit\r\nlanguage: en\r\n---\r\n", {"license": " mit", "language": " en"}, "mit"),
        (b"---\nlicense:\n- mit\n- apache-2.0\n---\n", {"license": "\n- mit\n- apache-2.0"}, "mit, apache-2.0"),
        (b"---\nlicense: [mit, bsd]\n---\n", {"license": " [mit, bsd]"}, "mit, bsd"),
        (b"\xef\xbb\xbf---\nlicense: mit\n---\n", {"license": " mit"}, "mit"),
        (b"--- \nlicense: 'mit'  # free\n---", {"license": " 'mit'  # free"}, "mit"),
        (b"---\nlicense: mit\n---\nna\xefve", {"license": " mit"}, "mit"),
        (b"---\nlicense_name: llama3.2\n\nx: |\n  license: y\n---\n", None, "llama3.2"),
        (b"---\n---\nlicense: mit", {}, None),
        (b"---\nlicense:\n---\n", {"license": ""}, None),
        (b"---\nlicense: mit\n", {}, None),
        (b"license: mit", {}, None),
        (b"", {}, None),
    ],
)
def test_the_licence_is_found_however_a_card_is_written(
    card: bytes, fields: dict[str, str] | None, license_name: str | None, tmp_path: Path
) -> None:
    if fields is not None:
        assert front_matter(card) == fields
    make_checkpoint(tmp_path, "retrofit_llama")
    (tmp_path / "README.md").write_bytes(card)
    assert read_license(Checkpoint(tmp_path)) == license_name


@given(st.binary(max_size=60) | st.text("-\nlicense: []#\r\ufeff", max_size=60).map(str.encode))
def test_any_bytes_are_a_card(card: bytes) -> None:
    assert all(key for key in front_matter(card))
