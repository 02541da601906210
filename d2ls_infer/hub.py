"""The Hugging Face Hub, by its own client: what lies in the cache, what is fetched, what is published.

The client reads HF_HOME, HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE and the proxies' variables; it is imported when needed.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from d2ls_infer.errors import D2LSError, HubError, MissingFileError, UnavailableModelError, UsageError
from d2ls_infer.manifest import COMMIT, FILENAME, NAME, REPO, HubFile

log = logging.getLogger(__name__)

REVISION = rf"{NAME}(?:/{NAME})*"
REFERENCE = re.compile(rf"(?P<repo>{REPO})(?:@(?P<revision>{REVISION}))?(?::(?P<filename>{FILENAME}))?")
ETAG = r"\w[\w.+=-]{0,199}"
"""What the client makes a file's name in the cache of. The hub gives a sha256 or a git hash."""


def parse_reference(text: str) -> HubFile | None:
    """ "owner/repo[@revision][:filename]" -> the file it means, by default model.safetensors of main; else None."""
    found = REFERENCE.fullmatch(text)
    if found is None or ".." in text:
        return None
    revision, filename = found["revision"] or "main", found["filename"] or HubFile.filename
    return HubFile(repo=found["repo"], revision=revision, filename=filename)


def cached(file: HubFile) -> Path | None:
    """Where the file lies in the client's cache; for a branch, as it was when it was last asked for."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(file.repo, file.filename, revision=file.revision)
    return Path(found) if isinstance(found, str) else None


def fetch(file: HubFile, *, name: str, offline: bool = False, size: int | None = None, force: bool = False) -> Path:
    """The file in the cache, downloaded first where it is not there. The name of its folder is its commit.

    name: what the user calls the model. size: bytes it must have, where that is known: another size is told before the
    download. force: download it even if it is there. A commit that is in the cache needs no network; for a branch the
    hub is asked, and the cache is taken where it does not answer.

    Raises UnavailableModelError offline, MissingFileError for what the hub does not have, HubError for a hub that fails
    or answers wrongly.
    """
    from huggingface_hub import constants, hf_hub_download

    here = cached(file)
    if here and file.is_pinned and not force:
        return here
    if offline or constants.HF_HUB_OFFLINE:
        if here and not force:
            return here
        raise UnavailableModelError(
            f"{file} is not in the cache ({constants.HF_HUB_CACHE}), and the network is not to be used (offline); "
            f"fetch it beforehand: d2ls models download {name}"
        )
    try:
        probe(file, size=size)
    except HubError as error:
        if not here or force:
            raise
        log.warning("%s; taking what is in the cache, commit %s", error, here.parent.name)
        return here
    with asking(file):
        path = Path(
            hf_hub_download(
                file.repo,
                file.filename,
                revision=file.revision,
                force_download=force,
                library_name="d2ls-infer",
            )
        )
    if not path.resolve().is_relative_to(Path(constants.HF_HUB_CACHE).resolve()):
        raise HubError(f"{file} came to lie outside the cache: {path.resolve()}; do not use it, nor this hub")
    return path


def probe(file: HubFile, *, size: int | None) -> None:
    """Ask the hub what it has before anything is downloaded or written. Raises as `fetch` does.

    The client names files in its cache by the answer's commit and ETag, so they are looked at first. It also retries
    for half a minute before it says that there is no network; this does not.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url

    with asking(file):
        about = get_hf_file_metadata(
            hf_hub_url(file.repo, file.filename, revision=file.revision), timeout=constants.HF_HUB_ETAG_TIMEOUT
        )
    commit, etag = about.commit_hash or "", about.etag or ""
    if not re.fullmatch(COMMIT, commit) or not re.fullmatch(ETAG, etag):
        raise HubError(f"{constants.ENDPOINT} is no hub: for {file} it gave commit {commit!r} and ETag {etag!r}")
    if file.is_pinned and commit != file.revision:
        raise HubError(f"asked for {file}, {constants.ENDPOINT} answered with commit {commit}")
    if size is not None and about.size not in (None, size):
        raise HubError(f"{file} has {about.size} bytes on the hub, but {size} were expected; it was not downloaded")


