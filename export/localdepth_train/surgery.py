"""Retrofit: make a looped model of a plain one by giving each layer it keeps a place in prelude, core or coda.

The weights stay bit for bit as they are, in the base's own number type; only the injection is new. Nothing is trained:
a retrofit is what training starts from.

``injection="concat_linear"`` adds a matrix [W_s | W_e] that mixes state and embeds; ``init`` says what it is at first:

- ``paper``: as published, drawn from U(-1/sqrt(2n), 1/sqrt(2n)) for a model n wide, which is what torch gives a new
  ``nn.Linear`` (the same distribution, not the same draw). It preserves nothing: training has to heal the model.
  The state starts from the published normal distribution.
- ``identity``: [0 | I]. The core sees the embeds and nothing else, so at every depth the model is the base with only
  the kept layers, bit for bit, and the state counts for as much as training lets it.
- ``pass-through``: [I | I]. The core sees state plus embeds. From a state of zeros depth 1 is the kept layers, bit
  for bit; later passes go on with the state, undamped.

``injection="add"`` has no matrix: it is what ``pass-through`` is at first, for good. There ``init`` only says how the
state starts, and ``identity`` cannot be had.

Source: McLeish et al. 2025, arXiv:2511.07384; identity as in the fork LoopedLMs/retrofitting-recurrence.
"""

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from localdepth.config import MEASURE_DEPTH, STAGES, Injection, ModelConfig, StateInit
from localdepth.errors import ConfigError, StorageError
from localdepth_train.checkpoint import Checkpoint, Unread, save
from localdepth_train.checkpoint.card import CARD, inherited
from localdepth_train.checkpoint.layouts import LayoutName
from localdepth_train.checkpoint.plain import recognise_plain
from localdepth_train.checkpoint.published import PUBLISHED_STD
from localdepth_train.checkpoint.records import one_of
from localdepth_train.flops import Flops
from localdepth_train.layer_choice import Layers, choose_layers, spell_layers

if TYPE_CHECKING:
    from localdepth_train.recipe import Recipe
    from localdepth_train.trainer import Report

__all__ = ["Cost", "Init", "Surgery", "retrofit"]

_PUBLISHED_DEPTH = 32  # mean depth that the published retrofits were meant to be trained at
_F16_BYTES = 2
_PART_OF = {"token_embd": "embed", "output_norm": "head", "output": "head"}  # other names begin with their part
_IDS = ("bos_token_id", "eos_token_id")  # which many bases have in config.json alone
_GENERATION = "generation_config.json"
_UNTRAINED = "by `localdepth retrofit`, not trained since"  # in the card of a retrofit, not in that of a trained model


class Init(StrEnum):
    """What a new injection does at first."""

    PAPER = "paper"
    IDENTITY = "identity"
    PASS_THROUGH = "pass-through"


@dataclass(frozen=True, slots=True)
class Cost:
    """What one token takes of a model.

    Attributes:
        flops: of the matrix products, forward; see ``Flops``.
        kv_bytes: of its keys and values as F16, a plane per pass.
    """

    flops: int
    kv_bytes: int

    @classmethod
    def of(cls, config: ModelConfig, depth: int) -> "Cost":
        """At ``depth`` passes."""
        n_planes = config.n_prelude + config.n_core * depth + config.n_coda
        return cls(Flops.of(config).forward(depth), n_planes * 2 * config.n_embd_kv * _F16_BYTES)


