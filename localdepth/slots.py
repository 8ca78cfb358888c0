"""Which K/V plane a pass writes and which one it reads. Pure arithmetic, nothing else knows it.

A *plane* holds the keys and values of one core layer at one pass for every position. Sharing is OWN
(``ring is None``: a plane per pass) or RING(k) (pass r writes plane r mod k).
"""

__all__ = ["n_planes", "plane", "visible"]


def plane(r: int, ring: int | None) -> int:
    """Plane that pass ``r`` writes."""
    return r if ring is None else r % ring


def visible(r: int, depth: int, ring: int | None) -> int:
    """Plane that pass ``r`` reads of a position which ran ``depth`` passes (*latest* lookup).

    A position that stopped early stays visible through its deepest plane; it is never dropped.
    """
    return min(plane(r, ring), depth - 1)


def n_planes(depth: int, ring: int | None) -> int:
    """Planes needed so that ``depth`` passes can run."""
    return depth if ring is None else min(depth, ring)
