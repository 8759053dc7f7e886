"""A folder put on the hub as one commit, with errors that say what to do."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from flashtask.core.errors import FlashtaskError, HubError
from flashtask.core.hub.address import HubAddress
from flashtask.core.hub.settings import endpoint, hub_host, hub_is_offline

__all__ = ["Uploaded", "require_login", "upload_folder"]

_COMMIT = re.compile(r"[0-9a-f]{40}")
_LOGIN = "`hf auth login` with a token that may write, or set HF_TOKEN"


@dataclass(frozen=True)
class Uploaded:
    """What was put on the hub: `url` is the page of the commit's files, `commit` has 40 hexadecimal digits."""

    address: HubAddress
    url: str
    commit: str


def upload_folder(folder: Path, address: HubAddress, *, private: bool = False, message: str = "") -> Uploaded:
    """Make a repository if there is none, and put the files of a folder into it as one commit.

    Args:
        folder: with files only.
        address: of the repository; its revision is a branch, which is made if there is none.
        private: a new repository is for its owner alone; one that is there and public is refused.
        message: of the commit.

    Raises:
        HubError: no token, no right to write, or the hub cannot be reached.
    """
    from huggingface_hub import HfApi

    from flashtask._version import __version__

    if hub_is_offline():
        raise HubError(
            f"{folder} was not pushed to {address.repository}",
            why="HF_HUB_OFFLINE is set, so the hub is not contacted",
            fix="unset HF_HUB_OFFLINE and run it again",
        )
    require_login(address)
    api = HfApi(endpoint=endpoint(), library_name="flashtask", library_version=__version__)
    with _told(address), _silent_logs():
        api.create_repo(address.repository, private=private or None, exist_ok=True, repo_type="model")
        if private and not api.model_info(address.repository).private:
            raise HubError(
                f"{address.repository} is public, and nothing was pushed to it",
                why="the repository already exists, and --private is only for a new one",
                fix=f"make it private at {endpoint()}/{address.repository}/settings, or push without --private",
            )
        if address.revision is not None:
            api.create_branch(address.repository, branch=address.revision, exist_ok=True)
        made = api.upload_folder(
            repo_id=address.repository,
            folder_path=folder,
            revision=address.revision,
            commit_message=message or f"Upload {folder.name} with flashtask {__version__}",
        )
    if not _COMMIT.fullmatch(made.oid or ""):
        raise HubError(f"{hub_host()} named no commit for what was pushed to {address.repository}")
    return Uploaded(address, f"{endpoint()}/{address.repository}/tree/{made.oid}", made.oid)


def require_login(address: HubAddress) -> None:
    """Somebody is logged in, so that there is a chance to write.

    Raises:
        HubError: nobody is.
    """
    from huggingface_hub import get_token

    if not get_token():
        raise HubError(f"you are not logged in, so {address.repository} cannot be written", fix=_LOGIN)


@contextmanager
def _told(address: HubAddress) -> Iterator[None]:
    """Tell what the client raises as our errors; a token never stands in one."""
    try:
        yield
    except FlashtaskError:
        raise
    except Exception as error:
        told = _as_told(error, address)
        if told is None:
            raise
        raise told from error


def _as_told(error: Exception, address: HubAddress) -> HubError | None:
    """The error to raise for one of the client; None for one that is about neither the hub nor the network."""
    from huggingface_hub import errors

    from flashtask.core.hub.hub_errors import is_about_network, without_secrets

    failed, answer = f"{address.repository} could not be written", _answer_in(error)
    if isinstance(answer, errors.HfHubHTTPError):
        status, owner = answer.response.status_code, address.repository.partition("/")[0]
        said = without_secrets(answer.server_message or answer.response.headers.get("x-error-message") or "")
        fixes = {401: _LOGIN, 403: f"ask {owner} for write access, or push to a repository of yours"}
        why = f"{hub_host()} answered with status {status}" + (f": {said}" if said else "")
        return HubError(failed, why=why, fix=fixes.get(status, "run it again later; nothing was committed"))
    if not is_about_network(error):
        return None
    return HubError(
        failed,
        why=f"{hub_host()}: {without_secrets(f'{type(answer).__name__}: {answer}')}",
        fix="check the network connection and HF_ENDPOINT, and run it again; nothing was committed",
    )


def _answer_in(error: BaseException) -> BaseException:
    """The first answer of the hub among what an error stands for: uploads are wrapped; else what is innermost."""
    from huggingface_hub import errors

    while not isinstance(error, errors.HfHubHTTPError) and error.__cause__ is not None:
        error = error.__cause__
    return error


@contextmanager
def _silent_logs() -> Iterator[None]:
    """The client's own warnings are told by our errors, and its bars by the command."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

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
