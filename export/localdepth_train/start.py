"""What a run starts from: a fresh model, or a checkpoint, with its tokenizer."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote
from typing import Any

import torch
from tokenizers import Tokenizer

from localdepth.config import ModelConfig
from localdepth.errors import TrainError
from localdepth_train.checkpoint import Checkpoint
from localdepth_train.checkpoint.card import CARD, inherited
from localdepth_train.checkpoint.layouts import LayoutName, recognise
from localdepth_train.checkpoint.parts import Layout
from localdepth_train.checkpoint.plain import is_plain, recognise_plain
from localdepth_train.layer_choice import spell_layers
from localdepth_train.recipe import Recipe
from localdepth_train.reference import ReferenceModel
from localdepth_train.reference_engine import load_reference
from localdepth_train.tasks.vocabulary import tokenizer_files, train_tokenizer

__all__ = ["Start", "open_checkpoint", "trained_at"]


@dataclass(frozen=True, slots=True)
class Start:
    """A model before its first step.

    Attributes:
        files: what goes with the weights, such as the tokenizer: name -> contents.
    """

    model: ReferenceModel
    tokenizer: Tokenizer
    files: Mapping[str, str | bytes]

    @classmethod
    def of(cls, recipe: Recipe) -> "Start":
        """As the recipe says.

        Raises:
            TrainError: when the model and the data do not fit, the folder to start from is missing, or holds a plain
                model that the recipe does not allow.
            CheckpointError: for a folder that is no checkpoint.
        """
        if recipe.start is not None:
            return _from_checkpoint(_opened(recipe.start, recipe.allow_plain))
        assert recipe.model is not None
        tokenizer = train_tokenizer(recipe.model.n_vocab, recipe.seed)
        return cls(_fresh(recipe.model, recipe.seed), tokenizer, tokenizer_files(tokenizer))


def open_checkpoint(path: str) -> Checkpoint:
    """A looped checkpoint; or a plain model, which trains as one that runs its layers once.

    Raises:
        CheckpointError: for a folder that is neither.
    """
    return Checkpoint(path, _recognise)


def trained_at(config: ModelConfig, mean_depth: int) -> ModelConfig:
    """What a model is after training at ``mean_depth``: that is its default, and lies within its range."""
    return replace(
        config,
        default_depth=mean_depth,
        max_depth=max(config.max_depth, 2 * mean_depth),
        auto_min_depth=min(config.auto_min_depth, mean_depth),
        trained_mean_depth=float(mean_depth),
    )


def _recognise(record: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], path: Path) -> Layout:
    """By the model type, so that whatever is refused is refused for its own reason."""
    is_looped = record.get("model_type") in [name.model_type for name in LayoutName]
    return recognise(record, shapes, path) if is_looped else recognise_plain(record, shapes, path)


def _opened(start: str, allow_plain: bool) -> Checkpoint:
    if not Path(start).exists():
        raise TrainError(
            f"start={start!r} does not exist; a run needs the tokenizer and settings of the model there, also to go on "
            "from a saved state: bring the folder back, or say with --start where it is now"
        )
    checkpoint = open_checkpoint(start)
    if is_plain(checkpoint.config) and not allow_plain:
        raise TrainError(
            f"start={start!r} is a plain {checkpoint.kind} model without a core to repeat; make a looped one of it and "
            f"start from that: {_retrofit_line(checkpoint)} (or other layers of it); to train it as it is, write "
            "allow_plain = true into the recipe"
        )
    return checkpoint


def _retrofit_line(checkpoint: Checkpoint) -> str:
    """What to type for a looped model that keeps every layer of a plain one, half of them or more in the core."""
    n_layer, base = checkpoint.config.n_core, checkpoint.path
    n_outer = (n_layer + 1) // 4
    prelude, core, coda = range(n_outer), range(n_outer, n_layer - n_outer), range(n_layer - n_outer, n_layer)
    folders = f"{quote(str(base))} -o {quote(f'{base.resolve().name}-looped')}"
    layers = f"--prelude {spell_layers(prelude)} --core {spell_layers(core)} --coda {spell_layers(coda)}"
    return f"localdepth retrofit {folders} {layers} --init identity"


def _from_checkpoint(checkpoint: Checkpoint) -> Start:
    text = checkpoint.text("tokenizer.json")
    if text is None:
        raise TrainError(f"{checkpoint.path} has no tokenizer.json, which training data need; copy it from the base")
    card = inherited(checkpoint.card()) + f"Trained from {checkpoint.path.resolve().name} by `localdepth train run`.\n"
    return Start(load_reference(checkpoint), Tokenizer.from_str(text), {**checkpoint.carried(), CARD: card})


def _fresh(config: ModelConfig, seed: int) -> ReferenceModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ReferenceModel(config)
