"""Models on this machine: ``models list``, ``pull``, ``show``, ``rm``, ``verify``."""

import sys
from dataclasses import asdict
from typing import Annotated, Any

import typer

from localdepth import console
from localdepth.cli.common import CHECK_FAILED, app, brief, command
from localdepth.cli.converters import choose_converter
from localdepth.cli.options import JsonOption
from localdepth.errors import LocalDepthError, RequestError
from localdepth.loading import locate
from localdepth.memory import as_size
from localdepth.onnx_folder.layout import QUANTS
from localdepth.record import quant_of, summary
from localdepth.store.disk import Format, n_bytes_of, open_model
from localdepth.store.folder import DEFAULT_NAME, Store, Stored, Verdict
from localdepth.store.hub import Hub
from localdepth.store.plan import Plan, plan
from localdepth.store.pull import importable, pull
from localdepth.store.ready import ROOT

__all__ = ["list_models", "models_app", "pull_model", "remove_model", "show_model", "verify_models"]

models_app = typer.Typer(help="Models on this machine, and how they get there.", no_args_is_help=True)
app.add_typer(models_app, name="models")

NameArgument = Annotated[str, typer.Argument(help="Name of a model, as `models list` shows it.")]


@models_app.command("list")
@command
def list_models(as_json: JsonOption = False) -> None:
    """List the default model, those in the models folder, and what the Hugging Face cache has to import."""
    store = Store()
    rows = [_describe(_default_model()) | {"from": "localdepth"}, *map(_describe, store.models())]
    with console.waiting("looking through the Hugging Face cache"):
        others = [asdict(found) for found in importable(store, Hub(), choose_converter())]
    if as_json:
        console.emit({"folder": str(store.folder), "models": rows, "importable": others})
        return
    console.show_table(
        ("name", "size", "format", "quant", "parameters", "depth", "licence", "parity", "from"),
        [
            (
                row["name"],
                as_size(row["n_bytes"]),
                row["format"],
                row["quant"] or "-",
                f"{row['n_params']:,}" if row["n_params"] else "-",
                f"1..{row['max_depth']}" if row["max_depth"] else "-",
                row["license"] or "-",
                "damaged" if row["error"] else row["check"] or "-",
                row["from"],
            )
            for row in rows
        ],
        f"models in {store.folder}",
    )
    if others:
        console.say.print()
        console.show_table(
            ("to import with `models pull`", "size", "is"),
            [(found["reference"], as_size(found["n_bytes"]), _kind(found["file"])) for found in others],
            "in the Hugging Face cache",
        )


@models_app.command("pull")
@command
def pull_model(
    reference: Annotated[str, typer.Argument(help="OWNER/NAME or OWNER/NAME@REVISION on the Hugging Face Hub.")],
    file: Annotated[
        str | None, typer.Option("--file", help="Which GGUF file or ONNX folder, where there are several.")
    ] = None,
    kind: Annotated[
        Format | None, typer.Option("--format", help="Of the model here; GGUF where ggml is installed, else ONNX.")
    ] = None,
    quant: Annotated[
        str | None, typer.Option("--quant", "-q", help="Of a GGUF file to take, or to convert to; Q8_0 without it.")
    ] = None,
    bits: Annotated[
        int | None, typer.Option("--bits", "-b", help="The same of an ONNX folder: 32, 16, 8 or 4; 8 without it.")
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="What to call it here.")] = None,
    keep_download: Annotated[
        bool, typer.Option(help="Keep what was downloaded in the Hugging Face cache, for other tools.")
    ] = True,
    as_json: JsonOption = False,
) -> None:
    """Get a model from the Hugging Face Hub or its cache; a checkpoint is converted. Stopped, it goes on later."""
    store, hub, converter = Store(), Hub(), choose_converter(kind, quant, bits)
    takes_any = kind is None and quant is None and bits is None
    with console.waiting(console.plain(f"asking for {reference}")):
        planned = plan(
            reference,
            store,
            hub,
            converter,
            file=file,
            format=None if takes_any else converter.format,
            quant=quant if bits is None else QUANTS[bits],
            name=name,
        )
    console.notes.print(console.plain(_in_words(planned)))
    with console.tracking_all() as progress:
        stored = pull(planned, store, hub, keep_download=keep_download, progress=progress)
    if as_json:
        console.emit(_describe(stored))
    else:
        console.say.print(f"{stored.name}: {as_size(stored.n_bytes)} in {stored.path}")