@dataclass(frozen=True, slots=True)
class Surgery:
    """What became of a base.

    Attributes:
        path: the new checkpoint.
        kind: of the base, for people.
        base: the base, as a model that loops once.
        config: the new model, as its checkpoint says.
        layers: of the base, by the place they have now.
        init: what the injection does at first.
        has_replaced: an earlier retrofit, not trained since, was in that folder.
    """

    path: Path
    kind: str
    base: ModelConfig
    config: ModelConfig
    layers: Layers
    init: Init
    has_replaced: bool

    @property
    def dropped(self) -> tuple[int, ...]:
        """Layers of the base that were not kept."""
        return self.layers.dropped(self.base.n_core)

    def parameters(self) -> dict[str, int]:
        """Numbers in each part of the new model; the core and a tied head count once."""
        counts = dict.fromkeys(("embed", "prelude", "injection", "core", "coda", "head"), 0)
        for name, shape in self.config.tensors().items():
            first = name.partition(".")[0]
            counts[_PART_OF.get(first, first)] += math.prod(shape)
        return counts

    def cost(self, depth: int) -> Cost:
        """What a token costs the new model at ``depth``."""
        return Cost.of(self.config, depth)

    def base_cost(self) -> Cost:
        """What a token costs the base."""
        return Cost.of(self.base, 1)

    def train(self, recipe: "Recipe | str | os.PathLike[str]", out: str | os.PathLike[str] | None = None) -> "Report":
        """Train it, as ``localdepth_train.train`` does; needs torch.

        Args:
            recipe: or its TOML file; what it starts from is replaced by this checkpoint.
            out: folder of the run; None puts it beside the checkpoint, with "-trained" after its name.
        """
        from localdepth_train.recipe import Recipe, load_recipe
        from localdepth_train.trainer import train

        plan = recipe if isinstance(recipe, Recipe) else load_recipe(Path(recipe))
        return train(plan.given(start=str(self.path)), out or self.path.with_name(f"{self.path.name}-trained"))


