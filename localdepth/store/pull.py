"""Pull a model as planned: download what is missing, convert a checkpoint on arrival, put it into the store.

Whenever a pull is stopped, what has been downloaded stays in the cache, nothing that looks like a model stays in the
folder, and the next pull goes on.
"""

import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from localdepth.errors import LocalDepthError, ModelFileError
from localdepth.record import quant_of
from localdepth.store.checkpoint import CONFIG
from localdepth.store.disk import Format, Progress, checksum, n_bytes_of, open_model, silent, storage
from localdepth.store.folder import Manifest, Store, Stored, Verdict
from localdepth.store.hub import Hub, Repository
from localdepth.store.plan import Converter, Plan
from localdepth.store.ready import ROOT, ready_models

__all__ = ["Importable", "importable", "pull"]


@dataclass(frozen=True, slots=True)
class Importable:
    """A model in the Hugging Face cache that ``pull`` can take without a network.

    Attributes:
        reference: what to pull.
        file: the GGUF file or ONNX folder, "." for all of the repository; None for a checkpoint, to be converted.
        n_bytes: in the cache.
    """

    reference: str
    file: str | None
    n_bytes: int


def pull(
    planned: Plan,
    store: Store,
    hub: Hub,
    *,
    keep_download: bool = True,
    progress: Progress = silent,
) -> Stored:
    """Carry out a plan. A model that is already there, whole, is left as it is; a damaged one is made again.

    Args:
        keep_download: False removes the commit from the Hugging Face cache when the model is in its place.
    Raises:
        LocalDepthError: as ``plan``; nothing has changed in the store.
    """
    repository = planned.repository
    with store.staging(planned.name, progress) as folder:
        stored = _at_hand(planned, store, progress)
        if stored is None:
            paths = [hub.fetch(repository, name, progress) for name in planned.files]
            made = folder / f"{planned.name}.{planned.format}"
            if planned.converter:
                source = f"{repository.repo}@{repository.commit}"
                planned.converter.convert(paths[0].parent, made, source, repository.license, progress)
            else:
                _take(paths, made, planned.format, progress)
            stored = store.put(made, _manifest(planned, made, progress))
            hub.remember(repository)
    if not keep_download:
        hub.forget(repository)
    return stored


def importable(store: Store, hub: Hub, converter: Converter) -> Iterator[Importable]:
    """Looped models in the Hugging Face cache that are not in the store."""
    taken = {(m.repo, m.commit, m.file) for stored in store.models() if (m := stored.manifest)}
    for repository in hub.cached():
        reference = repository.repo if repository.revision == "main" else f"{repository.repo}@{repository.revision}"
        for where, files in _usable(repository, hub, converter):
            if (repository.repo, repository.commit, where) not in taken:
                taken.add((repository.repo, repository.commit, where))
                yield Importable(reference, where, sum(repository.files[name].n_bytes for name in files))


def _usable(repository: Repository, hub: Hub, converter: Converter) -> Iterator[tuple[str | None, Sequence[str]]]:
    """Models of ours in a cached repository and their files, or None for a checkpoint that can be converted."""
    try:
        there = ready_models(repository, hub)
    except LocalDepthError:  # a folder that came in part
        return
    for ready in there:
        if ready.format is Format.ONNX or _is_ours(hub.held(repository, ready.where)):
            yield ready.where, ready.files
    config = hub.held(repository, CONFIG)
    if config and ROOT not in {ready.where for ready in there}:
        try:
            converter.weigh_folder(config.parent)
        except LocalDepthError:  # somebody else's model, or no exporter
            return
        yield None, tuple(repository.files)


def _is_ours(path: Path | None) -> bool:
    try:
        if path:
            open_model(path).close()
    except ModelFileError:
        return False
    return path is not None


def _at_hand(planned: Plan, store: Store, progress: Progress) -> Stored | None:
    """The planned model, where the store has it sound."""
    wanted = planned.repository.commit, planned.taken
    for stored in store.models():
        manifest = stored.manifest
        if stored.path.name != f"{planned.name}.{planned.format}" or manifest is None:
            continue
        same = (manifest.commit, manifest.file) == wanted
        same &= planned.converter is None or planned.converter.quant == manifest.quant
        if same and stored.verify(progress) is Verdict.SOUND:
            return stored
    return None


def _take(sources: Sequence[Path], made: Path, kind: Format, progress: Progress) -> None:
    """Give files of the cache a second name, or copy them where the store is on another file system."""
    with storage(made, "written"):
        if kind is Format.ONNX:
            made.mkdir()
        for source in sources:
            place = made if kind is Format.GGUF else made / source.name
            try:
                os.link(source.resolve(), place)
            except OSError:
                progress(f"copying {source.name}", 0, 0)
                shutil.copyfile(source, place)


def _manifest(planned: Plan, made: Path, progress: Progress) -> Manifest:
    """Where a model came from, once it has proved to be one, and whole.

    Raises:
        ModelFileError: it has not.
    """
    repository = planned.repository
    try:
        with open_model(made) as opened:
            if opened.is_intact() is False:
                raise ModelFileError("weights or graphs are not what its checksums say")
            given, quant = opened.provenance.get("license"), quant_of(opened)
    except ModelFileError as error:
        raise ModelFileError(f"{repository.repo} holds no sound model: {error}") from error
    return Manifest(
        sha256=checksum(made, progress),
        n_bytes=n_bytes_of(made),
        repo=repository.repo,
        revision=repository.revision,
        commit=repository.commit,
        file=planned.taken,
        quant=quant,
        license=repository.license or (given if isinstance(given, str) else None),
        pulled=datetime.now(UTC).isoformat(timespec="seconds"),
    )
