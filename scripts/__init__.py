"""Launches Axolotl recipes for QLoRA studies and gathers their results."""

__version__ = "0.1.0"
