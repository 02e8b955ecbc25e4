"""What rules judge, and the decorator that makes one."""

import importlib.metadata
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ...base import paths
from ...base.yamlfiles import Config
from ...configs import datafiles, models
from ...configs.gpus import Gpu
from ...configs.precision import attention
from ..finding import Level

Problems = Iterator[tuple[Level, str, str, str]]
RULES: list[Callable[["Case"], Problems]] = []


def rule(function: Callable[["Case"], Problems]) -> Callable[["Case"], Problems]:
    """Register a function as a rule, which has its name, with hyphens."""
    RULES.append(function)
    return function


@dataclass
class Case:
    """What rules judge.

    Attributes:
        config: the config, without the values that break the schema.
        wrong: the top-level keys from which a value was removed.
        gpu: the GPU that it is meant for; None where none is named or there.
        gpus: how many of them.
        launching: whether a run is about to start here, so that what only this machine lacks is an error.
        ask_hub: whether the hub may be asked about a model that is not here.
        runs: the folder with the runs.
    """

    config: Config
    wrong: set[str]
    gpu: Gpu | None = None
    gpus: int = 1
    launching: bool = False
    ask_hub: bool = False
    runs: Path = paths.RUNS

    def __getitem__(self, key: str) -> Any:
        return self.config.get(key)

    @cached_property
    def model(self) -> models.Model:
        """What is known about the base model."""
        return models.find(self.config)

    @cached_property
    def architecture(self) -> Config:
        """The content of the base model's config.json; empty where it is not here."""
        return models.architecture_here(self.config)

    @cached_property
    def steps(self) -> int | None:
        """The optimizer steps of the training, where they can be counted; an upper bound where rows are packed."""
        return None if self.wrong else datafiles.training_steps(self.config | {"sample_packing": False}, self.gpus)

    @property
    def number_of_steps(self) -> str:
        """The steps in words."""
        return f"{'at most ' if self['sample_packing'] and not self['max_steps'] else ''}{self.steps} steps"

    @property
    def attention(self) -> str:
        """The attention that the config asks for."""
        return attention(self.config)

    @property
    def plugins(self) -> set[str]:
        """The classes of the plugins that are on; cut cross entropy's is, once it is listed, unless its key is false
        (axolotl/integrations/cut_cross_entropy/args.py)."""
        listed = {re.split("[.:]", str(name))[-1] for name in self["plugins"] or ()}
        return listed - ({"CutCrossEntropyPlugin"} if self["cut_cross_entropy"] is False else set())

    @property
    def lora(self) -> bool:
        """Whether an adapter of PEFT's LoRA is trained."""
        return self["adapter"] in ("lora", "qlora")

    def is_set(self, *keys: str) -> bool:
        """Whether one of some keys has a value that is neither empty nor false; a wrong one counts."""
        return any(self.config.get(key) or key in self.wrong for key in keys)

    def is_installed(self, package: str) -> bool:
        """Whether a package is installed, by its name in the registry."""
        try:
            return bool(importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            return False
