"""Importing Axolotl without its libraries' messages, and without asking a hub for anything."""

import importlib.metadata
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from functools import cache

# transformers and trl ask for it as they are imported, and searching all installed packages twice takes 3 s
_packages_distributions = cache(importlib.metadata.packages_distributions)


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
