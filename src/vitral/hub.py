"""Weights on the Hugging Face Hub: `hf-hub:owner/name` or `hf-hub:owner/name@revision`.

Paths without this prefix never cause a network request.
"""

from __future__ import annotations

import errno
import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from vitral.errors import UserError
from vitral.storage import MANIFEST

if TYPE_CHECKING:
    from huggingface_hub import HfApi

PREFIX = "hf-hub:"
NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")  # does not match ../x
TIMEOUT_SECONDS = 10.0  # for the Hub's first response
LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"


def check_name(name: str) -> None:
    """Raises UserError unless `name` is a valid repository name."""
    if not NAME.fullmatch(name):
        raise UserError(f"hub: expected owner/name, got {name!r}")


class NoWeightsError(UserError):
    """A repository exists but does not contain vitral weights."""

    def __init__(self, repository: str, model_type: str) -> None:
        super().__init__(
            f"hub: {repository} does not contain vitral weights; "
            f"expected the files that `vitral push` writes, with a {MANIFEST}"
        )
        self.repository = repository
        self.model_type = model_type
        """The model_type in config.json, as in the package transformers; empty if there is none."""


def download(name: str) -> Path:
    """Downloads the weights `hf-hub:owner/name[@revision]`; returns their directory in the cache.

    Downloads only config.json, manifest.json and *.safetensors. If the Hub cannot be reached, the
    cached files are used.

    Raises:
        NoWeightsError: if the repository does not contain vitral weights.
        UserError: if the name is invalid, access is denied, or the Hub cannot be reached.
    """
    repository, _, revision = name.removeprefix(PREFIX).partition("@")
    check_name(repository)
    api = client()
    with _as_user_errors(repository, revision):
        if cached := _cached_if_unreachable(api, repository, revision, MANIFEST):
            return cached
        # Download the manifest first: only vitral writes one, so no gigabytes are wasted.
        folder = _fetch(api, repository, revision, MANIFEST)
        if (folder / MANIFEST).exists():
            # The folder is named after its commit, so all files come from the same commit.
            return _fetch(api, repository, folder.name, "config.json", "*.safetensors")
        model_type = _model_type(
            _fetch(api, repository, folder.name, "config.json") / "config.json"
        )
    raise NoWeightsError(repository, model_type)


def download_file(repository: str, revision: str, file: str) -> str:
    """Downloads a file to the Hub's cache, if it is in the repository, and returns its commit.

    Raises:
        UserError: if `download` would raise it.
    """
    api = client()
    with _as_user_errors(repository, revision):
        cached = _cached_if_unreachable(api, repository, revision, file)
        return (cached or _fetch(api, repository, revision, file)).name


def _fetch(api: HfApi, repository: str, revision: str, *patterns: str) -> Path:
    return Path(
        api.snapshot_download(
            repository,
            revision=revision or None,
            allow_patterns=list(patterns),
            ignore_patterns=["*/*"],  # an asterisk also matches slashes
        )
    )


def _cached_if_unreachable(api: HfApi, repository: str, revision: str, file: str) -> Path | None:
    """Returns None if the Hub can be reached, otherwise the cached folder with the file.

    The client alone would retry for a minute, or wait indefinitely for a response.
    """
    from huggingface_hub import errors, try_to_load_from_cache

    try:
        api.model_info(repository, revision=revision or None, timeout=TIMEOUT_SECONDS)
    except errors.RevisionNotFoundError:
        raise
    except (errors.HTTPError, ConnectionError):
        cached = try_to_load_from_cache(repository, file, revision=revision or None)
        if not isinstance(cached, str):
            raise
        return Path(cached).parent
    return None


def _model_type(config: Path) -> str:
    try:
        found = json.loads(config.read_bytes())["model_type"]
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    return found if isinstance(found, str) and re.fullmatch(r"[\w-]{1,40}", found) else ""


