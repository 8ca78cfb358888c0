"""How many bits the numbers of each matrix are stored in.

What runs in every pass, the core and its injection, may keep more bits than the rest: its rounding errors are made
again in every pass, while its bytes are paid once.
"""

from collections import Counter
from collections.abc import Mapping

from localdepth.config import ModelConfig
from localdepth.onnx_folder.layout import QUANTS

__all__ = ["as_text", "choose_bits"]

_IN_EVERY_PASS = ("injection", "core")
_STAGE_OF = {"token_embd": "embed", "output": "head"}  # by the first part of a tensor's name; others name their stage


def choose_bits(config: ModelConfig, bits: int, core_bits: int | None = None) -> dict[str, int]:
    """Bits of each matrix by its name: ``core_bits`` in core and injection, ``bits`` elsewhere."""
    matrices = [name for name, shape in config.tensors().items() if len(shape) > 1]
    in_passes = bits if core_bits is None else core_bits
    return {name: in_passes if _stage(name) in _IN_EVERY_PASS else bits for name in matrices}


def as_text(bits: Mapping[str, int]) -> str:
    """What each stage is stored as, in the words of a recipe: "INT4,injection=INT8,core=INT8"."""
    stages = {_stage(name): QUANTS[value] for name, value in bits.items()}
    [(base, _)] = Counter(stages.values()).most_common(1)
    return ",".join([base, *(f"{stage}={quant}" for stage, quant in stages.items() if quant != base)])


def _stage(name: str) -> str:
    first = name.partition(".")[0]
    return _STAGE_OF.get(first, first)
