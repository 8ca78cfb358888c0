"""What a pull will do, decided before anything large is downloaded.

The repository's description, ``config.json`` and the headers of the weights are small; from them it is judged whether
the model can be run, and whether it has room. The exporter is handed in: the runtime knows no checkpoints.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from localdepth.config import PLAIN_MODELS, plain_model
from localdepth.errors import CheckpointError, ModelFileError, RequestError, StorageError
from localdepth.gguf import ARCHITECTURE
from localdepth.memory import as_size
from localdepth.store.checkpoint import CONFIG, existing, list_some, read_json, shapes_of, texts_of, weights_of
from localdepth.store.disk import HOME, Format, Progress
from localdepth.store.folder import Store, model_name
from localdepth.store.hub import Hub, Repository, parse_reference
from localdepth.store.ready import ROOT, Ready, ready_models

__all__ = ["Converter", "Plan", "plan"]


class Converter(Protocol):
    """Turns checkpoints into models of one kind, with their numbers stored in one way.

    All of it raises MissingExtra where the exporter is not installed.
    """

    @property
    def format(self) -> Format:
        """What it makes."""

    @property
    def quant(self) -> str:
        """How numbers are stored, as models say it.

        Raises:
            ConfigError: there is no such quant.
        """

    def weigh(self, record: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], where: str) -> int:
        """Bytes of the weights of what a checkpoint becomes, from its config.json and its tensors' shapes.

        Raises:
            CheckpointError: it is no model that can be read; ``where`` names it.
        """

    def weigh_folder(self, folder: Path) -> int:
        """The same for a checkpoint that is on this machine."""

    def convert(self, folder: Path, out: Path, source: str, license_name: str | None, progress: Progress) -> None:
        """Write the checkpoint in ``folder``, which came from ``source``, as ``out``."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a pull will do.

    Attributes:
        name: of the model in the store.
        format: of the model in the store.
        taken: the file or folder of the repository that the model is; None for a checkpoint.
        files: what is needed of the repository; the first of a checkpoint lies in its folder.
        converter: for a checkpoint; None for a model, which is taken as it is.
        n_download: bytes that are not in the cache yet.
        n_result: bytes of the model, about.
    """

    name: str
    format: Format
    repository: Repository
    taken: str | None
    files: tuple[str, ...]
    converter: Converter | None
    n_download: int
    n_result: int


def plan(
    reference: str,
    store: Store,
    hub: Hub,
    converter: Converter,
    *,
    file: str | None = None,
    format: Format | None = None,  # noqa: A002  # what users know it as
    quant: str | None = None,
    name: str | None = None,
) -> Plan:
    """Decide what to pull, and refuse what will not do before anything large is downloaded.

    What is ready is taken before what has to be converted; of two kinds, the one that ``converter`` makes.

    Args:
        reference: ``owner/name`` or ``owner/name@revision``.
        converter: for checkpoints.
        file: the GGUF file or ONNX folder to take, where the repository has several.
        format: takes none but these; None takes any.
        quant: takes none but these, as names of files and records of folders say; None takes any.
        name: of the model in the store; None makes one from the repository's or the file's.
    Raises:
        RequestError: the reference, the file or the name cannot be meant.
        ModelFileError, CheckpointError, ConfigError: nothing there that can be run.
        MissingExtra: it is a checkpoint, and the exporter is not installed.
        MachineError, StorageError: no connection, or no room.
    """
    repository = hub.look(*parse_reference(reference))
    there = ready_models(repository, hub)
    ready = _choose(repository, there, converter.format, file, format, quant)
    made = _plan_ready(repository, hub, ready) if ready else _plan_checkpoint(repository, hub, converter)
    if name is not None and model_name(name) != name:
        raise RequestError(f"name={name!r:.120} holds characters that files may not have; try {model_name(name)}")
    made = replace(made, name=name or model_name(made.name))
    _check_name(made, store)
    _check_room(made, store, hub)
    return made


def _choose(
    repository: Repository,
    there: Sequence[Ready],
    preferred: Format,
    file: str | None,
    kind: Format | None,
    quant: str | None,
) -> Ready | None:
    """The model to take; None where a checkpoint is to be converted."""
    repo = repository.repo
    fitting = [
        ready
        for ready in there
        if file in (None, ready.where)
        and kind in (None, ready.format)
        and (quant is None or quant.lower() in ready.quants)
    ]
    best = [ready for ready in fitting if ready.format is preferred] or fitting
    if len(best) > 1:
        raise RequestError(f"{repo} has several models: {_listed(best)}; choose one with --file")
    is_checkpoint = CONFIG in repository.files and ROOT not in {ready.where for ready in there}
    if not best and (file is not None or (there and not is_checkpoint)):
        wanted = kind.in_words if kind else "model"
        called = "" if file is None else f" {file!r:.120}"
        of_quant = "" if quant is None else f" of quant {quant!r:.40}"
        raise RequestError(f"{repo} has no {wanted}{called}{of_quant}; it has {_listed(there)}")
    return best[0] if best else None


def _listed(there: Sequence[Ready]) -> str:
    return list_some([f"{ready.where} (all of it)" if ready.where == ROOT else ready.where for ready in there])


def _plan_ready(repository: Repository, hub: Hub, ready: Ready) -> Plan:
    """Take a model, unless the Hub knows it to be of another kind; all else is judged after the download."""
    kind = repository.architecture if ready.format is Format.GGUF else None
    if kind is not None and kind.startswith(PLAIN_MODELS):
        raise ModelFileError(f"{repository.repo} holds a {plain_model(kind, 'BASE, its original checkpoint,')}")
    if kind not in (None, ARCHITECTURE):
        raise ModelFileError(
            f"{repository.repo} holds GGUF files of architecture {kind!r:.40}, not {ARCHITECTURE!r}; pull its "
            "checkpoint, or a file made by `localdepth export gguf`"
        )
    return Plan(
        name=ready.name,
        format=ready.format,
        repository=repository,
        taken=ready.where,
        files=ready.files,
        converter=None,
        n_download=sum(hub.n_missing(repository, name) for name in ready.files),
        n_result=sum(repository.files[name].n_bytes for name in ready.files),
    )


def _plan_checkpoint(repository: Repository, hub: Hub, converter: Converter) -> Plan:
    repo, texts = repository.repo, texts_of(repository)
    record = read_json(repository, hub, CONFIG)
    kind = record.get("model_type")
    if isinstance(kind, str) and kind.startswith(PLAIN_MODELS):
        raise CheckpointError(f"{repo} holds a {plain_model(kind, 'BASE, this repository,')}")
    quant = converter.quant
    weights = weights_of(repository, hub)
    if any(hub.n_missing(repository, name) for name in weights):
        n_weights = converter.weigh(record, shapes_of(repository, hub, weights), repo)
    else:
        n_weights = converter.weigh_folder(hub.fetch(repository, CONFIG).parent)
    files = (*texts, *weights)
    return Plan(
        name=f"{repo.rpartition('/')[2]}-{quant}",
        format=converter.format,
        repository=repository,
        taken=None,
        files=files,
        converter=converter,
        n_download=sum(hub.n_missing(repository, name) for name in files),
        n_result=n_weights + sum(repository.files[name].n_bytes for name in texts),
    )


def _check_name(planned: Plan, store: Store) -> None:
    """Refuse to replace a model that came from elsewhere, and to have two of one name."""
    for stored in store.models():
        known = stored.manifest and stored.manifest.repo
        is_same = known == planned.repository.repo and stored.path.suffix == f".{planned.format}"
        if stored.path.stem.casefold() == planned.name.casefold() and not is_same:
            raise RequestError(
                f"there is a model {stored.path.name} {f'from {known}' if known else 'without a manifest'} in "
                f"{store.folder}; choose another name with --name, or remove it"
            )


def _check_room(planned: Plan, store: Store, hub: Hub) -> None:
    """Refuse what does not fit on the disks of the cache and of the store."""
    cache, folder = existing(hub.cache), existing(store.folder)
    one_disk = cache.stat().st_dev == folder.stat().st_dev
    n_result = 0 if one_disk and planned.converter is None else planned.n_result  # files are linked, not copied
    wanted = {cache: planned.n_download, folder: n_result}
    if one_disk:
        wanted = {folder: planned.n_download + n_result}
    for place, n_bytes in wanted.items():
        free = shutil.disk_usage(place).free
        if n_bytes > free:
            raise StorageError(
                f"{planned.repository.repo} needs {as_size(n_bytes)} in {place}, which has {as_size(free)} free "
                f"({as_size(planned.n_download)} to download, {as_size(n_result)} for the model); free space there, or "
                f"set HF_HOME for downloads and {HOME} for models"
            )