@contextmanager
def asking(file: HubFile) -> Iterator[None]:
    """Turns whatever the client raises into an error of ours that says what to do."""
    try:
        yield
    except D2LSError:
        raise
    # The client's own kinds, the disk's, and those of the HTTP library below (requests, httpx or httpx2, by version).
    except Exception as error:
        raise explained(error, file) from error


def explained(error: Exception, file: HubFile) -> D2LSError:
    """What an error of the client means for who asked for a file."""
    from huggingface_hub import constants, errors, get_token

    hub, status = constants.ENDPOINT, getattr(getattr(error, "response", None), "status_code", None)
    access = "your token does not open it" if get_token() else "no token is set (HF_TOKEN, or `hf auth login`)"
    kinds = {type(one).__name__ for one in (error, error.__cause__, error.__context__) if one is not None}

    def failed(*words: str) -> bool:
        return any(word in kind for kind in kinds for word in words)

    timeouts = f"now {constants.HF_HUB_ETAG_TIMEOUT} and {constants.HF_HUB_DOWNLOAD_TIMEOUT} seconds"
    cases: list[tuple[bool, type[D2LSError], str]] = [
        (
            isinstance(error, errors.GatedRepoError),
            HubError,
            f"{file.repo} is opened on request: ask at {hub}/{file.repo}; {access}",
        ),
        (
            isinstance(error, errors.RepositoryNotFoundError),
            MissingFileError,
            f"{hub} has no repository {file.repo}, or it is private and {access}",
        ),
        (
            isinstance(error, errors.RevisionNotFoundError),
            MissingFileError,
            f"{file.repo} on {hub} has no revision {file.revision!r}",
        ),
        (
            isinstance(error, errors.EntryNotFoundError) and status == 404,
            MissingFileError,
            f"{file.repo} on {hub} has no file {file.filename} at {file.revision}; "
            f"name one that it has: {file.repo}@{file.revision}:FILE.safetensors",
        ),
        (status in (401, 403), HubError, f"{hub} refused {file.repo}: {access}"),
        (
            failed("Timeout"),
            HubError,
            f"{hub} did not answer in time for {file}; HF_HUB_ETAG_TIMEOUT and HF_HUB_DOWNLOAD_TIMEOUT ({timeouts}) "
            "make it wait longer",
        ),
        (
            failed("Connect", "Proxy", "Offline"),
            HubError,
            f"{hub} cannot be reached for {file} ({first_line(error)}); without a network only what is bundled or "
            "cached can be used",
        ),
    ]
    otherwise = HubError, f"{hub} failed on {file}: {type(error).__name__}: {first_line(error)}"
    kind, text = next(((kind, text) for applies, kind, text in cases if applies), otherwise)
    return kind(text)


def first_line(error: Exception) -> str:
    """The beginning of what an error says."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def publish(folder: Path, repo: str, *, private: bool = False) -> str:
    """Upload a folder as one commit, into a repository that is made if there is none; the commit.

    Raises UsageError for a public repository where a private one was asked for, HubError where the hub refuses.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import RepositoryNotFoundError

    api = HfApi(library_name="d2ls-infer")
    with asking(HubFile(repo=repo, revision="main")):
        try:
            is_public = not api.model_info(repo, timeout=constants.HF_HUB_ETAG_TIMEOUT).private
        except RepositoryNotFoundError:
            api.create_repo(repo, private=private, exist_ok=True)
            is_public = False
        if private and is_public:
            raise UsageError(f"{repo} is there already and is public; make it private there, or leave out --private")
        return str(api.upload_folder(repo_id=repo, folder_path=folder, commit_message="d2ls publish").oid)
