"""Which quant each stage of a model is stored as.

The core runs once per pass, so its rounding errors add up with depth while its bytes are paid once: it may well keep
more bits than the rest. A recipe is written "Q4_K", or "Q4_K,core=Q6_K,head=Q8_0" where stages differ.
"""

from collections import Counter
from dataclasses import asdict, dataclass, fields

from localdepth.config import ModelConfig
from localdepth.errors import ConfigError
from localdepth.quant import Quant

__all__ = ["Recipe"]

# What a matrix is stored as when its rows are no whole number of blocks: the next finer quant of smaller blocks, as
# llama.cpp does, but for Q5_K, whose next one there (Q5_1) we do not have.
_FALLBACK = {
    Quant.Q4_K: Quant.Q5_0,
    Quant.Q5_K: Quant.Q8_0,
    Quant.Q6_K: Quant.Q8_0,
    Quant.Q4_0: Quant.F16,
    Quant.Q5_0: Quant.F16,
    Quant.Q8_0: Quant.F16,
}
_STAGE_OF = {"token_embd": "embed", "output": "head"}  # by the first part of a tensor's name; others name their stage


@dataclass(frozen=True, slots=True)
class Recipe:
    """The quant of every stage's matrices. Norms and biases are always float32.

    Where the head is tied, one matrix serves as both, stored as the finer of ``embed`` and ``head``.
    """

    embed: Quant
    prelude: Quant
    injection: Quant
    core: Quant
    coda: Quant
    head: Quant

    @classmethod
    def parse(cls, text: str) -> "Recipe":
        """A recipe from its text, in any case.

        Raises:
            ConfigError: an unknown quant or stage, or a stage named twice.
        """
        first, *rest = str(text).split(",")
        quants = dict.fromkeys((stage.name for stage in fields(cls)), _quant(first, text))
        named: set[str] = set()
        for part in rest:
            stage, equals, quant = (word.strip() for word in part.partition("="))
            if not equals or stage.lower() not in quants:
                raise ConfigError(f"{part!r} in quant={text!r} is not STAGE=QUANT with a stage of {', '.join(quants)}")
            if stage.lower() in named:
                raise ConfigError(f"quant={text!r} names {stage} twice; name it once")
            named.add(stage.lower())
            quants[stage.lower()] = _quant(quant, text)
        return cls(**quants)

    def __str__(self) -> str:
        """The shortest text that ``parse`` reads as this recipe."""
        quants: dict[str, Quant] = asdict(self)
        [(base, _)] = Counter(quants.values()).most_common(1)
        return ",".join([base, *(f"{stage}={quant}" for stage, quant in quants.items() if quant is not base)])

    def choose(self, config: ModelConfig) -> tuple[dict[str, Quant], tuple[str, ...]]:
        """The quant of each tensor, and which could not be what the recipe says: "name: Q4_K -> Q5_0"."""
        quants, fallbacks = {}, []
        for name, shape in config.tensors().items():
            wanted = self._wanted(name, config) if len(shape) > 1 else Quant.F32
            quants[name] = _fitting(wanted, shape)
            if quants[name] is not wanted:
                fallbacks.append(f"{name}: {wanted} -> {quants[name]}")
        return quants, tuple(fallbacks)

    def _wanted(self, name: str, config: ModelConfig) -> Quant:
        first = name.partition(".")[0]
        stage = _STAGE_OF.get(first, first)
        if stage == "embed" and config.tied_head:
            return max(self.embed, self.head, key=lambda quant: quant.bits)
        return Quant(getattr(self, stage))


def _fitting(quant: Quant, shape: tuple[int, ...]) -> Quant:
    while not quant.fits(shape):
        quant = _FALLBACK[quant]
    return quant


def _quant(word: str, text: str) -> Quant:
    try:
        return Quant(word.strip().upper())
    except ValueError:
        raise ConfigError(f"{word!r} in quant={text!r} is not one of {', '.join(Quant)}") from None
