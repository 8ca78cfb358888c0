"""Which looped checkpoints there are on disk: our own layout and the published ones."""

import re
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

from localdepth.config import PLAIN_MODELS, ModelConfig, plain_model
from localdepth.errors import CheckpointError, ConfigError
from localdepth_train.checkpoint.parts import Layout, Part
from localdepth_train.checkpoint.published import published_layout, published_parts, published_record

__all__ = ["LayoutName", "layout_of", "recognise", "record_of"]

_FORMAT_VERSION = 1  # of our own layout
_OWN, _PUBLISHED = "localdepth", "huginn_raven"  # model_type
_NO_JUNK = re.compile(r"(?!)")


class LayoutName(StrEnum):
    """How a checkpoint is written."""

    OURS = "ours"  # fields and tensor names of ModelConfig
    PUBLISHED = "published"  # as the published retrofits; the head is always written, so a tie is lost

    @property
    def model_type(self) -> str:
        """What ``config.json`` calls it."""
        return _OWN if self is LayoutName.OURS else _PUBLISHED


def recognise(record: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], path: Path) -> Layout:
    """Tell which looped model a directory holds from its config ``record`` and its tensors' ``shapes``.

    Raises:
        CheckpointError: for another model type, a combination of tensors that is no known model, or bad fields.
    """
    kind = record.get("model_type")
    if kind == _OWN:
        layout = layout_of(_own_config(record, path), LayoutName.OURS)
        layout.check_names(shapes, _NO_JUNK, path)
        return layout
    if kind == _PUBLISHED:
        return published_layout(record, shapes, path)
    raise CheckpointError(_foreign(kind, path))


def layout_of(config: ModelConfig, name: LayoutName) -> Layout:
    """Where the tensors of a model lie when it is written."""
    if name is LayoutName.PUBLISHED:
        return Layout(_PUBLISHED, config, published_parts(config))
    return Layout(_OWN, config, {tensor: Part(tensor) for tensor in config.tensors()})


def record_of(config: ModelConfig, name: LayoutName, dtype: str) -> dict[str, Any]:
    """The ``config.json`` of a model when it is written.

    Args:
        dtype: of the weights, in torch's words.
    Raises:
        ConfigError: that layout cannot hold this model.
    """
    if name is LayoutName.PUBLISHED:
        return published_record(config, dtype)
    return {"model_type": _OWN, "format_version": _FORMAT_VERSION, **config.to_dict()}


def _own_config(record: Mapping[str, Any], path: Path) -> ModelConfig:
    version = record.get("format_version")
    if version != _FORMAT_VERSION:
        is_newer = isinstance(version, int) and version > _FORMAT_VERSION
        raise CheckpointError(
            f"{path / 'config.json'} has format_version {version!r:.40}, this version reads {_FORMAT_VERSION}; "
            + ("update localdepth" if is_newer else "download it again, or write the checkpoint anew")
        )
    fields = {key: value for key, value in record.items() if key not in ("model_type", "format_version")}
    try:
        return ModelConfig.from_dict(fields)
    except ConfigError as error:
        raise CheckpointError(f"{path / 'config.json'}: {error}") from error


def _foreign(kind: Any, path: Path) -> str:
    if isinstance(kind, str) and kind.startswith(PLAIN_MODELS):
        return f"{path} holds a {plain_model(kind, 'BASE, this folder,')}"
    return f'{path} has model_type {kind!r:.40}; we read "{_PUBLISHED}" (Huginn, retrofits) and "{_OWN}"'
