"""Files of the hub, into huggingface's own cache: an interrupted download goes on, and every file's hash is checked.

In that cache a file's content lies under the name of its hash as the hub states it (`blobs/HASH`: SHA-256 for large
files, git's SHA-1 for small ones), so that files can be checked without the network, too. huggingface_hub 2 drops what
it has of a file when a download stops; therefore the content is fetched here, into `blobs/HASH.incomplete`, and it does
the rest.
"""

import errno
import hashlib
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import (
    constants,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    is_offline_mode,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import http_get, repo_folder_name
from huggingface_hub.utils import WeakFileLock, build_hf_headers

from model.errors import UserError
from weights.files import sha256

RESERVE = 100_000_000  # bytes of the disk to leave free
GO_ON = "The same command goes on where this one stopped."


@dataclass(frozen=True)
class HubFile:
    """A file as the hub has it: its name in a repository at a revision, the hash stated there, and its bytes."""

    repo: str
    revision: str
    name: str
    hash: str
    size: int

    @property
    def blob(self) -> Path:
        """Where its content belongs in the cache."""
        return _cache(self.repo) / "blobs" / self.hash

    @property
    def partial(self) -> Path:
        """Where its content grows while it is fetched."""
        return self.blob.with_name(f"{self.hash}.incomplete")


def cached(repo: str, names: Sequence[str], revision: str = "main") -> list[Path | None]:
    """Where the cache has each file; None: it has not, or what it has is not what the hub stated."""
    found = [try_to_load_from_cache(repo, name, revision=revision) for name in names]
    paths = [Path(path) if isinstance(path, str) else None for path in found]
    return [path if path is not None and matches(path, _stated(path)) else None for path in paths]


def lookup(repo: str, names: Sequence[str], revision: str = "main") -> list[HubFile]:
    """Ask the hub for each file's hash and size.

    Raises:
        UserError: offline, no connection, no such repository, revision or file, no access, or no hub that answers.
    """
    if is_offline_mode():
        missing = [name for name, path in zip(names, cached(repo, names, revision), strict=True) if path is None]
        raise UserError(
            f"HF_HUB_OFFLINE is set, and of {repo} the cache {constants.HF_HUB_CACHE} lacks, or has damaged: "
            f"{', '.join(missing)}. Unset it to fetch what is missing."
        )
    files = []
    for name in names:
        with _explained(repo, name, revision):
            stated = get_hf_file_metadata(hf_hub_url(repo, name, revision=revision), headers=_headers())
        if stated.commit_hash is None or stated.size is None or len(stated.etag or "") not in (40, 64):
            raise UserError(
                f"{constants.ENDPOINT} answers, but not as the hub does: it states no hash or no size for {name} of "
                f"{repo}. Is a proxy's page in between, or HF_ENDPOINT set to something else than a hub?"
            )
        files.append(HubFile(repo, revision, name, str(stated.etag), stated.size))
    return files


def check_space(files: Sequence[HubFile]) -> None:
    """See whether the disk has room for what is still to be fetched of the files; raises UserError if not."""
    needed = {file.blob: file.size - _size(file.partial) for file in files if not file.blob.exists()}
    folder = Path(constants.HF_HUB_CACHE).absolute()
    free = shutil.disk_usage(next(place for place in (folder, *folder.parents) if place.exists())).free
    if needed and sum(needed.values()) + RESERVE > free:
        raise UserError(
            f"the disk of {folder} has {free / 1e9:.2f} GB free, and {sum(needed.values()) / 1e9:.2f} GB are to be "
            "fetched: make room, or set HF_HOME to a folder on another disk."
        )


def fetch(file: HubFile) -> Path:
    """Bring one file into the cache, unless it is there and sound, and say where it is.

    Raises:
        UserError: the connection broke, the disk is full, or the content is not what the hub states.
    """
    lock = Path(constants.HF_HUB_CACHE) / ".locks" / _cache(file.repo).name / f"{file.hash}.lock"
    with _explained(file.repo, file.name, file.revision):
        for folder in (lock.parent, file.blob.parent):
            folder.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(lock):
            # where links are not to be had, a file lies under its own name
            held = (
                file.blob
                if file.blob.exists()
                else try_to_load_from_cache(file.repo, file.name, revision=file.revision)
            )
            if not isinstance(held, str | Path) or not matches(Path(held), file.hash):
                _fetch_content(file)
        return Path(hf_hub_download(file.repo, file.name, revision=file.revision))


def matches(path: Path, stated: str) -> bool:
    """Whether a file has the hash that the hub states: SHA-256, or by its 40 letters git's SHA-1."""
    if len(stated) == 64:
        return sha256(path) == stated
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest() == stated


def _fetch_content(file: HubFile) -> None:
    if file.blob.exists():
        print(f"{file.name} of {file.repo} is damaged in the cache, and is fetched again", file=sys.stderr)
        file.blob.unlink()
    if _size(file.partial) > file.size:
        file.partial.unlink()
    with file.partial.open("ab") as content:
        http_get(
            hf_hub_url(file.repo, file.name, revision=file.revision),
            content,
            resume_size=content.tell(),
            headers=_headers(),
            expected_size=file.size,
            displayed_filename=file.name,
        )
    if not matches(file.partial, file.hash):
        file.partial.unlink()
        raise UserError(
            f"what came for {file.name} of {file.repo} is not what the hub states (its hash is another): it is "
            "deleted. Run the same command again; if that does not help, look for a proxy or a mirror in between."
        )
    os.replace(file.partial, file.blob)


def _cache(repo: str) -> Path:
    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type="model")


