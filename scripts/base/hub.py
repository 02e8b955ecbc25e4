"""The hub, asked for no longer than is worth it, and Axolotl imported without asking it."""

import importlib.metadata
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import cache
from typing import Literal

# transformers and trl ask for it as they are imported, and searching all installed packages twice takes 3 s
_packages_distributions = cache(importlib.metadata.packages_distributions)


@contextmanager
def importing_axolotl(offline: bool = True) -> Iterator[None]:
    """Import and use Axolotl within the block: stdout stays for data, and logs below errors are dropped.

    Args:
        offline: do not contact the hub, from which bitsandbytes would fetch a kernel on a CPU.
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


ANSWER_TIMEOUT = 5.0
"""Seconds to wait for the hub."""


@dataclass(frozen=True)
class HubAccess:
    """A user's access to a model.

    Attributes:
        access: `open`, it may be downloaded; `gated`, not with this token, or not without one; `missing`, there is none
            of this name, or a private one; `refused`, the hub takes no request with this token; `unknown`, no answer.
        says: the hub's own words, or what kept it from answering.
    """

    access: Literal["open", "gated", "missing", "refused", "unknown"]
    says: str = ""


_answers: dict[str, HubAccess] = {}


def access(name: str) -> HubAccess:
    """Access of this user to a model, with the token that huggingface_hub finds.

    The hub is asked once for each model in a process, and no more once it did not answer.
    """
    silent = next((answer for answer in _answers.values() if answer.access == "unknown"), None)
    if name not in _answers:
        _answers[name] = silent or _ask(name)
    return _answers[name]


def _ask(name: str) -> HubAccess:
    """The answer as huggingface_hub 1.x raises it (utils/_http.py, hf_raise_for_status).

    Without a token the hub answers 401 for a model that does not exist, too, which huggingface_hub takes for missing.
    A 404 that does not speak of a repository is that of a mirror of the hub which has no such call.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    try:
        within(ANSWER_TIMEOUT, lambda: HfApi().auth_check(name))
    except HfHubHTTPError as error:
        status = error.response.status_code
        says = error.response.headers.get("X-Error-Message") or f"status {status}"
        if isinstance(error, GatedRepoError):  # which is a RepositoryNotFoundError, too
            return HubAccess("gated", says)
        if isinstance(error, RepositoryNotFoundError):
            return HubAccess("missing", says)
        return HubAccess("refused" if status in (401, 403) else "unknown", says)
    except Exception as error:  # of the network, which httpx has many of
        return HubAccess("unknown", reason(error))
    return HubAccess("open")


def within[T](seconds: float, ask: Callable[[], T]) -> T:
    """The result of a function that asks the hub, or what it raises. When it takes longer its thread is left behind.

    Raises:
        TimeoutError: it takes longer.
    """
    future: Future[T] = Future()

    def work() -> None:
        try:
            future.set_result(ask())
        except Exception as error:  # for the caller
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    try:
        return future.result(seconds)
    except TimeoutError:
        if future.done():
            raise  # the function's own
        raise TimeoutError(f"no answer within {seconds:g} s") from None


def reason(error: Exception) -> str:
    """First line of an error."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def page(name: str) -> str:
    """The address of a model's page."""
    from huggingface_hub.constants import ENDPOINT

    return f"{ENDPOINT}/{name}"


def has_token() -> bool:
    """True if there is a token for the hub."""
    from huggingface_hub import get_token

    return bool(get_token())


def is_offline() -> bool:
    """True if the hub must not be asked."""
    from huggingface_hub.constants import HF_HUB_OFFLINE

    return bool(HF_HUB_OFFLINE)
