"""The exporter, as ``models pull`` wants it: a converter for each kind of model."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from localdepth.cli.common import needs
from localdepth.config import ModelConfig
from localdepth.engine.ggml.lib import find_libraries, library
from localdepth.errors import ConfigError
from localdepth.onnx_folder.layout import BITS, QUANTS, Layout
from localdepth.store.disk import Format, Progress
from localdepth.store.plan import Converter

__all__ = ["choose_converter"]

_DEFAULT_QUANT, _DEFAULT_BITS = "Q8_0", 8
_BITS_IN_WORDS = ", ".join(map(str, BITS))


def choose_converter(
    format: Format | None = None,  # noqa: A002  # what users know it as
    quant: str | None = None,
    bits: int | None = None,
) -> Converter:
    """A converter to what is asked for; by itself to GGUF where ggml is installed, else to ONNX.

    Raises:
        ConfigError: options that do not go together.
    """
    if quant is not None and bits is not None:
        raise ConfigError(f"--quant={quant} is for GGUF files and --bits={bits} for ONNX folders; leave one out")
    if quant is not None and format is Format.ONNX:
        raise ConfigError(f"--quant={quant} is for GGUF files; ONNX folders take --bits, one of {_BITS_IN_WORDS}")
    if bits is not None and format is Format.GGUF:
        raise ConfigError(f"--bits={bits} is for ONNX folders; GGUF files take --quant, such as Q8_0")
    if bits not in (None, *BITS):
        raise ConfigError(f"--bits={bits} is not one of {_BITS_IN_WORDS}")
    is_gguf = find_libraries() is not None if format is None else format is Format.GGUF
    if quant is not None or (bits is None and is_gguf):
        return _ToGguf(quant or _DEFAULT_QUANT)
    return _ToOnnx(bits or _DEFAULT_BITS)


class _Weighing(ABC):
    """What converters share: a checkpoint's sizes are read in the same way, whatever it becomes."""

    extra: str  # that brings what converting takes

    def weigh(self, record: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], where: str) -> int:
        with needs(self.extra):
            from localdepth_train.checkpoint.layouts import recognise
        return self._n_bytes(recognise(record, shapes, Path(where)).config)

    def weigh_folder(self, folder: Path) -> int:
        with needs(self.extra):
            from localdepth_train.checkpoint import Checkpoint
        return self._n_bytes(Checkpoint(folder).config)

    @abstractmethod
    def _n_bytes(self, config: ModelConfig) -> int: ...


class _ToGguf(_Weighing):
    format, extra = Format.GGUF, "export"

    def __init__(self, quant: str) -> None:
        self._quant = quant

    @property
    def quant(self) -> str:
        with needs(self.extra):
            from localdepth_export.recipe import Recipe
        return str(Recipe.parse(self._quant))

    def convert(self, folder: Path, out: Path, source: str, license_name: str | None, progress: Progress) -> None:
        from localdepth_export.convert import to_gguf

        shown = partial(progress, f"converting to {self.quant}")
        to_gguf(folder, out, quant=self.quant, source=source, license_name=license_name, on_progress=shown)

    def _n_bytes(self, config: ModelConfig) -> int:
        from localdepth_export.recipe import Recipe

        library()  # what quantises: if it is missing, say so before the download
        quants, _ = Recipe.parse(self.quant).choose(config)
        return sum(quants[name].n_bytes(shape) for name, shape in config.tensors().items())


class _ToOnnx(_Weighing):
    format, extra = Format.ONNX, "onnx"

    def __init__(self, bits: int) -> None:
        self._bits = bits

    @property
    def quant(self) -> str:
        return QUANTS[self._bits]

    def convert(self, folder: Path, out: Path, source: str, license_name: str | None, progress: Progress) -> None:
        from localdepth_export.onnx_graphs.convert import to_onnx

        shown = partial(progress, f"converting to {self.quant}")
        to_onnx(folder, out, bits=self._bits, source=source, license_name=license_name, on_progress=shown)

    def _n_bytes(self, config: ModelConfig) -> int:
        return Layout(config, self._bits).end