def upload(name: str, folder: Path, *, private: bool, message: str) -> str:
    """Uploads the files of `folder`, including its README.md, to a repository in one commit.

    Creates the repository if it does not exist. Replaces files of the same names, and deletes
    *.safetensors files that are not in the folder, because the manifest must list all of them.

    Returns:
        The URL of the repository.

    Raises:
        UserError: if the token does not permit writing, the repository is public although `private`
            is requested, or the Hub rejects the model card.
    """
    check_name(name)
    api = client()
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, ModelCard, get_token

    if get_token() is None:
        raise UserError(f"hub: expected a token to push {name}, got none; {LOG_IN}")
    files = sorted(folder.iterdir())
    with _as_user_errors(name):
        ModelCard.load(folder / "README.md").validate()  # before creating anything
        address = api.create_repo(name, private=private or None, exist_ok=True)
        if private and not api.model_info(name).private:
            raise UserError(
                f"hub: {name} is public; make it private in its settings, or use a different one"
            )
        old = {
            file for file in api.list_repo_files(name) if re.fullmatch(r"[^/]+\.safetensors", file)
        }
        stale = sorted(old - {file.name for file in files})
        # upload_folder may split an upload into several commits.
        api.create_commit(
            name,
            [
                *(CommitOperationAdd(file.name, file) for file in files),
                *(CommitOperationDelete(file) for file in stale),
            ],
            commit_message=message,
        )
    return str(address)


def client() -> HfApi:
    """Returns the Hub's client. Raises UserError if its package is not installed."""
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise UserError(
            f"hub: the Hugging Face Hub requires the package {error.name}, which is not installed; "
            "`pip install 'vitral[hub]'`"
        ) from None
    return HfApi(library_name="vitral", library_version=version("vitral"))


@contextmanager
def _as_user_errors(name: str, revision: str = "") -> Iterator[None]:
    """Turns exceptions of the Hub's client into one-line UserErrors."""
    from huggingface_hub import errors

    kinds = (errors.HTTPError, errors.LocalEntryNotFoundError, ConnectionError, ValueError)
    try:
        with _quiet():
            yield
    except kinds as error:
        raise UserError(f"hub: {_error_message(error, name, revision)}") from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"hub: cannot write {error.filename}: {error.strerror}; "
            "set HF_HUB_CACHE to a directory that can be written"
        ) from None
    except RuntimeError as error:
        # An exception in an upload thread is wrapped once more.
        if not isinstance(error.__cause__, kinds):
            raise
        raise UserError(f"hub: {_error_message(error.__cause__, name, revision)}") from None


def _error_message(error: BaseException, name: str, revision: str) -> str:
    from huggingface_hub import constants, errors

    endpoint = constants.ENDPOINT
    match error:
        case errors.GatedRepoError():
            return f"{name} is gated; request access at {endpoint}/{name}, then {LOG_IN}"
        case errors.RepositoryNotFoundError():
            return f"{name} does not exist or is private; check the name, or {LOG_IN}"
        case errors.RevisionNotFoundError():
            return f"{name} has no revision {revision}; expected a branch, a tag or a commit"
        case errors.HfHubHTTPError() if error.response.status_code == 401:
            return f"{name}: the token is invalid; {LOG_IN}"
        case errors.HfHubHTTPError() if error.response.status_code == 403:
            return f"{name}: the token does not permit this; use a token with write access"
        case errors.HfHubHTTPError():
            detail = (
                f"{error.response.status_code}, {_first_line(error.server_message or 'no details')}"
            )
            return f"{name}: the Hub responded with {detail}; try again later"
        # The base classes of network errors, independent of the client's HTTP library.
        case errors.HTTPError() | errors.LocalEntryNotFoundError() | ConnectionError():
            reason = _first_line(error.__cause__ or error)
            return f"{name}: cannot reach {endpoint}: {reason}; check the network"
        case _:
            return f"{name} was rejected: {_first_line(error)}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences the client's log of retries, and its progress bars unless stderr is a terminal."""
    from huggingface_hub import utils

    verbosity = utils.logging.get_verbosity()
    bars = sys.stderr.isatty() or utils.are_progress_bars_disabled()
    utils.logging.set_verbosity_error()
    if not bars:
        utils.disable_progress_bars()
    try:
        yield
    finally:
        utils.logging.set_verbosity(verbosity)
        if not bars:
            utils.enable_progress_bars()


def _first_line(error: BaseException | str) -> str:
    """Returns the first line of a message, truncated to 300 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
