"""Rules of a check, the config that they judge, and their registry.

A rule is a function that yields (level, key, problem, remedy). Its findings get the rule's name, with hyphens. The
docstring of a rule gives the reason and the evidence; "seen" means observed with Axolotl 0.21.

Rules can assume a config that follows the schema, because values that break the schema are removed first.
"""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..base.registry import Registry
from ..base.yamlfiles import Config
from ..config import datafiles, models
from ..config.finding import Finding, Level, Scope
from ..config.gpus import Gpu
from ..config.merging import Difference, listed
from ..config.numerics import AMPERE, OLD_ATTENTION_KEYS, attention
from . import schema


@dataclass
class Case:
    """A config and its circumstances, for rules.

    Attributes:
        written: the config as written, also with values that break the schema.
        config: the config without these values.
        wrong: the top-level keys from which a value was removed.
        gpu: the GPU that the config is meant for; None if the user names no GPU and this machine has none.
        gpus: the number of GPUs.
        launching: a run is about to start here, so that anything missing on this machine is an error.
        ask_hub: rules may ask the hub about a model that is not on this machine.
        needs_data: rows will be read, so that a missing data file is an error, not a warning.
        changes: the changes by profiles, --set and a rehearsal.
    """

    written: Config
    config: Config
    wrong: set[str]
    gpu: Gpu | None = None
    gpus: int = 1
    launching: bool = False
    ask_hub: bool = False
    needs_data: bool = False
    changes: Sequence[Difference] = ()

    def __getitem__(self, key: str) -> Any:
        return self.config.get(key)

    @cached_property
    def model(self) -> models.Model:
        """Facts about the base model."""
        return models.find(self.config)

    @cached_property
    def architecture(self) -> Config:
        """Content of the base model's config.json; empty if not on this machine."""
        return models.architecture_here(self.config)

    @cached_property
    def steps(self) -> int | None:
        """Optimizer steps, if they can be counted; an upper bound for packed rows."""
        if self.wrong:
            return None
        return datafiles.training_steps(self.config | {"sample_packing": False}, self.gpus)

    @cached_property
    def unread(self) -> list[str]:
        """Dotted keys that Axolotl's schema does not list, each with a dot at the end."""
        return [f"{finding.key}." for finding in schema.findings(self.written) if finding.rule in schema.UNLISTED]

    def absent(self, path: Path) -> Level:
        """Level of a finding about a path: what this machine only lacks, another one may have."""
        return "error" if self.launching or os.path.lexists(path) else "warning"

    @property
    def missing_data(self) -> Level:
        """Level of a finding about a missing data file."""
        return "error" if self.needs_data else "warning"

    @property
    def attention(self) -> str:
        """The attention that the config asks for."""
        return attention(self.config)

    @property
    def attention_key(self) -> str:
        """The key that sets the attention, perhaps one of Axolotl's old keys."""
        return self.first_set(*OLD_ATTENTION_KEYS) or "attn_implementation"

    @property
    def advised_attention(self) -> str:
        """Setting of an attention that runs on the GPU and keeps packed rows apart."""
        if self.gpu and self.gpu.capability < AMPERE:
            return "attn_implementation: sdpa and sdpa_varlen: false"
        return "attn_implementation: flash_attention_2"

    @property
    def plugins(self) -> set[str]:
        """Classes of the active plugins.

        If cut_cross_entropy is false, its plugin is inactive, even if the config lists the plugin
        (axolotl/integrations/cut_cross_entropy/args.py)."""
        plugins = {re.split("[.:]", name)[-1] for name in listed(self.config, "plugins")}
        if self["cut_cross_entropy"] is False:
            plugins.discard("CutCrossEntropyPlugin")
        return plugins

    @property
    def lora(self) -> bool:
        """True if the config trains a LoRA adapter with PEFT."""
        return self["adapter"] in ("lora", "qlora")

    def first_set(self, *names: str) -> str | None:
        """The first of some keys that has a value other than empty or false; None if none has."""
        return next((key for key in names if self[key]), None)

    def is_set(self, *names: str) -> bool:
        """True if a key is set to a value other than empty or false. Invalid values count as set."""
        return any(self.config.get(key) or key in self.wrong for key in names)


type Problems = Iterator[tuple[Level, str, str, str]]
type Judge = Callable[[Case], Problems]


@dataclass(frozen=True)
class Rule:
    """A function that finds mistakes, and the subject of its findings, see `Finding.scope`."""

    scope: Scope
    judge: Judge


RULES = Registry[Rule]("rule", *(f"{__package__}.{subject}_rules" for subject in ("code", "data", "model", "settings")))


def rule(scope: Scope = "config") -> Callable[[Judge], Judge]:
    """Decorator that adds a function to the rules; the rule's name is the function's, with hyphens."""

    def add(judge: Judge) -> Judge:
        RULES.add(judge.__name__.replace("_", "-"), Rule(scope, judge))
        return judge

    return add


def rule_findings(case: Case, scope: Scope | None = None) -> Iterator[Finding]:
    """Findings of the rules of a scope, by default of all."""
    for name, added in RULES.items():
        if scope in (None, added.scope):
            for level, key, problem, remedy in added.judge(case):
                yield Finding(level, name, key, problem, remedy, rule_scope=added.scope)
