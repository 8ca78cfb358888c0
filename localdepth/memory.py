"""What a loaded model takes of the machine's memory, said before anything is allocated, and how much there is."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from localdepth.errors import OutOfMemory

__all__ = ["MemoryPlan", "as_size", "available_bytes", "check_fits"]

_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Bytes of one loaded model with one sequence that fills its context.

    Attributes:
        depth, n_ctx, ring, kv_type: what the plan is for.
        mapped: weights used as they lie in the file; the system can drop and read them again.
        packed: by layout, copies of weights that compute faster.
        kv: K/V planes, n_ctx positions of each.
        states: e and s of every position, from which deeper passes go on.
        rows: working rows of a prompt that fills the context, positions, mask and logits.
        scratch: intermediate results.
    """

    depth: int
    n_ctx: int
    ring: int | None
    kv_type: str
    mapped: int
    packed: Mapping[str, int]
    kv: int
    states: int
    rows: int
    scratch: int

    @property
    def weights(self) -> int:
        """All layouts of the weights together."""
        return self.mapped + sum(self.packed.values())

    @property
    def sequence(self) -> int:
        """What each further sequence takes."""
        return self.kv + self.states + self.rows

    @property
    def total(self) -> int:
        """Everything."""
        return self.weights + self.sequence + self.scratch

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "packed": dict(self.packed), "total": self.total}

    def __str__(self) -> str:
        layouts = ", ".join(f"{as_size(size)} {name}" for name, size in self.packed.items())
        sharing = "" if self.ring is None else f", ring {self.ring}"
        return (
            f"{as_size(self.total)}: weights {as_size(self.mapped)} mapped{layouts and ' + ' + layouts}, K/V "
            f"{as_size(self.kv)} (depth {self.depth} x {self.n_ctx} positions, {self.kv_type}{sharing}), states "
            f"{as_size(self.states)}, rows {as_size(self.rows)}, scratch {as_size(self.scratch)}"
        )


def as_size(n_bytes: float) -> str:
    """Bytes for people: 1.5 GB, 20 MB, 3 kB."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= 0.9995 * size:  # three digits would round up to it
            return f"{n_bytes / size:.3g} {unit}"
    return f"{n_bytes:.0f} bytes"


def available_bytes() -> int:
    """Memory that can be taken without swapping, inside the limit of a container."""
    import psutil  # takes 20 ms, and small models do not ask

    free = int(psutil.virtual_memory().available)
    limit = _read(_CGROUP / "memory.max")
    used = _read(_CGROUP / "memory.current")
    if limit is None or used is None:
        return free
    return min(free, max(0, limit - used + _reclaimable()))


def check_fits(plan: MemoryPlan, budget: int, ways: Iterable[Iterable[tuple[str, MemoryPlan]]]) -> None:
    """Raise OutOfMemory when ``plan`` is beyond ``budget``, naming what would fit.

    Args:
        ways: to need less; of each the settings with their plans, gentlest first.
    """
    if plan.total <= budget:
        return
    gentlest = (next((item for item in way if item[1].total <= budget), None) for way in ways)
    fitting = [f"{found[0]} ({as_size(found[1].total)})" for found in gentlest if found]
    remedy = (
        f"what fits: {' or '.join(fitting)}"
        if fitting
        else "no smaller setting fits; use a coarser quant or a smaller model"
    )
    raise OutOfMemory(f"this needs {plan}; there is room for {as_size(budget)}; {remedy}")


def _read(path: Path) -> int | None:
    """A number of the container's limits; None where there is no limit, or no container."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _reclaimable() -> int:
    """Page cache that counts as the container's and gives way."""
    try:
        lines = (_CGROUP / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))
