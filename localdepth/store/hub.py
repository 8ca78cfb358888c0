"""What the Hugging Face Hub has, and what of it lies in the cache that all its tools share.

huggingface_hub does the talking: endpoint, cache, token and offline mode are what its environment variables say. Its
recent versions throw away a file that arrived only in part (huggingface_hub issue 4196), so large files are fetched
here, into the partial file that earlier versions went on from, checked, and put where the cache wants them; the library
then links them. It is imported inside functions: ``ask`` does not wait for that.

    <cache>/models--<owner>--<name>/blobs/<sha256>               a whole file
                                    blobs/<sha256>.incomplete    the beginning of one
                                    refs/<revision>              the commit a branch or tag was at when last asked
                                    snapshots/<commit>/<file>    links to the blobs
"""

import io
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, cast

from localdepth.errors import (
    CheckpointError,
    LocalDepthError,
    MachineError,
    ModelFileError,
    RequestError,
    StorageError,
)
from localdepth.store.disk import Progress, digest, silent, storage

if TYPE_CHECKING:
    from huggingface_hub import CachedRevisionInfo, ModelInfo

__all__ = ["Hub", "RemoteFile", "Repository", "parse_reference"]

_SHA256 = re.compile(r"[0-9a-f]{64}")
_PARTIAL = ".incomplete"
_TIMEOUT_S = 30.0  # for a repository's description, which is small


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of a repository; ``sha256`` is None for small ones, which Git keeps itself."""

    name: str
    n_bytes: int
    sha256: str | None


@dataclass(frozen=True, slots=True)
class Repository:
    """A repository at one commit.

    Attributes:
        architecture: of its GGUF files, where the Hub has read them.
        files: by name; those with a name that could lead out of a folder are left out.
        is_cached: the Hub was not asked; ``files`` are those in the cache.
    """

    repo: str
    revision: str
    commit: str
    license: str | None
    architecture: str | None
    files: Mapping[str, RemoteFile]
    is_cached: bool


def parse_reference(text: str) -> tuple[str, str]:
    """``REPO[@REVISION]`` as its two parts; a branch, a tag or a commit, "main" where none is given.

    Raises:
        RequestError: the revision cannot be one; the Hub judges the name.
    """
    repo, at, revision = text.partition("@")
    if at and not (re.fullmatch(r"[\w.+/-]+", revision) and _is_inside(revision)):
        raise RequestError(f"revision {revision!r:.120} is no branch, tag or commit; write it as owner/name@revision")
    return repo, revision or "main"


class Hub:
    """A Hub and a cache of it.

    Args:
        endpoint: address; None is HF_ENDPOINT or the public one.
        cache: folder; None is what HF_HUB_CACHE and HF_HOME say.
    """

    def __init__(self, endpoint: str | None = None, cache: str | os.PathLike[str] | None = None) -> None:
        from huggingface_hub import HfApi, constants

        self._api = HfApi(endpoint=endpoint)
        self.cache = Path(constants.HF_HUB_CACHE if cache is None else cache)

    def look(self, repo: str, revision: str) -> Repository:
        """What a repository holds; what the cache has of it when the Hub cannot be asked.

        Raises:
            ModelFileError: there is no such repository or revision, or it may not be read.
            MachineError: the Hub cannot be asked, and the cache does not have it.
        """
        try:
            with _talking(f"{repo}@{revision}"):
                info = self._api.model_info(repo, revision=revision, files_metadata=True, timeout=_TIMEOUT_S)
                return _described(info, repo, revision)
        except MachineError as error:
            for held in self.cached():
                if held.repo == repo and revision in (held.revision, held.commit):
                    return held
            raise MachineError(f"{error}. The cache in {self.cache} does not have it either") from error

    def cached(self) -> Iterator[Repository]:
        """The models in the cache, one for each revision: what its branch or tag is called, else its commit."""
        from huggingface_hub import scan_cache_dir
        from huggingface_hub.errors import CacheNotFound

        try:
            repos = scan_cache_dir(self.cache).repos
        except (CacheNotFound, ValueError):
            return
        for repo in sorted(repos, key=lambda repo: repo.repo_id):
            for snapshot in repo.revisions if repo.repo_type == "model" else ():
                files = {file.name: file for file in _snapshot_files(snapshot)}
                for revision in sorted(snapshot.refs) or [snapshot.commit_hash]:
                    yield Repository(repo.repo_id, revision, snapshot.commit_hash, None, None, files, is_cached=True)

    def held(self, repository: Repository, name: str) -> Path | None:
        """Where a file lies in the cache, or None."""
        from huggingface_hub import try_to_load_from_cache

        path = try_to_load_from_cache(repository.repo, name, self.cache, repository.commit)
        return Path(path) if isinstance(path, str) else None

    def n_missing(self, repository: Repository, name: str) -> int:
        """Bytes of a file that are still to be downloaded."""
        file = repository.files[name]
        if self.held(repository, name):
            return 0
        partial = self._folder(repository) / "blobs" / f"{file.sha256}{_PARTIAL}"
        return max(0, file.n_bytes - (partial.stat().st_size if partial.is_file() else 0))

    def tensors(self, repository: Repository, name: str) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors in a safetensors file, of which only the header is fetched.

        Raises:
            CheckpointError: no such header.
            ModelFileError, MachineError: as ``look``.
        """
        from huggingface_hub.errors import SafetensorsParsingError

        where = f"{repository.repo}/{name}"
        try:
            with _talking(where):
                header = self._api.parse_safetensors_file_metadata(repository.repo, name, revision=repository.commit)
        except SafetensorsParsingError as error:
            raise CheckpointError(f"{where} is no safetensors file: {error}") from error
        return {tensor: tuple(info.shape) for tensor, info in header.tensors.items()}

    def remember(self, repository: Repository) -> None:
        """Leave in the cache which commit the branch or tag is at, so that it is found there without the Hub.

        Raises:
            StorageError: the cache cannot be written.
        """
        ref = self._folder(repository) / "refs" / repository.revision
        if repository.revision == repository.commit or (ref.is_file() and ref.read_text() == repository.commit):
            return
        temporary = ref.with_name(f".{ref.name}.{repository.commit}")
        with storage(ref, "written", "HF_HOME"):
            ref.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(repository.commit)
            temporary.replace(ref)

    def fetch(self, repository: Repository, name: str, progress: Progress = silent) -> Path:
        """A file in the cache, downloaded where it is missing or damaged there; a download goes on where it broke off.

        Raises:
            ModelFileError: it does not have the checksum that the Hub names, or as ``look``.
            MachineError: the connection broke; what has arrived is kept for the next time.
            StorageError: the cache cannot be written.
        """
        file = repository.files[name]
        path = self.held(repository, name)
        if path and (file.sha256 is None or digest(path, progress, name) == file.sha256):
            return path
        if repository.is_cached:
            raise ModelFileError(
                f"{path or name} in the Hugging Face cache is damaged, and the Hub cannot be asked for it; "
                "connect, then try again"
            )
        if path:
            path.unlink()
        if file.sha256:
            self._download(repository, file, file.sha256, progress)
        return self._link(repository, name)

    def forget(self, repository: Repository) -> None:
        """Remove a commit's files from the cache; those that other commits share stay."""
        from huggingface_hub import scan_cache_dir

        if any(held.commit == repository.commit for held in self.cached()):
            with storage(self.cache, "cleared", "HF_HOME"):
                scan_cache_dir(self.cache).delete_revisions(repository.commit).execute()

    def _folder(self, repository: Repository) -> Path:
        from huggingface_hub.file_download import repo_folder_name

        return self.cache / repo_folder_name(repo_id=repository.repo, repo_type="model")

    def _download(self, repository: Repository, file: RemoteFile, sha256: str, progress: Progress) -> None:
        """Complete a partial file, and make it a blob of the cache when its checksum is right."""
        from filelock import FileLock
        from huggingface_hub import hf_hub_url
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils._headers import build_hf_headers

        folder = self._folder(repository)
        blob = folder / "blobs" / sha256
        lock = self.cache / ".locks" / folder.name / f"{sha256}.lock"  # where the library has its own
        with storage(self.cache, "written", "HF_HOME"):
            blob.parent.mkdir(parents=True, exist_ok=True)
            lock.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(lock):
            if blob.is_file() and digest(blob, progress, file.name) == sha256:  # it came while this process waited
                return
            partial = blob.with_suffix(_PARTIAL)
            url = hf_hub_url(repository.repo, file.name, revision=repository.commit, endpoint=self._api.endpoint)
            with (
                _talking(f"{repository.repo}/{file.name}"),
                _without_bars(),
                _Growing(partial, lambda done: progress(file.name, done, file.n_bytes)) as out,
            ):
                if out.tell() > file.n_bytes:
                    out.seek(0)
                    out.truncate()
                http_get(url, out, resume_size=out.tell(), headers=build_hf_headers(), expected_size=file.n_bytes)
            with storage(partial, "written", "HF_HOME"):
                if digest(partial, progress, file.name) != sha256:
                    partial.unlink()
                    raise ModelFileError(
                        f"{repository.repo}/{file.name} arrived with another checksum than the Hub names and was "
                        "thrown away; try again"
                    )
                partial.replace(blob)

    def _link(self, repository: Repository, name: str) -> Path:
        """Let the library link a blob into the snapshot of its commit; small files it downloads itself."""
        from huggingface_hub import hf_hub_download

        with _talking(f"{repository.repo}/{name}"), _without_bars():
            return Path(
                hf_hub_download(
                    repository.repo, name, revision=repository.commit, cache_dir=self.cache, endpoint=self._api.endpoint
                )
            )


