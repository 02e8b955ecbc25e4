"""Trains several configs, one after the other, in this process: importing Axolotl takes most of a tiny run."""

import sys

from axolotl.cli.train import do_cli
from axolotl.integrations.base import PluginManager

for file in sys.argv[1:]:
    sys.argv = [sys.argv[0]]  # Axolotl parses it
    PluginManager._instance = None  # else the plugins of one run stay for the next
    do_cli(file)
