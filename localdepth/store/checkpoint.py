"""A checkpoint in a repository: the files it takes, what its ``config.json`` says, and how it comes here whole."""

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from localdepth.errors import CheckpointError, MachineError, StorageError
from localdepth.memory import as_size
from localdepth.store.disk import Progress, silent
from localdepth.store.hub import Hub, Repository, parse_reference

__all__ = [
    "CONFIG",
    "TEXTS",
    "existing",
    "fetch_checkpoint",
    "list_some",
    "read_json",
    "require",
    "shapes_of",
    "small_files",
    "texts_of",
    "weights_of",
]

CONFIG = "config.json"
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
TEXTS = (  # what goes with the weights wherever they go
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "README.md",
    "LICENSE",
    "LICENSE.txt",
    "LICENSE.md",
    "NOTICE",
    "USE_POLICY.md",
)
_LARGEST_JSON, _LARGEST_TEXT = 1 << 26, 1 << 28  # bytes; some tokenizers have tens of megabytes

Shapes = Mapping[str, tuple[int, ...]]


def fetch_checkpoint(
    reference: str,
    hub: Hub,
    judge: Callable[[Mapping[str, Any], Shapes, str], None],
    progress: Progress = silent,
) -> Path:
    """The folder of a checkpoint in the Hugging Face cache, after downloading what is missing there.

    Args:
        reference: ``owner/name`` or ``owner/name@revision``.
        judge: is shown the record, the tensors' shapes and the reference before the weights are downloaded, and
            raises what it has against them.
    Raises:
        RequestError, ModelFileError: no such repository.
        CheckpointError: it holds no checkpoint; what ``judge`` raises passes.
        MachineError, StorageError: no connection, or no room.
    """
    repository = hub.look(*parse_reference(reference))
    texts, record = texts_of(repository), read_json(repository, hub, CONFIG)
    weights = weights_of(repository, hub)
    if any(hub.n_missing(repository, name) for name in weights):
        judge(record, shapes_of(repository, hub, weights), reference)
    names = (*texts, *weights)
    n_bytes, place = sum(hub.n_missing(repository, name) for name in names), existing(hub.cache)
    free = shutil.disk_usage(place).free
    if n_bytes > free:
        raise StorageError(
            f"{reference} needs {as_size(n_bytes)} in {place}, which has {as_size(free)} free; free space there, or "
            "set HF_HOME"
        )
    paths = [hub.fetch(repository, name, progress) for name in names]
    hub.remember(repository)
    return paths[0].parent


def texts_of(repository: Repository) -> tuple[str, ...]:
    """The small files of a checkpoint that are there, ``config.json`` first.

    Raises:
        CheckpointError: it is no checkpoint.
    """
    if CONFIG not in repository.files:
        raise CheckpointError(
            f"{repository.repo} holds neither a model file or folder nor a checkpoint with {CONFIG}; it has "
            f"{list_some(sorted(repository.files))}"
        )
    return small_files(repository, (CONFIG, *TEXTS, _INDEX))


def small_files(repository: Repository, names: Iterable[str]) -> tuple[str, ...]:
    """Those of ``names`` that are there, each once.

    Raises:
        CheckpointError: one of them is large.
    """
    found = tuple(name for name in dict.fromkeys(names) if name in repository.files)
    if large := [name for name in found if repository.files[name].n_bytes > _LARGEST_TEXT]:
        raise CheckpointError(
            f"{large[0]} in {repository.repo} is larger than any such file should be; pull another repository"
        )
    return found


def require(repository: Repository, names: Iterable[str], index: str) -> None:
    """Check that the files which ``index`` names are there, beside it.

    Raises:
        CheckpointError: one is not.
        MachineError: it is missing in the cache, and the Hub cannot be asked.
    """
    repo, place = repository.repo, PurePosixPath(index).parent
    for name in names:
        if name in repository.files and PurePosixPath(name).parent == place:
            continue
        if repository.is_cached:
            raise MachineError(
                f"the Hugging Face cache lacks {name!r:.120} of {repo} and the Hub cannot be asked; connect, then try "
                "again"
            )
        raise CheckpointError(f"{index} in {repo} names {name!r:.120}, which is not beside it; pull another one")


def read_json(repository: Repository, hub: Hub, name: str) -> dict[str, Any]:
    """What a file such as ``config.json`` says.

    Raises:
        CheckpointError: it is no JSON object.
    """
    where = f"{name} in {repository.repo}"
    if repository.files[name].n_bytes > _LARGEST_JSON:
        raise CheckpointError(f"{where} is larger than any such file should be; pull another repository")
    try:
        record = json.loads(hub.fetch(repository, name).read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is not valid JSON: {error}; pull another repository") from error
    if not isinstance(record, dict):
        raise CheckpointError(f"{where} must hold a JSON object; pull another repository")
    return record


def weights_of(repository: Repository, hub: Hub) -> list[str]:
    """The files that hold the weights, each of which is there.

    Raises:
        CheckpointError: there are none, or some are missing.
        MachineError: they are missing in the cache, and the Hub cannot be asked.
    """
    repo, there = repository.repo, repository.files
    if _INDEX in there:
        named = read_json(repository, hub, _INDEX).get("weight_map")
        if not isinstance(named, dict) or not all(isinstance(name, str) for name in named.values()):
            raise CheckpointError(f"{_INDEX} in {repo} has no weight_map of file names; pull another repository")
        names = sorted(set(named.values()))
    elif _WEIGHTS in there or repository.is_cached:
        names = [_WEIGHTS]
    else:
        raise CheckpointError(
            f"{repo} has no safetensors weights, it has {list_some(sorted(there))}; pickled weights are not read, "
            "convert them to safetensors"
        )
    require(repository, names, _INDEX)
    return names


def shapes_of(repository: Repository, hub: Hub, weights: list[str]) -> Shapes:
    """Shapes of all tensors, of which only the headers are fetched."""
    return {tensor: shape for name in weights for tensor, shape in hub.tensors(repository, name).items()}


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    return next(place for place in (folder.absolute(), *folder.absolute().parents) if place.is_dir())


def list_some(names: list[str]) -> str:
    """The first few of ``names`` for an error message."""
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "") if names else "nothing"