class _Growing(io.BufferedWriter):
    """A file to append to, which tells how long it has become."""

    def __init__(self, path: Path, on_growth: Callable[[int], None]) -> None:
        super().__init__(io.FileIO(path, "ab"))
        self._on_growth = on_growth

    def write(self, data: Any) -> int:
        n = super().write(data)
        self._on_growth(self.tell())
        return n


def _described(info: "ModelInfo", repo: str, revision: str) -> Repository:
    license_name = getattr(info.card_data, "license", None)
    architecture = (info.gguf or {}).get("architecture")
    files = {}
    for sibling in info.siblings or ():
        sha256 = sibling.lfs.sha256 if sibling.lfs else ""
        if _is_inside(sibling.rfilename):
            files[sibling.rfilename] = RemoteFile(
                sibling.rfilename, sibling.size or 0, sha256 if _SHA256.fullmatch(sha256) else None
            )
    return Repository(
        repo=repo,
        revision=revision,
        commit=info.sha or "",
        license=license_name if isinstance(license_name, str) else None,
        architecture=architecture if isinstance(architecture, str) else None,
        files=files,
        is_cached=False,
    )


def _snapshot_files(snapshot: "CachedRevisionInfo") -> Iterator[RemoteFile]:
    """The files of a snapshot; the name of the blob that a large one links to is its checksum."""
    for file in snapshot.files:
        blob = file.blob_path.name
        name = file.file_path.relative_to(snapshot.snapshot_path).as_posix()
        yield RemoteFile(name, file.size_on_disk, blob if _SHA256.fullmatch(blob) else None)


