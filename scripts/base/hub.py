"""Requests to the hub with a timeout, and imports of Axolotl without the hub."""

import importlib.metadata
import logging
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, cast

from .errors import UserError, WorkFailed, first_line, one_line

# transformers and trl both call this on import; each search through the installed packages takes seconds
_packages_distributions = cache(importlib.metadata.packages_distributions)


@contextmanager
def importing_axolotl(offline: bool = True) -> Iterator[None]:
    """Prepare the environment for importing and using Axolotl in the block.

    Output of the libraries goes to stderr, because stdout is for data. Log messages below errors are dropped.

    Args:
        offline: True to prevent requests to the hub, such as bitsandbytes' download of a kernel for CPUs.
    """
    from unittest.mock import patch

    import huggingface_hub.constants as hub

    os.environ |= {"AXOLOTL_DO_NOT_TRACK": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    variable = os.environ.get("HF_HUB_OFFLINE", "0")
    if offline:
        os.environ["HF_HUB_OFFLINE"] = "1"
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with (
            patch.object(hub, "HF_HUB_OFFLINE", offline or hub.HF_HUB_OFFLINE),
            patch.object(importlib.metadata, "packages_distributions", _packages_distributions),
            redirect_stdout(sys.stderr),
        ):
            yield
    finally:
        logging.disable(disabled)
        os.environ["HF_HUB_OFFLINE"] = variable


@contextmanager
def without(*packages: str) -> Iterator[None]:
    """Hide optional packages from imports in the block, unless they are imported already.

    transformers and PEFT import what is installed: scikit-learn to guess tokens ahead, torchao to quantize. Both take
    a quarter of the imports' time. An entry None in sys.modules stands for a missing package.
    """
    hidden = [name for name in packages if name not in sys.modules]
    cast(dict[str, None], sys.modules).update(dict.fromkeys(hidden))
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


NAME = re.compile(r"[\w.-]+/[\w.-]+")  # a repository with its owner
ANSWER_TIMEOUT = 5.0
"""Seconds to wait for the hub."""


@dataclass(frozen=True)
class HubAccess:
    """A user's access to a model.

    Attributes:
        access: `open`: can be downloaded; `gated`: needs the token of an account with access; `missing`: does not
            exist, or is private; `refused`: the hub rejects the token; `unknown`: no answer, or another error.
        says: the hub's message, or the error that prevented an answer.
    """

    access: Literal["open", "gated", "missing", "refused", "unknown"]
    says: str = ""


_answers: dict[str, HubAccess] = {}


def access(name: str) -> HubAccess:
    """Access of this user to a model, with the token that huggingface_hub finds.

    Each process asks the hub once per model. After the first `unknown`, it stops asking.
    """
    silent = next((answer for answer in _answers.values() if answer.access == "unknown"), None)
    if name not in _answers:
        _answers[name] = silent or _ask(name)
    return _answers[name]


def _ask(name: str) -> HubAccess:
    """Ask the hub; interpret the errors of huggingface_hub 1.x (utils/_http.py, hf_raise_for_status).

    Without a token, the hub answers 401 for a model that does not exist; huggingface_hub treats this as missing.
    A 404 that is not a repository error comes from a mirror of the hub that lacks this API call.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    try:
        within(ANSWER_TIMEOUT, lambda: HfApi().auth_check(name))
    except HfHubHTTPError as error:
        status = error.response.status_code
        says = error.response.headers.get("X-Error-Message") or f"status {status}"
        if isinstance(error, GatedRepoError):  # a subclass of RepositoryNotFoundError
            return HubAccess("gated", says)
        if isinstance(error, RepositoryNotFoundError):
            return HubAccess("missing", says)
        return HubAccess("refused" if status in (401, 403) else "unknown", says)
    except Exception as error:  # one of httpx's many network errors
        return HubAccess("unknown", first_line(error))
    return HubAccess("open")


@cache
def files(name: str, revision: str | None) -> list[str]:
    """Names of a model's files; empty without access, or if the hub does not list them."""
    from huggingface_hub import HfApi

    if access(name).access != "open":
        return []
    try:
        return within(ANSWER_TIMEOUT, lambda: HfApi().list_repo_files(name, revision=revision))
    except Exception:  # from the hub or the network
        return []


def content(name: str, file: str, revision: str | None) -> bytes:
    """Content of a model's file.

    Raises:
        OSError: the hub does not send it.
    """
    from huggingface_hub import hf_hub_download

    try:
        return Path(within(2 * ANSWER_TIMEOUT, lambda: hf_hub_download(name, file, revision=revision))).read_bytes()
    except Exception as error:  # from the hub or the network
        raise OSError(first_line(error)) from None


TOKENIZER = ("tokenizer*", "chat_template*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt")
"""Patterns of a tokenizer's files."""
TOKENIZER_TIMEOUT = 120.0
"""Seconds for the download of a tokenizer, of at most some 30 MB."""


def fetch_tokenizer(name: str, revision: str | None) -> None:
    """Download a model's tokenizer and config.json into the hub's cache, if this user has access."""
    from huggingface_hub import snapshot_download

    if is_offline() or access(name).access != "open":
        return
    patterns = ["config.json", *TOKENIZER]
    with suppress(Exception):  # from the hub or the network
        within(TOKENIZER_TIMEOUT, lambda: snapshot_download(name, revision=revision, allow_patterns=patterns))


def within[T](seconds: float, ask: Callable[[], T]) -> T:
    """Run a function with a timeout; raise its exceptions.

    Raises:
        TimeoutError: there is no result in time; the function's thread continues.
    """
    future: Future[T] = Future()

    def work() -> None:
        try:
            future.set_result(ask())
        except Exception as error:  # `future.result` raises it in the caller's thread
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    try:
        return future.result(seconds)
    except TimeoutError:
        raise TimeoutError(f"no answer within {seconds:g} s") from None


Kind = Literal["models", "datasets"]


def snapshot(kind: Kind, name: str, revision: Any) -> Path:
    """Cached files of a repository at a revision (default: main), existing or not; the commit is the folder's name.

    huggingface_hub has such a function, but importing it would double the time of `recipe check`.
    """
    from huggingface_hub.constants import HF_HUB_CACHE

    repository = Path(HF_HUB_CACHE) / f"{kind}--{name.replace('/', '--')}"
    commit = str(revision or "main")
    ref = repository / "refs" / commit
    if ref.is_file():
        commit = ref.read_text().strip()
    return repository / "snapshots" / commit


def page(name: str) -> str:
    """URL of a model's page."""
    from huggingface_hub.constants import ENDPOINT

    return f"{ENDPOINT}/{name}"


@contextmanager
def uploading(repository: str, option: str) -> Iterator[None]:
    """Report errors of uploads in the block.

    Raises:
        UserError: the token gives no access.
        WorkFailed: the hub cannot be reached or fails.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # from the hub, the network or the token
        response = getattr(error, "response", None)
        if getattr(response, "status_code", None) in (401, 403):
            remedy = "give a token with access by `hf auth login` or HF_TOKEN"
            raise UserError(f"no write access to {repository}", key=option, remedy=remedy) from None
        raise WorkFailed(f"{repository}: not uploaded: {one_line(error)}; repeat the command") from None


def has_token() -> bool:
    """True if the user has a token for the hub."""
    from huggingface_hub import get_token

    return bool(get_token())


def is_offline() -> bool:
    """True if HF_HUB_OFFLINE forbids requests to the hub."""
    from huggingface_hub.constants import HF_HUB_OFFLINE

    return bool(HF_HUB_OFFLINE)