def _stated(path: Path) -> str:
    """The hash a cached file should have: its link's target's name; one step only, for a blob may be a link itself."""
    return Path(os.readlink(path)).name if path.is_symlink() else ""


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _headers() -> dict[str, str]:
    # compressed on the way, a file could not be continued in the middle
    return {**build_hf_headers(), "Accept-Encoding": "identity"}


@contextmanager
def _explained(repo: str, name: str, revision: str) -> Iterator[None]:
    """Turn what can go wrong between here and the hub into messages for people."""
    try:
        yield
    except (HTTPError, OSError, EntryNotFoundError) as error:
        raise UserError(_reason(error, repo, name, revision)) from error


def _reason(error: Exception, repo: str, name: str, revision: str) -> str:
    hub, said = constants.ENDPOINT, " ".join(str(error).split())[:300]
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if isinstance(error, GatedRepoError) or status == 403:
        return f"{hub}/{repo} is not open to everyone: accept its terms there, then log in with `hf auth login`."
    if isinstance(error, RevisionNotFoundError):
        return f"{hub}/{repo} has no revision {revision!r}."
    if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
        return f"{hub}/{repo} has no {name} at revision {revision!r}: it was renamed or removed."
    if isinstance(error, RepositoryNotFoundError) or status == 401:
        return (
            f"{hub} shows no repository {repo}: it was renamed or removed, or is private (`hf auth login` logs in), or "
            "the login that is stored here has run out (`hf auth logout`)."
        )
    if status is not None:
        return f"{hub} answers {status} for {name} of {repo}: try later. {GO_ON}"
    if isinstance(error, HTTPError | LocalEntryNotFoundError):
        return (
            f"the connection to {hub} failed or broke at {name} of {repo} ({said or type(error).__name__}): check the "
            f"network, and HTTPS_PROXY behind a proxy; HF_ENDPOINT names a mirror. {GO_ON}"
        )
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"the disk is full: make room in {constants.HF_HUB_CACHE}, or set HF_HOME to another disk. {GO_ON}"
    return f"{name} of {repo} could not be fetched into {constants.HF_HUB_CACHE}: {said}. {GO_ON}"
