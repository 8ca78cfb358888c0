"""Files written piece by piece are what the safetensors package reads, whatever types they mix."""

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file

from localdepth.errors import ConfigError
from localdepth_train.checkpoint.safetensors_file import DTYPES, Pieces, write_safetensors

shapes = st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple)


def pieces(array: np.ndarray[Any, Any], n: int) -> Pieces:
    return Pieces(array.shape, array.dtype, lambda: np.array_split(array, min(n, len(array))))


@given(st.lists(st.tuples(shapes, st.sampled_from(sorted(DTYPES)), st.integers(1, 4)), max_size=6))
def test_what_is_written_in_pieces_is_read_whole(
    tmp_path_factory: pytest.TempPathFactory, items: list[tuple[tuple[int, ...], str, int]]
) -> None:
    rng, path = np.random.default_rng(0), tmp_path_factory.mktemp("s") / "m.safetensors"
    arrays = {f"ä{i}": rng.normal(size=shape).astype(DTYPES[dtype]) for i, (shape, dtype, _) in enumerate(items)}
    told: list[str] = []
    write_safetensors(path, {f"ä{i}": pieces(arrays[f"ä{i}"], n) for i, (*_, n) in enumerate(items)}, told.append)
    assert sorted(told) == sorted(arrays)
    got = load_file(path)
    assert set(got) == set(arrays)
    for name, array in arrays.items():
        assert got[name].dtype == array.dtype
        np.testing.assert_array_equal(got[name], array)
    with safe_open(path, framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}


def test_tensors_lie_aligned_for_their_type(tmp_path: Path) -> None:
    narrow, wide = np.ones(3, ml_dtypes.bfloat16), np.ones(2, np.float32)
    write_safetensors(tmp_path / "m", {"narrow": pieces(narrow, 1), "wide": pieces(wide, 1)}, lambda name: None)
    raw = (tmp_path / "m").read_bytes()
    assert raw.endswith(wide.tobytes() + narrow.tobytes())
    assert (len(raw) - wide.nbytes - narrow.nbytes) % 8 == 0


def test_pieces_that_do_not_fit_leave_no_file(tmp_path: Path) -> None:
    short = Pieces((3,), np.dtype(np.float32), lambda: [np.ones(2, np.float32)])
    with pytest.raises(ConfigError, match="a needs 12 bytes, its pieces have 8"):
        write_safetensors(tmp_path / "m", {"a": short}, lambda name: None)
    with pytest.raises(ConfigError, match="a has numbers of type float64; write one of"):
        write_safetensors(tmp_path / "m", {"a": pieces(np.ones(3), 1)}, lambda name: None)
    assert not list(tmp_path.iterdir())
