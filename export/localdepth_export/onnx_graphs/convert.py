"""Checkpoint -> ONNX: a folder of graphs, see ``folder``, or one file, see ``single_file``."""

import os
from importlib.metadata import version
from pathlib import Path

from localdepth.errors import ConfigError
from localdepth.onnx_folder.layout import Layout
from localdepth_export.convert import Export
from localdepth_export.onnx_graphs.bits import as_text, choose_bits
from localdepth_export.onnx_graphs.folder import write_folder
from localdepth_export.onnx_graphs.single_file import single_path, write_single
from localdepth_export.onnx_graphs.source import Source
from localdepth_export.onnx_graphs.weights import Pieces, as_pieces
from localdepth_export.tensors import Progress, counted, read_finite
from localdepth_export.tokenizer_record import read_license, read_tokenizer
from localdepth_train.checkpoint import Checkpoint

__all__ = ["to_onnx", "write_onnx"]


def to_onnx(
    checkpoint: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    bits: int = 32,
    core_bits: int | None = None,
    single_file: bool = False,
    depth: int | None = None,
    source: str | None = None,
    license_name: str | None = None,
    on_progress: Progress | None = None,
) -> Export:
    """Write ``checkpoint`` as a folder of ONNX graphs, or as one file.

    Norms and biases are stored as float32. Reads one tensor at a time and needs no torch.

    Args:
        checkpoint: directory of a published or own looped model.
        out: folder to write; it appears complete or not at all, in place of an older export.
        bits: of each number of a matrix: 32, 16 (float, computed in float32), 8 or 4 (in blocks that share a scale).
        core_bits: of what runs in every pass, the core and its injection, whose rounding errors add up with depth;
            None takes ``bits``.
        single_file: write nothing but the looped graph with its weights inside, for other programs, as ``out`` where
            that ends in .onnx, else as looped.onnx in the folder ``out``.
        depth: of the graph for onnxruntime-genai; None takes the model's default.
        source: where the checkpoint comes from; None takes the name of its directory.
        license_name: of the weights; None takes the one in the checkpoint's model card, if any.
        on_progress: told after each tensor how many of the model's numbers are done, and how many there are.
    Raises:
        ConfigError: unknown bits, values that 16 bits cannot hold, more than a single file can, or a depth for it.
        DepthError: the model does not go to ``depth``.
        CheckpointError: the directory cannot be used, or holds values that are not finite.
        StorageError: the folder or file cannot be written, or holds something else.
    """
    opened = Checkpoint(checkpoint)
    chosen = choose_bits(opened.config, bits, core_bits)
    layout = Layout(opened.config, chosen)
    provenance = {
        "source": source or opened.path.resolve().name,
        "exporter": f"localdepth {version('localdepth')}",
        "quant": as_text(chosen),
    }
    if known := license_name or read_license(opened):
        provenance["license"] = known

    def encode(name: str) -> Pieces:
        return as_pieces(name, read_finite(opened, name), layout.bits[name])

    made = Source(
        kind=opened.kind,
        config=opened.config,
        layout=layout,
        encode=counted(encode, opened.config, on_progress),
        tokenizer=read_tokenizer(opened),
        files=opened.carried(),
        provenance=provenance,
    )
    return write_onnx(made, Path(out), single_file=single_file, depth=depth)


def write_onnx(source: Source, out: Path, *, single_file: bool, depth: int | None) -> Export:
    """Write a folder, or one file, as ``to_onnx`` says."""
    if single_file:
        if depth is not None:
            raise ConfigError(f"depth={depth} with a single file, whose depth is chosen when it runs; leave it out")
        out = single_path(out)
        write_single(source, out)
        written = [out]
    else:
        write_folder(source, out, depth)
        written = list(out.iterdir())
    return Export(
        path=out,
        kind=source.kind,
        quant=str(source.provenance["quant"]),
        fallbacks=tuple(source.provenance.get("fallbacks", ())),
        n_bytes=sum(path.stat().st_size for path in written),
        n_params=source.config.n_params,
        has_tokenizer=source.tokenizer is not None,
    )
