"""Fields of foreign ``config.json`` files, read with their types."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from localdepth.config import RopeScaling
from localdepth.errors import CheckpointError, ConfigError

__all__ = ["reading", "rope_scaling", "whole"]


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """What is wrong with the record in ``path``, as an error of the checkpoint."""
    file = path / "config.json"
    try:
        yield
    except KeyError as error:
        raise CheckpointError(f"{file} lacks {error}; is the download complete?") from error
    except (ConfigError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(f"{file}: {error}") from error


def whole(record: Mapping[str, Any], key: str) -> int:
    """A field that must be a whole number."""
    value = record[key]
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{key}={value!r} must be a whole number")
    return value


def rope_scaling(record: Mapping[str, Any] | None) -> dict[str, Any]:
    """Fields of ``ModelConfig`` from the entry ``rope_scaling`` or, as it is called lately, ``rope_parameters``."""
    kind = None if record is None else record.get("rope_type", record.get("type"))
    if record is None or kind in (None, "default"):
        return {}
    if kind != "llama3":
        raise ConfigError(f"rope_scaling of type {kind!r} is not supported; only llama3 is")
    return {
        "rope_scaling": RopeScaling.LLAMA3,
        "rope_scaling_factor": float(record["factor"]),
        "rope_scaling_low_freq_factor": float(record["low_freq_factor"]),
        "rope_scaling_high_freq_factor": float(record["high_freq_factor"]),
        "rope_scaling_original_n_ctx": whole(record, "original_max_position_embeddings"),
    }