def retrofit(
    base: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    prelude: str | Sequence[int] | None = None,
    core: str | Sequence[int] | None = None,
    coda: str | Sequence[int] | None = None,
    preset: str | None = None,
    layout: str = LayoutName.OURS,
    injection: str = Injection.CONCAT_LINEAR,
    init: str = Init.PAPER,
    seed: int = 0,
    source: str | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Surgery:
    """Write the looped model of a plain base; needs no torch, and memory for about the largest tensor.

    Depths before training: ``paper`` has the published ones, default 32 and at least 2 when chosen automatically; with
    the other inits both are 1, where the model is the kept layers. ``trained_mean_depth`` is 0, unknown. The published
    layout has one number for it and the default depth, so there it reads back as the default depth; and it has a head
    of its own, so a tie is lost.

    Args:
        base: directory of a Llama, Mistral, OLMo-2, Qwen2 or Qwen3 model, or of a plain model in our own layout.
        out: folder to write; it appears complete or not at all, and only a retrofit of the same layout that was not
            trained since is replaced.
        prelude, core, coda: layers of the base, as "0-3", "0,2,5-7", "none" or numbers, in the order they shall run.
        preset: the name of a published choice in their place, one of ``layer_choice.PRESETS``.
        layout: "ours", or "published": as the published surgery writes it. That code builds a linear injection
            whatever ``config.json`` says, so it does not run retrofits with ``injection="add"``; localdepth does.
        injection: "concat_linear" or "add".
        init: "paper", "identity" or "pass-through"; see above.
        seed: of the draw of ``init="paper"``.
        source: where the base comes from, for the model card; None takes the name of its directory.
        on_progress: told after each stored tensor how many bytes are written, and how many there are.
    Raises:
        CheckpointError: ``base`` is no plain model that we can represent.
        ConfigError: layers, preset, layout, injection or init cannot be meant, or contradict each other.
        StorageError: ``out`` cannot be written, or holds something else.
    """
    written = one_of("layout", layout, LayoutName)
    how = one_of("injection", injection, (Injection.CONCAT_LINEAR, Injection.ADD))
    begin = one_of("init", init, Init)
    if how is Injection.ADD and begin is Init.IDENTITY:
        raise ConfigError("init='identity' keeps the state out, injection='add' lets all of it in; change one of them")
    if seed < 0:
        raise ConfigError(f"seed={seed} must not be negative")
    opened = Checkpoint(base, recognise_plain)
    if Path(base).resolve() == Path(out).resolve():
        raise ConfigError(f"{out} is the base itself; name another folder")
    layers = choose_layers(opened.config.n_core, prelude, core, coda, preset)
    config = _looped(opened.config, layers, how, begin)
    tensors = {**_kept(opened, config, layers), **_injected(opened, config, begin, seed)}
    files: dict[str, str | bytes] = {**opened.carried(), **_generation(opened)}
    files[CARD] = _card(opened, layers, source or opened.path.resolve().name, how, begin)
    has_replaced = Path(out, CARD).exists()  # what has one is refused, or replaced
    path = save(
        out,
        config,
        {name: tensors[name] for name in config.tensors()},
        files,
        layout=written,
        judge=_check_untrained,
        on_progress=on_progress,
    )
    return Surgery(path, opened.kind, opened.config, Checkpoint(path).config, layers, begin, has_replaced)


def _check_untrained(folder: Path) -> None:
    """Refuse to replace a model that surgery cannot make again.

    Raises:
        StorageError: it was trained, or is no retrofit.
    """
    card = folder / CARD
    if not card.is_file() or _UNTRAINED.encode() not in card.read_bytes():
        raise StorageError(
            f"{folder} holds a model that is no untrained retrofit and would be lost; name another folder, or remove it"
        )


def _looped(base: ModelConfig, layers: Layers, injection: Injection, init: Init) -> ModelConfig:
    is_paper = init is Init.PAPER
    return replace(
        base,
        n_prelude=len(layers.prelude),
        n_core=len(layers.core),
        n_coda=len(layers.coda),
        injection=injection,
        state_init=StateInit.NORMAL if is_paper else StateInit.ZEROS,
        state_std=PUBLISHED_STD if is_paper else 0.0,
        default_depth=_PUBLISHED_DEPTH if is_paper else 1,
        auto_min_depth=2 if is_paper else 1,
        max_depth=MEASURE_DEPTH,
        trained_mean_depth=0.0,
    )


def _kept(opened: Checkpoint, config: ModelConfig, layers: Layers) -> dict[str, Unread]:
    """What the new model has of the base, under its new names."""
    tensors = {}
    for name in config.tensors():
        stage, _, rest = name.partition(".")
        if stage in STAGES:
            i, _, part = rest.partition(".")
            tensors[name] = opened.unread(f"core.{getattr(layers, stage)[int(i)]}.{part}")
        elif stage != "injection":
            tensors[name] = opened.unread(name)
    return tensors


def _injected(opened: Checkpoint, config: ModelConfig, init: Init, seed: int) -> dict[str, Unread]:
    """The new matrices, in the number type of the embedding."""
    if config.injection is Injection.ADD:
        return {}
    n, dtype = config.n_embd, opened.unread("token_embd.weight").dtype

    def drawn(half: int) -> npt.NDArray[Any]:
        uniform = np.random.default_rng((seed, half)).random((n, n), dtype=np.float32)  # in [0, 1)
        return ((2 * uniform - 1) / np.float32(math.sqrt(2 * n))).astype(dtype)

    makers: dict[str, Callable[[], npt.NDArray[Any]]] = {
        "state": lambda: np.zeros((n, n), dtype) if init is Init.IDENTITY else np.eye(n, dtype=dtype),
        "embeds": lambda: np.eye(n, dtype=dtype),
    }
    if init is Init.PAPER:
        makers = {"state": partial(drawn, 0), "embeds": partial(drawn, 1)}
    return {f"injection.{half}.weight": Unread((n, n), dtype, make) for half, make in makers.items()}


def _generation(opened: Checkpoint) -> dict[str, str]:
    """The base's generation settings, where they lack what its config.json says: where a text begins and ends."""
    theirs = opened.settings(_GENERATION)
    lacking = {
        key: opened.record[key] for key in _IDS if opened.record.get(key) is not None and theirs.get(key) is None
    }
    return {_GENERATION: json.dumps({**theirs, **lacking}, indent=2) + "\n"} if lacking else {}


def _card(opened: Checkpoint, layers: Layers, source: str, injection: Injection, init: Init) -> str:
    """A model card: the base, its licence, what was done."""
    n_layer = opened.config.n_core
    places = "".join(f"| {stage} | {spell_layers(kept)} |\n" for stage, kept in layers.stages())
    return (
        f"{inherited(opened.card(), source)}"
        f"A looped model made of {source} ({opened.kind}, {n_layer} layers) {_UNTRAINED}. "
        f"Injection {injection}, init {init}.\n\n"
        f"| stage | layers of the base |\n|---|---|\n{places}| dropped | {spell_layers(layers.dropped(n_layer))} |\n"
    )
