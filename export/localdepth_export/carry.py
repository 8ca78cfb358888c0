"""From one kind of model file to the other, number by number: nothing is rounded again.

A matrix is carried where both kinds can hold its very numbers: float32 and float16 always, bfloat16 as float32, Q8_0
and Q4_0 as blocks of 8 and 4 bits. Everything else is refused: export it from its checkpoint.
"""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from localdepth.errors import ConfigError, ModelFileError
from localdepth.gguf import GgufFile
from localdepth.gguf import read as read_gguf
from localdepth.onnx_folder.folder import OnnxFolder
from localdepth.onnx_folder.folder import read as read_folder
from localdepth.onnx_folder.layout import QUANTS, Layout, scales_of
from localdepth.prompt import build_tokenizer
from localdepth.quant import Quant
from localdepth.record import Check, CheckStatus, ModelFile, TokenizerRecord, quant_of
from localdepth_export.blocks import BLOCKS, from_ggml, to_ggml
from localdepth_export.convert import Export
from localdepth_export.gguf_writer import write
from localdepth_export.onnx_graphs.convert import write_onnx
from localdepth_export.onnx_graphs.source import Source
from localdepth_export.onnx_graphs.weights import Pieces
from localdepth_export.tensors import Progress, counted

__all__ = ["gguf_to_onnx", "onnx_to_gguf"]

_QUANTS = {32: Quant.F32, 16: Quant.F16, **{bits: quant for quant, bits in BLOCKS.items()}}
_BITS = {**{quant: bits for bits, quant in _QUANTS.items()}, Quant.BF16: 32}


def gguf_to_onnx(
    file: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    single_file: bool = False,
    depth: int | None = None,
    on_progress: Progress | None = None,
) -> Export:
    """Write a GGUF file as ONNX, with the very numbers it holds. The rest is as in ``to_onnx``.

    Raises:
        ModelFileError: it cannot be used, or holds values that are not finite.
        ConfigError: a matrix is stored as ONNX cannot, or one file cannot hold them all.
        DepthError, StorageError: as ``to_onnx``.
    """
    with read_gguf(file) as opened:
        _refuse_damaged(opened)
        shapes = opened.config.tensors()
        layout = Layout(opened.config, {name: _bits(opened, name) for name in shapes if len(shapes[name]) > 1})

        def encode(name: str) -> Pieces:
            return _pieces(opened, name)

        source = Source(
            kind="GGUF",
            config=opened.config,
            layout=layout,
            encode=counted(encode, opened.config, on_progress),
            tokenizer=opened.tokenizer,
            files=_files(opened.tokenizer, opened.config.n_vocab) if opened.tokenizer else {},
            provenance={**opened.provenance, "quant": quant_of(opened).replace(Quant.BF16, Quant.F32)},
        )
        return write_onnx(source, Path(out), single_file=single_file, depth=depth)


def onnx_to_gguf(
    folder: str | os.PathLike[str], out: str | os.PathLike[str], *, on_progress: Progress | None = None
) -> Export:
    """Write a folder of ONNX graphs as one GGUF file, with the very numbers it holds.

    Raises:
        ModelFileError: it cannot be used, or its weights are damaged.
        ConfigError: rows that are no whole number of ggml's blocks, or scales that no exporter of ours wrote.
        StorageError: the file cannot be written.
    """
    with read_folder(folder) as opened:
        _refuse_damaged(opened)
        config = opened.config
        quants = {name: _quant(opened, name) for name in config.tensors()}

        def encode(name: str) -> NDArray[np.uint8]:
            return _stored(opened, name, quants[name])

        quant = _in_words_of_ggml(quant_of(opened))
        counting = counted(encode, config, on_progress)
        write(
            out,
            config,
            quants,
            ((name, counting(name)) for name in quants),
            tokenizer=opened.tokenizer,
            provenance={**opened.provenance, "quant": quant},
            check=Check(CheckStatus.UNVERIFIED),
        )
        return Export(
            path=Path(out),
            kind="ONNX",
            quant=quant,
            fallbacks=tuple(opened.provenance.get("fallbacks", ())),
            n_bytes=Path(out).stat().st_size,
            n_params=config.n_params,
            has_tokenizer=opened.tokenizer is not None,
        )


def _refuse_damaged(file: ModelFile) -> None:
    if file.is_intact() is False:
        raise ModelFileError(f"{file.path}: the weights are not what the checksum says; export or download it again")


def _bits(file: GgufFile, name: str) -> int:
    quant = file.tensors[name].quant
    if quant not in _BITS:
        raise ConfigError(
            f"{name} in {file.path} is stored as {quant}, whose numbers ONNX cannot hold ({', '.join(_BITS)} it can); "
            "export the checkpoint as ONNX instead"
        )
    return _BITS[quant]


def _pieces(file: GgufFile, name: str) -> Pieces:
    info = file.tensors[name]
    if info.quant in BLOCKS:
        codes, scales = from_ggml(file.data(name), info.shape[0], info.quant)
        pieces: Pieces = {name: codes, scales_of(name): scales}
    elif info.quant is Quant.F16:
        pieces = {name: file.data(name).view("<f2").reshape(info.shape)}
    else:
        pieces = {name: file.array(name)}
    if not all(np.isfinite(piece).all() for piece in pieces.values()):
        raise ModelFileError(f"{name} in {file.path} has values that are not finite; download it again")
    return pieces


def _quant(folder: OnnxFolder, name: str) -> Quant:
    quant, shape = _QUANTS[folder.layout.bits[name]], folder.config.tensors()[name]
    if not quant.fits(shape):
        raise _no_gguf(folder, name, quant, f"rows of {shape[-1]} are no whole number of its blocks")
    return quant


def _stored(folder: OnnxFolder, name: str, quant: Quant) -> NDArray[np.uint8]:
    stored = folder.stored(name)
    if quant not in BLOCKS:
        return np.ascontiguousarray(stored).reshape(-1).view(np.uint8)
    try:
        return to_ggml(stored, folder.stored(scales_of(name)), quant)
    except ConfigError as error:
        raise _no_gguf(folder, name, quant, str(error)) from None


def _no_gguf(folder: OnnxFolder, name: str, quant: Quant, why: str) -> ConfigError:
    return ConfigError(
        f"{name} in {folder.path} cannot be stored as {quant}: {why}; export the checkpoint as GGUF instead"
    )


def _in_words_of_ggml(quant: str) -> str:
    for bits, name in QUANTS.items():
        quant = quant.replace(name, _QUANTS[bits])
    return quant


def _files(record: TokenizerRecord, n_vocab: int) -> dict[str, bytes]:
    """The tokenizer as the files that other programs read."""
    tokenizer = build_tokenizer(record, n_vocab)
    names = {"bos_token": record.bos, "eos_token": record.eos[0] if record.eos else None}
    settings: dict[str, Any] = {key: tokenizer.token(i) for key, i in names.items() if i is not None}
    if record.chat_template is not None:
        settings["chat_template"] = record.chat_template
    settings["add_bos_token"] = record.add_bos
    return {
        "tokenizer.json": record.json.encode(),
        "tokenizer_config.json": (json.dumps(settings, indent=2) + "\n").encode(),
    }