@models_app.command("show")
@command
def show_model(name: NameArgument, as_json: JsonOption = False) -> None:
    """Show what a model holds and where it came from."""
    stored = _default_model() if name == DEFAULT_NAME else Store().get(name)
    with open_model(stored.path) as opened:
        record = summary(opened)
    manifest = asdict(stored.manifest) if stored.manifest else None
    if as_json:
        console.emit({"name": stored.name, "path": str(stored.path), "manifest": manifest, **record})
        return
    config = record.pop("config")
    for facts in (config, record, {"path": stored.path, **(manifest or {"manifest": "none"})}):
        console.show_facts({key: brief(value) for key, value in facts.items()})
        console.say.print()


@models_app.command("rm")
@command
def remove_model(
    name: NameArgument,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Remove a model from the models folder; what the Hugging Face cache has of it stays."""
    store = Store()
    if name == DEFAULT_NAME:
        raise RequestError(f"{name} belongs to the package; it goes with: pip uninstall localdepth")
    stored = store.get(name)
    if not yes and not _agrees(f"Remove {stored.path}, {as_size(stored.n_bytes)}?"):
        raise RequestError(f"{name} stays; add --yes if it is to go")
    freed = store.remove(name)
    if as_json:
        console.emit({"removed": name, "freed_bytes": freed})
    else:
        shared = "" if freed else "; the Hugging Face cache, or whatever the link points to, still holds its bytes"
        console.say.print(console.plain(f"removed {name}, {as_size(freed)} freed{shared}"))


@models_app.command("verify")
@command
def verify_models(
    name: Annotated[str | None, typer.Argument(help="One model; all without it.")] = None,
    as_json: JsonOption = False,
) -> int:
    """Compare models with the checksums in their manifests; exit code 1 unless all are sound."""
    store = Store()
    wanted = store.models() if name is None else [] if name == DEFAULT_NAME else [store.get(name)]
    with console.tracking_all() as progress:
        verdicts = {stored.name: stored.verify(progress) for stored in wanted}
    if name == DEFAULT_NAME:  # which has its checksum inside
        with open_model(locate(None)) as opened:
            verdicts[name] = Verdict.SOUND if opened.is_intact() else Verdict.DAMAGED
    if as_json:
        console.emit({"models": verdicts})
    else:
        console.show_facts(verdicts or {"nothing": f"no models in {store.folder}"})
    return 0 if set(verdicts.values()) <= {Verdict.SOUND} else CHECK_FAILED


def _agrees(question: str) -> bool:
    """What a person at the terminal answers; no where nobody can."""
    if not (sys.stdin and sys.stdin.isatty()):
        return False
    try:
        return typer.confirm(console.plain(question), err=True)
    except typer.Abort:
        raise KeyboardInterrupt from None


def _in_words(planned: Plan) -> str:
    repository = planned.repository
    place = " in the cache" if repository.is_cached else ""
    converted = f", converted to {planned.converter.quant}" if planned.converter else ""
    return (
        f"{repository.repo}{place} at {repository.commit[:12]}, licence {repository.license or 'not named'}: "
        f"{as_size(planned.n_download)} to download; becomes the {planned.format.in_words} {planned.name}{converted}, "
        f"{as_size(planned.n_result)}"
    )


def _default_model() -> Stored:
    path = locate(None)
    return Stored(DEFAULT_NAME, path, n_bytes_of(path), None)


def _kind(file: str | None) -> str:
    """What there is to import, in a word or by its name."""
    return {None: "checkpoint", ROOT: Format.ONNX.in_words}.get(file) or str(file)


def _describe(stored: Stored) -> dict[str, Any]:
    """A line of the list; a model that cannot be read has an error in place of its facts."""
    manifest = stored.manifest
    record: dict[str, Any] = {
        "name": stored.name,
        "path": str(stored.path),
        "n_bytes": stored.n_bytes,
        "format": stored.path.suffix[1:],
        "quant": None,
        "n_params": None,
        "default_depth": None,
        "max_depth": None,
        "license": manifest and manifest.license,
        "check": None,
        "from": manifest.repo if manifest else Verdict.NO_MANIFEST,
        "error": None,
    }
    try:
        with open_model(stored.path) as opened:
            config, check = opened.config, opened.check
            record |= {
                "quant": quant_of(opened),
                "n_params": config.n_params,
                "default_depth": config.default_depth,
                "max_depth": config.max_depth,
                "license": record["license"] or opened.provenance.get("license"),
                "check": check and check.status,
            }
    except LocalDepthError as error:
        record["error"] = str(error)
    return record
