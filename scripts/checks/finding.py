"""Findings of a check, and the rules that yield them.

Rules see a config whose keys and values are all allowed.

A rule is a function that yields (level, key, problem, remedy); its name, with hyphens, is the finding's. Its docstring
gives the reason for the rule and the evidence; "seen" means observed with Axolotl 0.21. Rules may rely on the schema:
values that break it have been removed from the config that they get. A rule about something other than the config, or
one that keeps a plan from being made, has its scope in `_SCOPES`.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

from ..base.errors import UserError, did_you_mean
from ..base.machine import package_version
from ..base.yamlfiles import Config
from ..configs import datafiles, models
from ..configs.gpus import Gpu
from ..configs.numerics import attention

Level = Literal["error", "warning", "note"]
LEVELS: tuple[Level, ...] = get_args(Level)

Scope = Literal["step", "config", "code", "data", "file", "gpu", "machine"]
_SCOPES: dict[str, Scope] = {
    "value": "step",
    "unknown-key": "step",
    "no-lora-targets": "step",
    "unknown-lora-target": "step",
    "no-lora-rank": "step",
    "not-quantized": "step",
    "remote-code": "code",
    "foreign-code": "code",
    "pickled-weights": "code",
    "not-prepared": "data",
    "no-batch": "data",
    "missing-file": "file",
    "gpu-lacks": "gpu",
    "too-big": "gpu",
    "unfit": "gpu",
    "no-gpu": "machine",
}


@dataclass
class Finding:
    """One thing that is wrong with a config or its data, or worth knowing.

    Attributes:
        level: error, which keeps a run from starting; warning; or note, which is not a mistake.
        rule: the name of the rule that was broken; empty where nothing can force a run past it.
        key: the dotted key that it is about; empty for a whole file.
        problem: what is wrong.
        remedy: what to do about it.
        where: the file, or the option, that the key is from.
        line: the line of that file, from 1.
    """

    level: Level
    rule: str
    key: str
    problem: str
    remedy: str = ""
    where: str = ""
    line: int | None = None

    @property
    def scope(self) -> Scope:
        """Its subject: `step`, the training step, which cannot be planned then; `config`, another setting;
        `code`, what it runs that is neither Axolotl's nor this project's;
        `data`, a data file or its rows; `file`, another file; `gpu`, the GPU that the config is meant for; `machine`,
        the hardware of this machine."""
        scope = _SCOPES.get(self.rule, "config")
        return "data" if self.key.endswith(".path") and scope not in ("step", "code") else scope

    @property
    def name(self) -> str:
        """Its name for `--force`."""
        return f"{self.rule}:{self.key}" if self.key else self.rule

    def __str__(self) -> str:
        place = f"{self.where}:{self.line}" if self.line else self.where
        about = f"{self.key}: " if self.key else ""
        remedy = f"; {self.remedy}" if self.remedy else ""
        name = f" [{self.name}]" if self.rule else ""
        return f"{place}: {self.level}: {about}{self.problem}{remedy}{name}"


_NEVER_FORCED = ("secret:", *(f"value:{key}" for key in ("plugins", "datasets", "test_datasets", "trl", "trust_")))
"""Prefixes of errors that a run cannot start with, or whose values no rule about code would see."""


def override_errors(findings: Iterable[Finding], force: Sequence[str]) -> None:
    """Make warnings of the errors that --force names."""
    for finding in findings:
        if finding.level == "error" and finding.name in force and not finding.name.startswith(_NEVER_FORCED):
            finding.level, finding.remedy = "warning", "overridden by --force"


def unknown_force(force: Sequence[str], names: set[str]) -> None:
    """Raise UserError where --force names none of some findings."""
    for name in force:
        if name not in names:
            hint = did_you_mean(name, names) or "; names are in brackets"
            raise UserError(f"--force {name}: no error of this config has that name{hint}")


def refuse(findings: list[Finding], force: Sequence[str] = ()) -> list[Finding]:
    """The findings that are left to show once the errors that --force names are overridden.

    Raises:
        UserError: an error is left, or --force names none.
    """
    unknown_force(force, {finding.name for finding in findings if finding.level == "error"})
    override_errors(findings, force)
    if errors := [str(finding) for finding in findings if finding.level == "error"]:
        raise UserError("\n".join(errors))
    return [finding for finding in findings if finding.name not in force or finding.scope == "code"]


Problems = Iterator[tuple[Level, str, str, str]]
RULES: list[Callable[["Case"], Problems]] = []


def rule(function: Callable[["Case"], Problems]) -> Callable[["Case"], Problems]:
    """Register a function as a rule, which has its name, with hyphens."""
    RULES.append(function)
    return function


@dataclass
class Case:
    """A config and its circumstances, for rules.

    Attributes:
        config: the config, without the values that break the schema.
        wrong: the top-level keys from which a value was removed.
        gpu: the GPU that it is meant for; None where none is named or there.
        gpus: how many of them.
        launching: whether a run is about to start here, so that what only this machine lacks is an error.
        ask_hub: whether the hub may be asked about a model that is not here.
    """

    config: Config
    wrong: set[str]
    gpu: Gpu | None = None
    gpus: int = 1
    launching: bool = False
    ask_hub: bool = False

    def __getitem__(self, key: str) -> Any:
        return self.config.get(key)

    @cached_property
    def model(self) -> models.Model:
        """Facts about the base model."""
        return models.find(self.config)

    @cached_property
    def architecture(self) -> Config:
        """The content of the base model's config.json; empty where it is not here."""
        return models.architecture_here(self.config)

    @cached_property
    def steps(self) -> int | None:
        """Optimizer steps, if they can be counted; an upper bound for packed rows."""
        return None if self.wrong else datafiles.training_steps(self.config | {"sample_packing": False}, self.gpus)

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
        """True if an adapter of PEFT's LoRA is trained."""
        return self["adapter"] in ("lora", "qlora")

    def is_set(self, *keys: str) -> bool:
        """True if one of the keys is neither empty nor false; wrong values count."""
        return any(self.config.get(key) or key in self.wrong for key in keys)

    def is_installed(self, package: str) -> bool:
        """True if a package of that name in the registry is installed."""
        return package_version(package) is not None
