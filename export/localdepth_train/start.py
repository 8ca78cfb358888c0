"""What a run starts from: a fresh model, or a checkpoint, with its tokenizer."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer

from localdepth.config import ModelConfig
from localdepth.errors import CheckpointError, TrainError
from localdepth_train.checkpoint import Checkpoint
from localdepth_train.checkpoint.plain import recognise_plain
from localdepth_train.recipe import Recipe
from localdepth_train.reference import ReferenceModel
from localdepth_train.reference_engine import load_reference
from localdepth_train.tasks.vocabulary import tokenizer_files, train_tokenizer

__all__ = ["Start", "open_checkpoint"]


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
            TrainError: when the model and the data do not fit.
            CheckpointError: for a folder that is no checkpoint.
        """
        if recipe.start is not None:
            return _from_checkpoint(open_checkpoint(recipe.start))
        assert recipe.model is not None
        tokenizer = train_tokenizer(recipe.model.n_vocab, recipe.seed)
        return cls(_fresh(recipe.model, recipe.seed), tokenizer, tokenizer_files(tokenizer))


def open_checkpoint(path: str) -> Checkpoint:
    """A looped checkpoint; or a plain model, which trains as one that runs its layers once.

    Raises:
        CheckpointError: for a folder that is neither.
    """
    try:
        return Checkpoint(path, recognise_plain)
    except CheckpointError:
        return Checkpoint(path)


def _from_checkpoint(checkpoint: Checkpoint) -> Start:
    text = checkpoint.text("tokenizer.json")
    if text is None:
        raise TrainError(f"{checkpoint.path} has no tokenizer.json, which training data need; copy it from the base")
    return Start(load_reference(checkpoint), Tokenizer.from_str(text), checkpoint.carried())


def _fresh(config: ModelConfig, seed: int) -> ReferenceModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ReferenceModel(config)
