"""Import path of the Axolotl plugin in the configs of runs; runs/plugin.py defines it."""

from .runs.plugin import RunPlugin

__all__ = ["RunPlugin"]
