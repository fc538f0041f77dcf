"""Folders on the Hugging Face Hub, by name.

The names are the field's: `hf-hub:owner/name`, or `hf-hub:owner/name@revision`. Nothing without
that prefix is ever asked of the network.
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
NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")  # ../x is none
TIMEOUT_SECONDS = 10.0  # seconds for the Hub's first answer
LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"


def check_name(name: str) -> None:
    """Raises UserError unless `name` is one that a repository may have."""
    if not NAME.fullmatch(name):
        raise UserError(f"hub: expected owner/name, got {name!r}")


class NoWeightsError(UserError):
    """A repository exists but has no weights of vitral."""

    def __init__(self, repository: str, model_type: str) -> None:
        super().__init__(
            f"hub: {repository} holds no weights of vitral; "
            f"expected what `vitral push` writes, with a {MANIFEST}"
        )
        self.repository = repository
        self.model_type = model_type
        """Of the package transformers, from config.json; empty if there is none."""


def download(name: str) -> Path:
    """The directory, in the Hub's cache, of the weights `hf-hub:owner/name[@revision]`.

    Only config.json, manifest.json and *.safetensors are downloaded. If the Hub cannot be reached,
    the cached files are used.

    Raises:
        NoWeightsError: the repository has no weights of vitral.
        UserError: the name is not valid, access is denied, or the Hub cannot be reached.
    """
    repository, _, revision = name.removeprefix(PREFIX).partition("@")
    check_name(repository)
    api = client()
    with _as_user_errors(repository, revision):
        if cached := _cached_if_unreachable(api, repository, revision, MANIFEST):
            return cached
        # First the file that only weights of vitral have, to not download gigabytes in vain.
        folder = _fetch(api, repository, revision, MANIFEST)
        if (folder / MANIFEST).exists():
            # By commit, which is the folder's name, so that all files are of one.
            return _fetch(api, repository, folder.name, "config.json", "*.safetensors")
        model_type = _model_type(
            _fetch(api, repository, folder.name, "config.json") / "config.json"
        )
    raise NoWeightsError(repository, model_type)


def download_file(repository: str, revision: str, file: str) -> str:
    """Downloads a file, if the repository has it, to the Hub's cache; returns its commit.

    Raises:
        UserError: as `download`.
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
            ignore_patterns=["*/*"],  # an asterisk matches slashes too
        )
    )


def _cached_if_unreachable(api: HfApi, repository: str, revision: str, file: str) -> Path | None:
    """None if the Hub can be reached, otherwise the cached folder that has the file.

    The client would repeat its requests for a minute, or wait for an answer without a limit.
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
    """Puts the files of `folder`, README.md among them, into a repository, in one commit.

    The repository is made if there is none. Files of the same names are replaced, and *.safetensors
    that the folder lacks are removed, as weights hold no file that their manifest does not list.

    Returns:
        The address of the repository.

    Raises:
        UserError: if it may not be written, is public where `private` is asked for, or the Hub does
            not accept the card.
    """
    check_name(name)
    api = client()
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, ModelCard, get_token

    if get_token() is None:
        raise UserError(f"hub: expected a token to push {name}, got none; {LOG_IN}")
    files = sorted(folder.iterdir())
    with _as_user_errors(name):
        ModelCard.load(folder / "README.md").validate()  # before anything is made
        address = api.create_repo(name, private=private or None, exist_ok=True)
        if private and not api.model_info(name).private:
            raise UserError(
                f"hub: {name} is public; make it private in its settings, or take another"
            )
        old = {
            file for file in api.list_repo_files(name) if re.fullmatch(r"[^/]+\.safetensors", file)
        }
        stale = sorted(old - {file.name for file in files})
        # upload_folder would do, but may cut what it uploads into several commits.
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
    """The Hub's client. Raises UserError if its package is not installed."""
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise UserError(
            f"hub: the Hugging Face Hub takes the package {error.name}, which is not installed; "
            "`pip install 'vitral[hub]'`"
        ) from None
    return HfApi(library_name="vitral", library_version=version("vitral"))


@contextmanager
def _as_user_errors(name: str, revision: str = "") -> Iterator[None]:
    """Says in one line what the Hub's client raises."""
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
            "say by HF_HUB_CACHE where its files may lie"
        ) from None
    except RuntimeError as error:
        # What a thread of an upload met is wrapped once more.
        if not isinstance(error.__cause__, kinds):
            raise
        raise UserError(f"hub: {_error_message(error.__cause__, name, revision)}") from None


def _error_message(error: BaseException, name: str, revision: str) -> str:
    from huggingface_hub import constants, errors

    place = constants.ENDPOINT
    match error:
        case errors.GatedRepoError():
            return f"{name} is gated; ask for access on {place}/{name}, then {LOG_IN}"
        case errors.RepositoryNotFoundError():
            return f"no repository {name}, or a private one; check the name, or {LOG_IN}"
        case errors.RevisionNotFoundError():
            return f"{name} has no revision {revision}; expected a branch, a tag or a commit"
        case errors.HfHubHTTPError() if error.response.status_code == 401:
            return f"{name}: the token is not valid; {LOG_IN}"
        case errors.HfHubHTTPError() if error.response.status_code == 403:
            return f"{name}: the token does not allow it; take a token that may write there"
        case errors.HfHubHTTPError():
            detail = (
                f"{error.response.status_code}, {_first_line(error.server_message or 'no more')}"
            )
            return f"{name}: the Hub answers {detail}; try again later"
        # The base of all that fails on the way, whichever package the client asks the network by.
        case errors.HTTPError() | errors.LocalEntryNotFoundError() | ConnectionError():
            reason = _first_line(error.__cause__ or error)
            return f"{name}: cannot reach {place}: {reason}; check the network"
        case _:
            return f"{name} is not accepted: {_first_line(error)}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the client's log of each attempt, and without bars where nobody looks."""
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
    """The first line of a message, at most 300 characters of it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
