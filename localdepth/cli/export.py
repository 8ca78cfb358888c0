"""Writing model files: ``export gguf``, ``export onnx``."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from localdepth import console
from localdepth.cli.common import app, command, needs
from localdepth.cli.options import ImportanceOption, JsonOption
from localdepth.errors import ConfigError
from localdepth.gguf import read
from localdepth.onnx_folder.folder import is_folder

if TYPE_CHECKING:
    from localdepth_export.convert import Export

__all__ = ["export_app", "export_gguf", "export_onnx"]

export_app = typer.Typer(help="Write a checkpoint as a model file.", no_args_is_help=True)
app.add_typer(export_app, name="export")

LicenseOption = Annotated[str | None, typer.Option("--license", help="Of the weights, if the card lacks it.")]


@export_app.command("gguf")
@command
def export_gguf(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="CHECKPOINT", help="Directory of a Huginn, retrofit or localdepth checkpoint, or an ONNX folder."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write.")],
    quant: Annotated[
        str | None,
        typer.Option("--quant", "-q", help='F32 to Q4_0, Q8_0 without it; stages may differ: "Q4_K,core=Q6_K".'),
    ] = None,
    importance: ImportanceOption = None,
    license_name: LicenseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write a checkpoint as a GGUF file; an ONNX folder as it is, where GGUF can hold its numbers."""
    if source.is_file():
        read(source).close()  # or it says what else it is
        raise ConfigError(
            f"{source} is a GGUF file already; for another quant export its checkpoint, as ONNX: "
            f"localdepth export onnx {source} -o FOLDER"
        )
    with needs("export"):
        from localdepth_export.carry import onnx_to_gguf
        from localdepth_export.convert import to_gguf
        from localdepth_export.importance import Importance
    with console.tracking("quantising") as on_progress:
        if is_folder(source):
            _refuse(source, {"quant": quant, "importance": importance, "license": license_name})
            done = onnx_to_gguf(source, out, on_progress=on_progress)
        else:
            done = to_gguf(
                source,
                out,
                quant=quant or "Q8_0",
                importance=None if importance is None else Importance.load(importance),
                license_name=license_name,
                on_progress=on_progress,
            )
    _show(done, as_json)


@export_app.command("onnx")
@command
def export_onnx(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="CHECKPOINT", help="Directory of a Huginn, retrofit or localdepth checkpoint, or a GGUF file."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write, or file with --single-file.")],
    bits: Annotated[
        int | None, typer.Option("--bits", "-b", help="Of each number: 32, 16, 8 or 4; 32 without.")
    ] = None,
    core_bits: Annotated[
        int | None, typer.Option("--core-bits", help="Of what runs in every pass; as --bits without.")
    ] = None,
    single_file: Annotated[
        bool, typer.Option("--single-file", help="The looped graph alone, its weights inside, for other programs.")
    ] = False,
    depth: Annotated[
        int | None, typer.Option("--depth", help="Of the graph for onnxruntime-genai; the model's default.")
    ] = None,
    license_name: LicenseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write a checkpoint as ONNX; a GGUF file as it is, where ONNX can hold its numbers."""
    if is_folder(source):
        raise ConfigError(
            f"{source} is an ONNX folder already; for other bits export its checkpoint, as GGUF: "
            f"localdepth export gguf {source} -o model.gguf"
        )
    with needs("onnx"):
        from localdepth_export.carry import gguf_to_onnx
        from localdepth_export.onnx_graphs.convert import to_onnx
    with console.tracking("writing") as on_progress:
        if source.is_file():
            _refuse(source, {"bits": bits, "core-bits": core_bits, "license": license_name})
            done = gguf_to_onnx(source, out, single_file=single_file, depth=depth, on_progress=on_progress)
        else:
            done = to_onnx(
                source,
                out,
                bits=32 if bits is None else bits,
                core_bits=core_bits,
                single_file=single_file,
                depth=depth,
                license_name=license_name,
                on_progress=on_progress,
            )
    _show(done, as_json)


def _refuse(source: Path, options: dict[str, object]) -> None:
    """A model file is carried over as it is."""
    if given := [f"--{name}={value}" for name, value in options.items() if value is not None]:
        raise ConfigError(
            f"{given[0]} with the model file {source}, whose numbers are not rounded again; leave it out, or export "
            "the checkpoint"
        )


def _show(done: "Export", as_json: bool) -> None:
    if as_json:
        console.emit({**asdict(done), "path": str(done.path)})
        return
    console.say.print(
        f"{done.path}: {done.kind}, {done.n_params:,} parameters as {done.quant}, {done.n_bytes:,} bytes"
        f"{'' if done.has_tokenizer else ', no tokenizer: it takes and gives token ids'}"
    )
    if done.fallbacks:
        console.say.print(f"{len(done.fallbacks)} matrices have rows that do not fit and are finer; inspect lists them")
