"""Launches Axolotl recipes for QLoRA studies and gathers their results."""

__version__ = "1.0.0"
