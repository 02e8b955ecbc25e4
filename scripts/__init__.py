"""Launches Axolotl recipes for QLoRA studies and gathers their results."""

__version__ = "2.0.0"
