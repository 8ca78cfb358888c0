"""Plane arithmetic."""

from hypothesis import given
from hypothesis import strategies as st

from localdepth.slots import n_planes, plane, visible

depths = st.integers(1, 100)
rings = st.none() | st.integers(1, 20)


@given(st.data(), depths, rings)
def test_a_pass_reads_of_its_own_position_what_it_writes(data: st.DataObject, depth: int, ring: int | None) -> None:
    r = data.draw(st.integers(0, depth - 1))
    assert visible(r, r + 1, ring) == plane(r, ring)


@given(st.integers(0, 99), depths, rings)
def test_a_position_is_never_dropped_and_reads_only_what_it_wrote(r: int, depth: int, ring: int | None) -> None:
    written = {plane(i, ring) for i in range(depth)}
    assert visible(r, depth, ring) in written


@given(depths, rings)
def test_planes_are_counted(depth: int, ring: int | None) -> None:
    assert len({plane(r, ring) for r in range(depth)}) == n_planes(depth, ring)
