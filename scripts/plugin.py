"""The name by which the config of every run knows its Axolotl plugin; the plugin itself is in runs/plugin.py."""

from .runs.plugin import RunPlugin

__all__ = ["RunPlugin"]
