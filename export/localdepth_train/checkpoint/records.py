"""Values from outside, such as the fields of a foreign ``config.json``: read with their types, or refused by name."""

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from localdepth.config import RopeScaling
from localdepth.errors import CheckpointError, ConfigError

__all__ = ["flag", "items", "number", "one_of", "reading", "rope_scaling", "table", "whole"]

_LARGEST = 1 << 31  # far beyond any size of a model, and small enough to compute with

_T = TypeVar("_T", bound=str)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """What is wrong with the record in ``path``, as an error of the checkpoint."""
    file = path / "config.json"
    try:
        yield
    except KeyError as error:
        raise CheckpointError(f"{file} lacks {error}; is the download complete?") from error
    except ConfigError as error:
        raise CheckpointError(f"{file}: {error}") from error


def whole(record: Mapping[str, Any], key: str, default: int | None = None, *, least: int = 1) -> int:
    """A whole number of at least ``least``; ``default``, if there is one, where it is absent or null."""
    value = _value(record, key, default)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= _LARGEST:
        raise ConfigError(f"{key}={value!r:.40} must be a whole number in {least}..{_LARGEST}")
    return value


def number(record: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """A finite number; ``default``, if there is one, where it is absent or null."""
    value = _value(record, key, default)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not abs(value) <= sys.float_info.max:
        raise ConfigError(f"{key}={value!r:.40} must be a finite number")
    return float(value)


def flag(record: Mapping[str, Any], key: str, default: bool) -> bool:
    """True or false; ``default`` where it is absent or null."""
    value = _value(record, key, default)
    if not isinstance(value, bool):
        raise ConfigError(f"{key}={value!r:.40} must be true or false")
    return value


def table(record: Mapping[str, Any], key: str) -> dict[str, Any]:
    """A record within the record; empty where it is absent or null."""
    value = _value(record, key, {})
    if not isinstance(value, dict):
        raise ConfigError(f"{key}={value!r:.40} must be a JSON object")
    return value


def items(record: Mapping[str, Any], key: str) -> list[Any]:
    """A list; empty where it is absent or null."""
    value = _value(record, key, [])
    if not isinstance(value, list):
        raise ConfigError(f"{key}={value!r:.40} must be a list")
    return value


def one_of(key: str, value: Any, choices: Iterable[_T]) -> _T:
    """The choice that ``value`` names."""
    choices = tuple(choices)
    for choice in choices:
        if choice == value:
            return choice
    raise ConfigError(f"{key}={value!r:.40} is not one of {', '.join(choices)}")


def rope_scaling(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of ``ModelConfig`` from the entry ``rope_scaling`` or, as it is called lately, ``rope_parameters``."""
    kinds = [settings[key] for key in ("rope_type", "type") if settings.get(key) not in (None, "default")]
    if not kinds:
        return {}
    if others := [kind for kind in kinds if kind != RopeScaling.LLAMA3]:
        raise ConfigError(f"rope_scaling of type {others[0]!r:.40} is not supported, only llama3; take another model")
    return {
        "rope_scaling": RopeScaling.LLAMA3,
        "rope_scaling_factor": number(settings, "factor"),
        "rope_scaling_low_freq_factor": number(settings, "low_freq_factor"),
        "rope_scaling_high_freq_factor": number(settings, "high_freq_factor"),
        "rope_scaling_original_n_ctx": whole(settings, "original_max_position_embeddings"),
    }


def _value(record: Mapping[str, Any], key: str, default: Any) -> Any:
    return default if default is not None and record.get(key) is None else record[key]
