"""What of a recipe may change while a run is stopped.

A saved state holds every value of its recipe under the name it has in the file, and those of the model. Most decide
what is computed and must be the same when the run goes on. The others say how, how fast and from which place, or are
what a run that failed is told to change.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from localdepth.config import ModelConfig
from localdepth.errors import TrainError
from localdepth_train.recipe import Recipe

__all__ = ["changes", "settings_of"]

_FREE = re.compile(
    r"""threads | recompute | shard | compile | save_every | evaluation\..* | start | allow_plain | phases\[\d+\]\.(
        optimizer\.(adamw_lr | muon_lr) |
        tasks\.(evaluate_questions | evaluate_steps) |
        text\.(on_bad_row | held_out_documents | sources\[\d+\]\.path)
    )""",
    re.VERBOSE,
)


def settings_of(recipe: Recipe, config: ModelConfig) -> dict[str, Any]:
    """Every value of ``recipe`` with the model it trains, by name: ``phases[0].depth.mean``."""
    return dict(_named("", {**asdict(recipe), "model": asdict(config)}))


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The settings that differ, by name: what they were and what they are.

    Raises:
        TrainError: when one of them decides what is computed.
    """
    names = dict.fromkeys((*before, *now))
    changed = {name: pair for name in names if (pair := (before.get(name), now.get(name)))[0] != pair[1]}
    for name, (old, new) in changed.items():
        if not _is_free(name, old, new):
            raise TrainError(
                f"{name}={new!r} is not what the run in this folder began with, {old!r}, and would make it another "
                f"run; give {old!r} again, or a new folder"
            )
    return changed


def _is_free(name: str, old: Any, new: Any) -> bool:
    another_optimizer = name.endswith("muon_lr") and not (old and new)
    return bool(_FREE.fullmatch(name)) and not another_optimizer


def _named(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The plain values of a record, however deep they lie."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _named(f"{name}.{key}" if name else key, item)
    elif isinstance(value, tuple) and any(isinstance(item, dict) for item in value):
        for i, item in enumerate(value):
            yield from _named(f"{name}[{i}]", item)
    else:
        yield name, str(value) if isinstance(value, str) else value  # an enum is its word
