"""Checkpoint -> GGUF: quantise tensor by tensor, record what was done."""

import os
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from localdepth.engine.ggml.quantize import quantize
from localdepth.errors import ConfigError
from localdepth.quant import Quant
from localdepth.record import Check, CheckStatus
from localdepth_export.gguf_writer import write
from localdepth_export.importance import Importance
from localdepth_export.recipe import Recipe
from localdepth_export.tensors import Progress, counted, read_finite
from localdepth_export.tokenizer_record import read_license, read_tokenizer
from localdepth_train.checkpoint import Checkpoint

__all__ = ["Export", "to_gguf"]


@dataclass(frozen=True, slots=True)
class Export:
    """What an export wrote.

    Attributes:
        quant: the recipe, such as "Q4_K,core=Q6_K".
        fallbacks: tensors whose shape could not hold the quant asked for, "name: Q8_0 -> F16".
        n_bytes: size of the file.
    """

    path: Path
    kind: str
    quant: str
    fallbacks: tuple[str, ...]
    n_bytes: int
    n_params: int
    has_tokenizer: bool


def to_gguf(
    checkpoint: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    quant: str | Recipe = Quant.Q8_0,
    importance: Importance | None = None,
    source: str | None = None,
    license_name: str | None = None,
    on_progress: Progress | None = None,
) -> Export:
    """Write ``checkpoint`` as one GGUF file.

    Matrices are stored as the recipe says, norms and biases as float32. Reads one tensor at a time and needs no torch.

    Args:
        checkpoint: directory of a published or own looped model.
        out: file to write; it appears complete or not at all.
        quant: a recipe, or its text: one of F32, F16, BF16, Q8_0, Q4_0, Q4_K, Q5_0, Q5_K, Q6_K, in any case, and
            stages that differ, as in "Q4_K,core=Q6_K".
        importance: how much each column of each matrix counts in rounding; see ``collect``.
        source: where the checkpoint comes from, for the file's provenance; None takes the name of its directory.
        license_name: of the weights; None takes the one in the checkpoint's model card, if any.
        on_progress: told after each tensor how many of the model's numbers are done, and how many there are.
    Raises:
        ConfigError: unknown quant, values the quant cannot hold, or the importance of another model.
        CheckpointError: the directory cannot be used, or holds values that are not finite.
        StorageError: the file cannot be written.
    """
    recipe = quant if isinstance(quant, Recipe) else Recipe.parse(quant)
    opened = Checkpoint(checkpoint)
    if importance:
        importance.check(opened.config)
    quants, fallbacks = recipe.choose(opened.config)
    tokenizer = read_tokenizer(opened)
    provenance: dict[str, str | tuple[str, ...]] = {
        "source": source or opened.path.resolve().name,
        "exporter": f"localdepth {version('localdepth')}",
        "quant": str(recipe),
        "fallbacks": fallbacks,
    }
    if known := license_name or read_license(opened):
        provenance["license"] = known
    if importance:
        provenance["importance"] = importance.origin
    columns = importance.columns if importance else {}

    def encode(name: str) -> NDArray[np.uint8]:
        tensor = read_finite(opened, name)
        try:
            return quantize(tensor, quants[name], columns.get(name))
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from None

    counting = counted(encode, opened.config, on_progress)
    write(
        out,
        opened.config,
        quants,
        ((name, counting(name)) for name in quants),
        tokenizer=tokenizer,
        provenance=provenance,
        check=Check(CheckStatus.UNVERIFIED),
    )
    return Export(
        path=Path(out),
        kind=opened.kind,
        quant=str(recipe),
        fallbacks=fallbacks,
        n_bytes=Path(out).stat().st_size,
        n_params=opened.config.n_params,
        has_tokenizer=tokenizer is not None,
    )
