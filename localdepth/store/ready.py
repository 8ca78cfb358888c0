"""Models in a repository that are taken as they are: GGUF files, and folders of ONNX graphs.

A folder is known by its record, which also says what it consists of; that, and that the weights have the size it
implies, is checked here, before they are downloaded.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

from localdepth.errors import ConfigError, ModelFileError
from localdepth.onnx_folder.layout import QUANTS, WEIGHTS, Layout
from localdepth.onnx_folder.record import CONFIG, FORMAT, OnnxRecord, graph_file
from localdepth.store.checkpoint import TEXTS, read_json, require, small_files
from localdepth.store.disk import Format
from localdepth.store.hub import Hub, Repository

__all__ = ["ROOT", "Ready", "ready_models"]

ROOT = "."  # where a model is that is the repository itself
_GENAI_CONFIG = "genai_config.json"  # what onnxruntime-genai reads


@dataclass(frozen=True, slots=True)
class Ready:
    """A model in a repository.

    Attributes:
        where: the file, or the folder.
        name: what to call it.
        quants: words, in small letters, one of which is the quant of its matrices.
        files: what it consists of, with their names in the repository.
    """

    format: Format
    where: str
    name: str
    quants: frozenset[str]
    files: tuple[str, ...]


def ready_models(repository: Repository, hub: Hub) -> list[Ready]:
    """All there are, files first.

    Raises:
        ModelFileError: a folder is damaged or from another version.
        CheckpointError: a folder lacks files, or its record is no JSON.
        MachineError: the Hub cannot be asked.
    """
    return [*_files(repository), *_folders(repository, hub)]


def _files(repository: Repository) -> Iterator[Ready]:
    for name in sorted(repository.files):
        if name.endswith(f".{Format.GGUF}"):
            words = frozenset(re.split(r"[/.-]", name.lower()))
            yield Ready(Format.GGUF, name, PurePosixPath(name).stem, words, (name,))


def _folders(repository: Repository, hub: Hub) -> Iterator[Ready]:
    for name in sorted(repository.files):
        path = PurePosixPath(name)
        if path.name == graph_file("pass") and str(path.with_name(CONFIG)) in repository.files:
            record = read_json(repository, hub, str(path.with_name(CONFIG)))
            if record.get("format") == FORMAT:
                yield _folder(repository, path.parent, record)


def _folder(repository: Repository, place: PurePosixPath, record: dict[str, object]) -> Ready:
    where = f"{place / CONFIG} in {repository.repo}"
    try:
        known = OnnxRecord.from_dict(record)
        n_bytes = Layout(known.config, known.bits).end
    except ConfigError as error:
        raise ModelFileError(f"{where}: {error}; pull another repository, or upgrade localdepth") from error
    inside = {name: str(place / name) for name in (CONFIG, *known.checksums, *TEXTS, _GENAI_CONFIG)}
    require(repository, (inside[name] for name in known.checksums), str(place / CONFIG))
    weights = inside.pop(WEIGHTS)
    if (held := repository.files[weights].n_bytes) != n_bytes:
        raise ModelFileError(
            f"{weights} in {repository.repo} has {held} bytes, a model of its sizes {n_bytes}; pull another repository"
        )
    said = known.provenance.get("quant")
    quant = said if isinstance(said, str) else QUANTS[max(known.bits.values())]
    return Ready(
        format=Format.ONNX,
        where=str(place),
        name=f"{repository.repo.rpartition('/')[2]}-{quant}",
        quants=frozenset({quant.partition(",")[0].lower()}),
        files=(*small_files(repository, inside.values()), weights),
    )
