"""How far quantising moves a model: the divergence of its logits by recipe and depth, beside what each recipe costs.

Everything runs in ggml, the unquantised model as a float32 file, so torch is not needed.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray

from localdepth.engine.base import F32
from localdepth.engine.ggml.engine import GgmlEngine
from localdepth.errors import ConfigError
from localdepth.gguf import read
from localdepth.model import Model
from localdepth.prompt import PromptReader
from localdepth_export.convert import to_gguf
from localdepth_export.importance import Importance
from localdepth_export.recipe import Recipe
from localdepth_export.sample import Sample, limits_for, windows

__all__ = ["RECIPES", "Divergence", "Outcome", "compare", "compare_recipes", "run"]

RECIPES = (
    *("Q8_0", "Q6_K", "Q5_K", "Q4_K,core=Q8_0", "Q4_K,core=Q6_K", "Q4_K"),
    *("Q5_0", "Q4_0,core=Q8_0", "Q4_0"),
)
_ROWS = 64  # compared at a time, so that wide vocabularies fit in memory


@dataclass(frozen=True, slots=True)
class Divergence:
    """Logits against a reference's.

    Attributes:
        max_abs: largest difference.
        kl: mean KL(reference || ours) in nats.
        top1: share of positions with the same best token.
    """

    max_abs: float
    kl: float
    top1: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a recipe costs, and what it does to the logits.

    Attributes:
        n_bytes: size of the file.
        bits: bits of the file for each parameter.
        n_fallbacks: matrices whose rows could not hold the quant.
        by_depth: divergence from the unquantised model at the same depth.
    """

    recipe: str
    n_bytes: int
    bits: float
    n_fallbacks: int
    by_depth: Mapping[int, Divergence]


def compare(ours: F32, reference: F32) -> Divergence:
    """Divergence of logits [T, n_vocab] from others of the same positions; NaN where any is not finite."""
    kl = [_kl(ours[i : i + _ROWS], reference[i : i + _ROWS]) for i in range(0, len(ours), _ROWS)]
    return Divergence(
        max_abs=float(np.abs(ours - reference).max()),
        kl=max(float(np.concatenate(kl).mean()), 0.0),
        top1=float((ours.argmax(-1) == reference.argmax(-1)).mean()),
    )


def run(model: Model, cut: Sequence[Sequence[int]], depth: int) -> F32:
    """Logits of all positions of all windows, one after the other: [T, n_vocab]."""
    return np.concatenate([model.logits(window, depth=depth) for window in cut])


def compare_recipes(
    checkpoint: str | os.PathLike[str],
    sample: Sample,
    *,
    recipes: Sequence[str | Recipe] = RECIPES,
    depths: Sequence[int] | None = None,
    importance: Importance | None = None,
    max_tokens: int = 1024,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Outcome]:
    """Quantise a checkpoint by each recipe and measure what that does to its logits.

    Files are made in the system's temporary folder, one recipe at a time. The reference's logits are kept in memory:
    4 x depths x positions x n_vocab bytes.

    Args:
        sample: a text, cut into windows, or windows of token ids.
        depths: passes to compare; None is 1, 2, 4, ... up to the model's default depth.
        importance: used in quantising by every recipe.
        max_tokens: positions to compare at most.
        on_progress: told after each recipe how many are done, and how many there are.
    Raises:
        ConfigError: an unknown recipe, no recipe, nothing to run, or a text for a model without tokenizer.
        DepthError: a depth outside the measuring range.
        CheckpointError, MissingExtra, StorageError: as ``to_gguf``.
    """
    parsed = list(dict.fromkeys(r if isinstance(r, Recipe) else Recipe.parse(r) for r in recipes))
    if not parsed:
        raise ConfigError("no recipes to compare; pass at least one, such as Q4_K")
    with TemporaryDirectory(prefix="localdepth-") as folder:
        file = Path(folder) / "model.gguf"
        to_gguf(checkpoint, file, quant="F32")
        with read(file) as opened:
            config = opened.config
            ran = [config.check_depth(d, measure=True) for d in depths or _doubling(config.default_depth)]
            cut = windows(sample, opened, max_tokens)
        with _opened(file, cut, ran) as model:
            expected = {depth: run(model, cut, depth) for depth in ran}
        outcomes = []
        for recipe in parsed:
            made = to_gguf(checkpoint, file, quant=recipe, importance=importance)
            with _opened(file, cut, ran) as model:
                by_depth = {depth: compare(run(model, cut, depth), expected[depth]) for depth in ran}
            bits = 8 * made.n_bytes / made.n_params
            outcomes.append(Outcome(made.quant, made.n_bytes, bits, len(made.fallbacks), by_depth))
            if on_progress:
                on_progress(len(outcomes), len(parsed))
    return outcomes


@contextmanager
def _opened(file: Path, cut: Sequence[Sequence[int]], depths: Sequence[int]) -> Iterator[Model]:
    with read(file) as opened:
        engine = GgmlEngine(opened, limits_for(cut, depths))
    with Model(engine, PromptReader(None, engine.config.n_vocab)) as model:
        yield model


def _doubling(last: int) -> list[int]:
    return sorted({last, *(2**i for i in range(last.bit_length()))})


def _kl(ours: F32, reference: F32) -> NDArray[np.float64]:
    """KL(reference || ours) of each row, [n]."""
    p, q = _log_softmax(reference), _log_softmax(ours)
    return np.asarray(np.sum(np.exp(p) * (p - q), axis=-1))


def _log_softmax(logits: F32) -> NDArray[np.float64]:
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    return np.asarray(wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True)))
