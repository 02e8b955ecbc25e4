"""Importing Axolotl without its libraries' messages, and without asking a hub for anything."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout


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
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        logging.disable(disabled)
        hub.HF_HUB_OFFLINE = was_offline
        os.environ["HF_HUB_OFFLINE"] = variable
