"""Which layers of a base go where: written as "0-3" or "0,2,5-7", or taken from a published recipe."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from localdepth.config import STAGES
from localdepth.errors import ConfigError

__all__ = ["PRESETS", "Layers", "Preset", "choose_layers", "parse_layers", "spell_layers"]

_SPAN = re.compile(r"([0-9]{1,4})(?:-([0-9]{1,4}))?")
_NONE = "none"


@dataclass(frozen=True, slots=True)
class Layers:
    """Layers of a base, counted from 0, in the order in which each stage runs them.

    Any order and any gaps will do. No layer may be named twice: it would be two copies that training pulls apart.

    Raises:
        ConfigError: no core, or a layer in two places.
    """

    prelude: tuple[int, ...]
    core: tuple[int, ...]
    coda: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.core:
            raise ConfigError("core has no layers; there must be one to repeat, such as core=4-7")
        named = Counter(i for _, layers in self.stages() for i in layers)
        if twice := [i for i, n in named.items() if n > 1]:
            raise ConfigError(f"layer {twice[0]} is named twice; every layer has one place")

    def stages(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Each stage with its layers."""
        for stage in STAGES:
            yield stage, getattr(self, stage)

    def dropped(self, n_layer: int) -> tuple[int, ...]:
        """Layers of a base of ``n_layer`` that are not kept."""
        kept = {i for _, layers in self.stages() for i in layers}
        return tuple(i for i in range(n_layer) if i not in kept)


@dataclass(frozen=True, slots=True)
class Preset:
    """A published choice of layers; a base must have ``n_layer``, whatever its kind."""

    n_layer: int
    layers: Layers


def _preset(n_layer: int, prelude: str, core: str, coda: str) -> Preset:
    return Preset(n_layer, Layers(*map(parse_layers, (prelude, core, coda))))


def parse_layers(text: str) -> tuple[int, ...]:
    """Layers as people write them: numbers and spans with commas between; "none" for a stage without layers.

    Raises:
        ConfigError: anything else, or a span that runs backwards.
    """
    if text.strip() == _NONE:
        return ()
    layers: list[int] = []
    for item in text.split(","):
        span = _SPAN.fullmatch(item.strip())
        if not span:
            raise ConfigError(f'layers {text!r:.80} must be written as 0-3 or 0,2,5-7, or "{_NONE}"')
        first, last = int(span[1]), int(span[2] or span[1])
        if last < first:
            raise ConfigError(
                f"layers {item.strip()} run backwards; write {last}-{first}, or single layers in that order"
            )
        layers.extend(range(first, last + 1))
    return tuple(layers)


def spell_layers(layers: Iterable[int]) -> str:
    """Inverse of ``parse_layers``, neighbours joined."""
    runs: list[list[int]] = []
    for i in layers:
        if runs and i == runs[-1][-1] + 1:
            runs[-1].append(i)
        else:
            runs.append([i])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs) or _NONE


# Source: conversion and plotting scripts of mcleish7/retrofitting-recurrence; olmo2-1b-7-4-5 is the recipe of the fork
# LoopedLMs/retrofitting-recurrence, which drops no layer.
PRESETS = {
    "tinyllama-4-8-4": _preset(22, "0-3", "10-17", "18-21"),
    "tinyllama-6-10-6": _preset(22, "0-5", "6-15", "16-21"),
    "tinyllama-7-8-7": _preset(22, "0-6", "7-14", "15-21"),
    "olmo2-1b-4-6-4": _preset(16, "0-3", "6-11", "12-15"),
    "olmo2-1b-7-4-5": _preset(16, "0-6", "7-10", "11-15"),
    "llama3.2-1b-4-6-4": _preset(16, "0-3", "6-11", "12-15"),
    "llama3.2-1b-2-4-2": _preset(16, "0-1", "10-13", "14-15"),
}


def choose_layers(
    n_layer: int,
    prelude: str | Sequence[int] | None,
    core: str | Sequence[int] | None,
    coda: str | Sequence[int] | None,
    preset: str | None,
) -> Layers:
    """The layers that are meant, of a base of ``n_layer``: either all three stages, or a preset.

    Raises:
        ConfigError: both or neither, no such preset, a preset for another number of layers, or layers it does not have.
    """
    stages = dict(zip(STAGES, (prelude, core, coda), strict=True))
    if preset is None:
        if any(given is None for given in stages.values()):
            raise ConfigError(f'name the layers of prelude, core and coda ("{_NONE}" for no layers), or a preset')
        named = {stage: _numbers(stage, given) for stage, given in stages.items()}
        _check_range(named, n_layer)
        return Layers(**named)
    if any(given is not None for given in stages.values()):
        raise ConfigError(f"preset={preset!r:.40} says which layers go where; leave out prelude, core and coda")
    if preset not in PRESETS:
        raise ConfigError(f"preset={preset!r:.40} is not one of {', '.join(PRESETS)}")
    if PRESETS[preset].n_layer != n_layer:
        raise ConfigError(
            f"preset={preset} is for bases of {PRESETS[preset].n_layer} layers, this one has {n_layer}; name the layers"
        )
    return PRESETS[preset].layers


def _check_range(named: Mapping[str, tuple[int, ...]], n_layer: int) -> None:
    for stage, layers in named.items():
        if outside := [i for i in layers if not 0 <= i < n_layer]:
            raise ConfigError(f"{stage} names layer {outside[0]}; the base has {n_layer}, 0 to {n_layer - 1}")


def _numbers(stage: str, given: Any) -> tuple[int, ...]:
    """Layers given as text, or as numbers in a list, a range or the like."""
    if isinstance(given, str):
        return parse_layers(given)
    layers = tuple(given) if isinstance(given, Iterable) else None
    if layers is None or not all(isinstance(i, Integral) and not isinstance(i, bool) for i in layers):
        raise ConfigError(f'{stage}={given!r:.80} must be whole numbers, such as [4, 5], or text, such as "4-5"')
    return tuple(map(int, layers))