def _is_inside(name: str) -> bool:
    """Whether a name stays in the folder that it is joined to, on every system."""
    path = PurePosixPath(name)
    return (
        bool(path.parts)
        and not path.is_absolute()
        and ".." not in path.parts
        and not re.search(r"[\\:\x00-\x1f]", name)
    )


@contextmanager
def _without_bars() -> Iterator[None]:
    """Keep the library from drawing progress bars of its own."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    group = "huggingface_hub.http_get"
    if are_progress_bars_disabled(group):
        yield
        return
    disable_progress_bars(group)
    try:
        yield
    finally:
        enable_progress_bars(group)


@contextmanager
def _talking(what: str) -> Iterator[None]:
    """Errors of huggingface_hub, of the HTTP client below it, and of files it writes, as ours."""
    from huggingface_hub.errors import HfHubHTTPError

    # requests, httpx or httpx2, by version; its root error is what the library's own derives from
    client_errors = cast(tuple[type[Exception], ...], HfHubHTTPError.__bases__)
    expected: tuple[type[Exception], ...] = (*client_errors, OSError, ValueError, LookupError, TypeError)
    try:
        yield
    except expected as error:
        raise _translated(error, what) from error


def _translated(error: Exception, what: str) -> LocalDepthError:
    from huggingface_hub import errors

    sign_in = "type `hf auth login` or set HF_TOKEN"
    again = "what has arrived is kept, try again"
    match error:
        case errors.HFValidationError():
            return RequestError(f"{what} is no name of a repository: {error}; write it as owner/name")
        case errors.OfflineModeIsEnabled():
            return MachineError(f"{what} cannot be asked for while HF_HUB_OFFLINE is set; unset it")
        case errors.GatedRepoError():
            return ModelFileError(f"{what} is gated; accept its terms on its page, then {sign_in}")
        case errors.RepositoryNotFoundError():
            return ModelFileError(f"{what} is not on the Hub, or is private; check the name, or {sign_in}")
        case errors.RevisionNotFoundError():
            return ModelFileError(f"{what}: the repository has no such branch, tag or commit")
        case errors.LocalEntryNotFoundError():
            return MachineError(f"{what} cannot be reached: {error.__cause__ or error}; check the connection; {again}")
        case errors.EntryNotFoundError():
            return ModelFileError(f"{what} is not in the repository any more; try again")
        case errors.HfHubHTTPError(response=response) if response.status_code in (401, 403):
            return ModelFileError(f"{what} may not be read with this token (status {response.status_code}); {sign_in}")
        case errors.HfHubHTTPError(response=response):
            return MachineError(f"the Hub answers {what} with status {response.status_code}; {again} later")
        case OSError(errno=int(), strerror=reason):
            return StorageError(
                f"{what} cannot be written to the Hugging Face cache: {reason}; free space, or set HF_HOME"
            )
    reason = f"{type(error).__name__}: {error}"
    return MachineError(f"asking for {what} failed: {reason}; check the connection, and HF_ENDPOINT if set; {again}")
