"""Importing Axolotl without its libraries' messages, and without asking a hub for anything or waiting for one long."""

import importlib.metadata
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from functools import cache
from typing import Any

from .errors import WorkFailed

PATIENCE = 60.0
"""Seconds after which a hub that does not answer is given up."""

# transformers and trl ask for it as they are imported, and searching all installed packages twice takes 3 s
_packages_distributions = cache(importlib.metadata.packages_distributions)


@cache
def limit_waiting() -> None:
    """Have huggingface_hub give up a hub that leaves a request without an answer; its client waits without end."""
    from httpx import Client, TimeoutException
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils._http import default_client_factory

    def client() -> Client:
        made = default_client_factory()
        send = made.send

        def send_in_time(request: Any, **options: Any) -> Any:
            request.extensions["timeout"] = dict.fromkeys(request.extensions["timeout"], PATIENCE)
            try:
                return send(request, **options)
            except TimeoutException:
                raise WorkFailed(f"{request.url.host}: did not answer within {PATIENCE:g} s") from None

        made.send = send_in_time  # type: ignore[method-assign]  # its factory sets up the client
        return made

    set_client_factory(client)


@contextmanager
def importing_axolotl(offline: bool = True) -> Iterator[None]:
    """Import and use Axolotl within the block: stdout stays for data, and logs below errors are dropped.

    Args:
        offline: do not contact the hub, from which bitsandbytes would fetch a kernel on a CPU.
    """
    import huggingface_hub.constants as hub

    os.environ |= {"AXOLOTL_DO_NOT_TRACK": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    was_offline = hub.HF_HUB_OFFLINE
    variable = os.environ.get("HF_HUB_OFFLINE", "0")
    if offline:
        hub.HF_HUB_OFFLINE = True
        os.environ["HF_HUB_OFFLINE"] = "1"
    else:
        limit_waiting()
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    asked = importlib.metadata.packages_distributions
    importlib.metadata.packages_distributions = _packages_distributions
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        importlib.metadata.packages_distributions = asked
        logging.disable(disabled)
        hub.HF_HUB_OFFLINE = was_offline
        os.environ["HF_HUB_OFFLINE"] = variable
