"""Models on this machine: ``models list``, ``pull``, ``show``, ``rm``, ``verify``."""

import sys
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import typer

from localdepth import console
from localdepth.cli.common import CHECK_FAILED, app, brief, command
from localdepth.cli.options import JsonOption
from localdepth.config import ModelConfig
from localdepth.engine.ggml.lib import library
from localdepth.errors import LocalDepthError, RequestError
from localdepth.gguf import read
from localdepth.loading import DEFAULT_MODEL
from localdepth.memory import as_size
from localdepth.record import quant_of, summary
from localdepth.store.folder import DEFAULT_NAME, Progress, Store, Stored, Verdict
from localdepth.store.hub import Hub
from localdepth.store.plan import Converter, Plan, plan
from localdepth.store.pull import importable, pull

__all__ = ["Exporter", "list_models", "models_app", "pull_model", "remove_model", "show_model", "verify_models"]

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
        others = [asdict(found) for found in importable(store, Hub(), _converter())]
    if as_json:
        console.emit({"folder": str(store.folder), "models": rows, "importable": others})
        return
    console.show_table(
        ("name", "size", "quant", "parameters", "depth", "licence", "parity", "from"),
        [
            (
                row["name"],
                as_size(row["n_bytes"]),
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
            [(found["reference"], as_size(found["n_bytes"]), found["file"] or "checkpoint") for found in others],
            "in the Hugging Face cache",
        )


@models_app.command("pull")
@command
def pull_model(
    reference: Annotated[str, typer.Argument(help="OWNER/NAME or OWNER/NAME@REVISION on the Hugging Face Hub.")],
    file: Annotated[str | None, typer.Option("--file", help="Which GGUF file, where there are several.")] = None,
    quant: Annotated[
        str | None, typer.Option("--quant", "-q", help="Of the file to take, or to convert to; Q8_0 without it.")
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="What to call it here.")] = None,
    keep_download: Annotated[
        bool, typer.Option(help="Keep what was downloaded in the Hugging Face cache, for other tools.")
    ] = True,
    as_json: JsonOption = False,
) -> None:
    """Get a model from the Hugging Face Hub or its cache; a checkpoint is converted. Stopped, it goes on later."""
    store, hub = Store(), Hub()
    with console.waiting(console.plain(f"asking for {reference}")):
        planned = plan(reference, store, hub, file=file, quant=quant, name=name, converter=_converter())
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
    with read(stored.path) as opened:
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
    wanted = [store.get(name)] if name is not None else store.models()
    with console.tracking_all() as progress:
        verdicts = {stored.name: stored.verify(progress) for stored in wanted}
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
    becomes = f"{planned.name}, converted to {planned.quant}" if planned.converter else planned.name
    return (
        f"{repository.repo}{place} at {repository.commit[:12]}, licence {repository.license or 'not named'}: "
        f"{as_size(planned.n_download)} to download; becomes {becomes}, {as_size(planned.n_result)}"
    )


def _default_model() -> Stored:
    path = Path(str(files("localdepth") / "models" / DEFAULT_MODEL))
    return Stored(path, path.stat().st_size, None)


def _describe(stored: Stored) -> dict[str, Any]:
    """A line of the list; a file that cannot be read has an error in place of its facts."""
    manifest = stored.manifest
    record: dict[str, Any] = {
        "name": stored.name,
        "path": str(stored.path),
        "n_bytes": stored.n_bytes,
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
        with read(stored.path) as opened:
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


class Exporter:
    """The exporter, as the store wants it."""

    def spell(self, quant: str) -> str:
        from localdepth_export.recipe import Recipe

        return str(Recipe.parse(quant))

    def weigh(self, record: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], where: str, quant: str) -> int:
        from localdepth_train.checkpoint.layouts import recognise

        return self._n_bytes(recognise(record, shapes, Path(where)).config, quant)

    def weigh_folder(self, folder: Path, quant: str) -> int:
        from localdepth_train.checkpoint import Checkpoint

        return self._n_bytes(Checkpoint(folder).config, quant)

    def convert(
        self, folder: Path, out: Path, quant: str, source: str, license_name: str | None, progress: Progress
    ) -> None:
        from localdepth_export.convert import to_gguf

        shown = partial(progress, f"converting to {quant}")
        to_gguf(folder, out, quant=quant, source=source, license_name=license_name, on_progress=shown)

    def _n_bytes(self, config: ModelConfig, quant: str) -> int:
        from localdepth_export.recipe import Recipe

        library()  # what quantises: if it is missing, say so before the download
        quants, _ = Recipe.parse(quant).choose(config)
        return sum(quants[name].n_bytes(shape) for name, shape in config.tensors().items())


def _converter() -> Converter | None:
    """The exporter, where what it needs is installed."""
    try:
        import localdepth_export.convert  # noqa: F401
    except ModuleNotFoundError:
        return None
    return Exporter()
