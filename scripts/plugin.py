"""Import path of the Axolotl plugin in the configs of runs; training/run_plugin.py defines it."""

from .training.run_plugin import RunPlugin

__all__ = ["RunPlugin"]
