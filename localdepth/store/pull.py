"""Pull a model as planned: download what is missing, convert a checkpoint on arrival, put it into the store.

Whenever a pull is stopped, what has been downloaded stays in the cache, nothing that looks like a model stays in the
folder, and the next pull goes on.
"""

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from localdepth.errors import LocalDepthError
from localdepth.gguf import read
from localdepth.record import quant_of
from localdepth.store.checkpoint import CONFIG
from localdepth.store.folder import Manifest, Progress, Store, Stored, Verdict, digest, silent, storage
from localdepth.store.hub import Hub, Repository
from localdepth.store.plan import DEFAULT_QUANT, Converter, Plan

__all__ = ["Importable", "importable", "pull"]


@dataclass(frozen=True, slots=True)
class Importable:
    """A model in the Hugging Face cache that ``pull`` can take without a network.

    Attributes:
        reference: what to pull.
        file: the GGUF file; None for a checkpoint, which will be converted.
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
            made = folder / f"{planned.name}.gguf"
            if planned.converter:
                source = f"{repository.repo}@{repository.commit}"
                planned.converter.convert(paths[0].parent, made, planned.quant, source, repository.license, progress)
            else:
                read(paths[0]).close()  # refuses what is not ours
                _take(paths[0], made, progress)
            stored = store.put(made, planned.name, _manifest(planned, made, progress))
            hub.remember(repository)
    if not keep_download:
        hub.forget(repository)
    return stored


def importable(store: Store, hub: Hub, converter: Converter | None) -> Iterator[Importable]:
    """Looped models in the Hugging Face cache that are not in the store."""
    taken = {(m.repo, m.commit, m.file) for stored in store.models() if (m := stored.manifest)}
    for repository in hub.cached():
        reference = repository.repo if repository.revision == "main" else f"{repository.repo}@{repository.revision}"
        for name in _usable(repository, hub, converter):
            if (repository.repo, repository.commit, name) not in taken:
                taken.add((repository.repo, repository.commit, name))
                files = [repository.files[name]] if name else repository.files.values()
                yield Importable(reference, name, sum(file.n_bytes for file in files))


def _usable(repository: Repository, hub: Hub, converter: Converter | None) -> Iterator[str | None]:
    """GGUF files of ours in a cached repository, and None for a checkpoint that can be converted."""
    for name in sorted(repository.files):
        path = hub.held(repository, name)
        try:
            if path and name.endswith(".gguf"):
                read(path).close()
                yield name
            elif path and name == CONFIG and converter:
                converter.weigh_folder(path.parent, DEFAULT_QUANT)
                yield None
        except LocalDepthError:  # somebody else's model
            continue


def _at_hand(planned: Plan, store: Store, progress: Progress) -> Stored | None:
    """The planned model, where the store has it sound."""
    for stored in store.models():
        manifest = stored.manifest
        if stored.name != planned.name or manifest is None or manifest.commit != planned.repository.commit:
            continue
        same = manifest.quant == planned.quant if planned.converter else manifest.file == planned.files[0]
        if same and stored.verify(progress) is Verdict.SOUND:
            return stored
    return None


def _take(source: Path, made: Path, progress: Progress) -> None:
    """Give a file of the cache a second name, or copy it where the store is on another file system."""
    with storage(made, "written"):
        try:
            os.link(source.resolve(), made)
        except OSError:
            progress(f"copying {source.name}", 0, 0)
            shutil.copyfile(source, made)


def _manifest(planned: Plan, made: Path, progress: Progress) -> Manifest:
    repository = planned.repository
    file = None if planned.converter else planned.files[0]
    with read(made) as opened:
        given = opened.provenance.get("license")
        quant = quant_of(opened)
    return Manifest(
        sha256=(repository.files[file].sha256 if file else None) or digest(made, progress),
        n_bytes=made.stat().st_size,
        repo=repository.repo,
        revision=repository.revision,
        commit=repository.commit,
        file=file,
        quant=quant,
        license=repository.license or (given if isinstance(given, str) else None),
        pulled=datetime.now(UTC).isoformat(timespec="seconds"),
    )
