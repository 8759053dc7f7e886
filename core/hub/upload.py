"""A folder put on the hub as one commit, with errors that name a fix."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import errors, get_token
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from flashtask._version import __version__
from flashtask.core.errors import FlashtaskError, HubError
from flashtask.core.hub.address import HubAddress, endpoint, hub_host, hub_is_offline
from flashtask.core.hub.client import answer_in, client, is_about_network, without_secrets

__all__ = ["Uploaded", "require_login", "upload_folder"]

_LOGIN = "`hf auth login` with a token that may write, or set HF_TOKEN"


@dataclass(frozen=True)
class Uploaded:
    """What was put on the hub: `url` is the page of the commit's files, `commit` has 40 hexadecimal digits."""

    url: str
    commit: str


def upload_folder(folder: Path, address: HubAddress, *, private: bool = False, message: str = "") -> Uploaded:
    """Put the files of a folder into a repository as one commit; the repository is made if it does not exist.

    Args:
        folder: with files only.
        address: of the repository or the Space; its revision is a branch, which is made if it does not exist. A new
            Space is one of Gradio.
        private: a new repository is for its owner alone; an existing public one is refused.
        message: of the commit.

    Raises:
        HubError: no token, no right to write, or the hub cannot be reached.
    """
    if hub_is_offline():
        raise HubError(
            f"{folder} was not pushed to {address.repository}",
            why="HF_HUB_OFFLINE is set, so the hub is not contacted",
            fix="unset HF_HUB_OFFLINE and run it again",
        )
    require_login(address)
    api = client()
    with _hub_errors(address), _silent_client():
        api.create_repo(
            address.repository,
            private=private or None,
            exist_ok=True,
            repo_type=address.kind,
            space_sdk="gradio" if address.kind == "space" else None,
        )
        if private and not api.repo_info(address.repository, repo_type=address.kind).private:
            raise HubError(
                f"{address.repository} is public, and nothing was pushed to it",
                why="the repository already exists, and --private is only for a new one",
                fix=f"make it private at {endpoint()}/{address.path}/settings, or push without --private",
            )
        if address.revision is not None:
            api.create_branch(address.repository, branch=address.revision, exist_ok=True, repo_type=address.kind)
        made = api.upload_folder(
            repo_id=address.repository,
            folder_path=folder,
            repo_type=address.kind,
            revision=address.revision,
            commit_message=message or f"Upload {folder.name} with flashtask {__version__}",
        )
    if not re.fullmatch(r"[0-9a-f]{40}", made.oid or ""):
        raise HubError(f"{hub_host()} named no commit for what was pushed to {address.repository}")
    return Uploaded(f"{endpoint()}/{address.path}/tree/{made.oid}", made.oid)


def require_login(address: HubAddress) -> None:
    """Raise unless there is a login.

    Raises:
        HubError: there is none.
    """
    if not get_token():
        raise HubError(f"you are not logged in, so {address.repository} cannot be written", fix=_LOGIN)


@contextmanager
def _hub_errors(address: HubAddress) -> Iterator[None]:
    """Turn the client's errors about the hub and the network into ours; others are raised as they are."""
    try:
        yield
    except FlashtaskError:
        raise
    except Exception as error:
        failed, answer = f"{address.repository} could not be written", answer_in(error)
        if isinstance(answer, errors.HfHubHTTPError):
            status, owner = answer.response.status_code, address.repository.partition("/")[0]
            answered = without_secrets(answer.server_message or answer.response.headers.get("x-error-message") or "")
            fixes = {401: _LOGIN, 403: f"ask {owner} for write access, or push to a repository of yours"}
            why = f"{hub_host()} answered with status {status}" + (f": {answered}" if answered else "")
            fix = fixes.get(status, "run it again later; nothing was committed")
            raise HubError(failed, why=why, fix=fix) from error
        if is_about_network(error):
            why = f"{hub_host()}: {without_secrets(f'{type(answer).__name__}: {answer}')}"
            fix = "check the network connection and HF_ENDPOINT, and run it again; nothing was committed"
            raise HubError(failed, why=why, fix=fix) from error
        raise


@contextmanager
def _silent_client() -> Iterator[None]:
    """The client prints neither warnings, which our errors repeat, nor bars, which the command prints itself."""
    logger = logging.getLogger("huggingface_hub")
    level, quiet = logger.level, are_progress_bars_disabled()
    logger.setLevel(logging.ERROR)
    disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        if not quiet:
            enable_progress_bars()
