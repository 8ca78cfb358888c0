"""How our tensors lie in stored ones: what every layout on disk is made of."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from localdepth.config import ModelConfig
from localdepth.errors import CheckpointError

__all__ = ["Layout", "Part", "some"]


@dataclass(frozen=True, slots=True)
class Part:
    """Where one of our tensors lies inside a stored one."""

    name: str  # stored tensor
    rows: tuple[int, int] | None = None  # first and one past the last; None: all
    cols: tuple[int, int] | None = None
    index: int | None = None  # qk_bias packs [q, k] in its first axis; the rest is flattened


@dataclass(frozen=True, slots=True)
class Layout:
    """A recognised checkpoint: what it is, and where each of our tensors lies in it."""

    kind: str  # for people: "Huginn", "retrofit OLMo-2", ...
    config: ModelConfig
    parts: dict[str, Part]

    def stored_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape each stored tensor must have to hold its parts; packed biases are given as one row each."""
        shapes: dict[str, tuple[int, ...]] = {}
        for name, shape in self.config.tensors().items():
            part = self.parts[name]
            whole = (2, *shape) if part.index is not None else shape
            rows = part.rows[1] if part.rows else whole[0]
            cols = (part.cols[1],) if part.cols else whole[1:]
            known = shapes.get(part.name, ())
            shapes[part.name] = max(known, (rows, *cols))
        return shapes

    def check_names(self, stored: Iterable[str], junk: re.Pattern[str], path: Path) -> None:
        """Compare with the names of the tensors in ``path``; those that ``junk`` matches may be there.

        Raises:
            CheckpointError: tensors are missing, or nobody knows what they are.
        """
        wanted, there = {part.name for part in self.parts.values()}, set(stored)
        missing = sorted(wanted - there)
        extra = sorted(name for name in there - wanted if not junk.search(name))
        if missing or extra:
            raise CheckpointError(
                f"the tensors in {path} are not those of a {self.kind} model: missing {some(missing)}; "
                f"unknown {some(extra)}; download it again, or take the config.json that belongs to the weights"
            )

    def packed(self) -> Mapping[str, list[str]]:
        """Stored tensors, and which of ours each is made of, in the order they lie in it."""
        groups: dict[str, list[str]] = {}
        for name, part in self.parts.items():
            groups.setdefault(part.name, []).append(name)

        def place(name: str) -> tuple[int, int, int]:
            part = self.parts[name]
            return part.index or 0, (part.rows or (0,))[0], (part.cols or (0,))[0]

        return {stored: sorted(names, key=place) for stored, names in groups.items()}


def some(names: Iterable[str]) -> str:
    """The first few of ``names`` for an error message."""
    names = list(names)
    return (", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")) or "none"
