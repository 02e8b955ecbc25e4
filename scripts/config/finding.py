"""Findings of a check, and the registry of rules.

A rule is a function that yields (level, key, problem, remedy). Its findings get the rule's name, with hyphens. The
docstring of a rule gives the reason and the evidence; "seen" means observed with Axolotl 0.21.

Rules can assume a config that follows the schema, because values that break the schema are removed first. `_SCOPES`
lists rules about anything other than the config, and rules whose errors prevent a plan.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, get_args

from ..base.errors import UserError, did_you_mean
from ..base.yamlfiles import Config
from . import datafiles, keys, models
from .gpus import Gpu
from .merging import Difference, listed, top_key
from .numerics import AMPERE, OLD_ATTENTION_KEYS, attention

Level = Literal["error", "warning", "note"]
LEVELS: tuple[Level, ...] = get_args(Level)

Scope = Literal["step", "config", "code", "data", "file", "gpu", "machine"]
_SCOPES: dict[str, Scope] = {
    "value": "step",
    "axolotl": "step",
    "unknown-key": "step",
    "missing-key": "step",
    "no-lora-targets": "step",
    "unknown-lora-target": "step",
    "no-lora-rank": "step",
    "not-quantized": "step",
    "foreign-code": "code",
    "pickled-weights": "code",
    "not-prepared": "data",
    "no-batch": "data",
    "missing-file": "file",
    "gpu-lacks": "gpu",
    "too-big": "gpu",
    "unfit": "gpu",
    "no-gpu": "machine",
    "not-validated": "machine",
}


MOST_FINDINGS = 100
"""Largest number of findings about one key; looking for similar names takes milliseconds each."""
TASK_CODE = "task-code"
"""Rule about the task files of benchmarks."""
FIRST_LOSS = "first-loss"
"""Finding of a training about its first loss, see `run_record.HighFirstLoss`."""


@dataclass
class Finding:
    """A mistake in a config or its data, or a note about them.

    Attributes:
        level: an error stops a run; a warning does not; a note is not a mistake.
        rule: the name of the rule. If it is empty, `--force` cannot override the finding.
        key: the dotted config key; empty if the finding does not concern a single key.
        problem: the description of the mistake.
        remedy: the advice to the user.
        where: the file or option that sets the key.
        line: the line number in that file, from 1.
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
        """Subject of the finding.

        `step`: a setting of the training step; an error in it makes a plan impossible. `config`: any other setting.
        `code`: foreign code. `data`: a data file or its rows. `file`: a missing file. `gpu`: the GPU that the config is
        meant for. `machine`: this machine.
        """
        return _scope(self.rule, self.key)

    @property
    def top_key(self) -> str:
        """Top-level key of the config that the finding concerns; empty without one."""
        return top_key(self.key)

    @property
    def name(self) -> str:
        """Name of the finding for `--force`."""
        return f"{self.rule}:{self.key}" if self.key else self.rule

    def is_forced(self, force: Sequence[str]) -> bool:
        """True if `--force` with these names overrides the finding."""
        return self.name in force and self.rule not in _NEVER_OVERRIDDEN

    def __str__(self) -> str:
        error = UserError(self.problem, file=self.where, line=self.line, key=self.key, remedy=self.remedy)
        text = f"{error.place}: {self.level}: {error.description}"
        if self.rule:
            text += f" [{self.name}]"
        return text


def _scope(rule: str, key: str) -> Scope:
    scope = _SCOPES.get(rule, "config")
    if scope == "config" and keys.find(key).kind == "data":
        return "data"
    return scope


def is_found_at_start(name: str) -> bool:
    """True for the name of a finding about a data file, its rows or this machine, see `Finding.name`."""
    rule, _, key = name.partition(":")
    return _scope(rule, key) in ("data", "machine")


@dataclass
class FaultyRows:
    """Rows with the same fault: their number, and the first of them.

    Attributes:
        first: file, line and example of each of the first rows.
    """

    count: int = 0
    first: list[tuple[str, int, str]] = field(default_factory=list)

    @property
    def place(self) -> tuple[str, int]:
        """File and line of the first row."""
        return self.first[0][:2]

    def __str__(self) -> str:
        """Number of rows, with the first of their lines, and with files other than the first row's."""
        if self.count == 1:
            return "1 row"
        lines = []
        for file, line, _ in self.first:
            lines.append(str(line) if file == self.place[0] else f"{file}:{line}")
        if self.count > len(self.first):
            lines.append("…")
        return f"{self.count} rows (lines {', '.join(lines)})"


class Faults(dict[tuple[str, str], FaultyRows]):
    """Faulty rows by rule and subject; the memory does not grow with the number of rows."""

    MOST_ROWS = 10
    MOST_SUBJECTS = 100

    def note(self, rule: str, about: str, file: str, line: int, example: str = "") -> None:
        """Count a faulty row; beyond `MOST_SUBJECTS`, subjects are counted together."""
        if len(self) >= self.MOST_SUBJECTS and (rule, about) not in self:
            about = "…"
        rows = self.setdefault((rule, about), FaultyRows())
        rows.count += 1
        if len(rows.first) < self.MOST_ROWS:
            rows.first.append((file, line, example))


_NEVER_OVERRIDDEN = ("secret", "axolotl", "")
"""Rules whose errors `--force` cannot override; also findings without a rule."""


def remaining_errors(findings: Iterable[Finding], force: Sequence[str] = ()) -> list[Finding]:
    """Errors that --force does not override."""
    return [finding for finding in findings if finding.level == "error" and not finding.is_forced(force)]


def override_errors(findings: Iterable[Finding], force: Sequence[str]) -> None:
    """Turn the errors named by --force into warnings, except those of `_NEVER_OVERRIDDEN`."""
    for finding in findings:
        if finding.level == "error" and finding.is_forced(force):
            finding.level, finding.remedy = "warning", "overridden by --force"


def unknown_force(force: Sequence[str], names: set[str]) -> None:
    """Raise UserError if --force names a finding that does not exist, and cannot arise later.

    Task files are read only before an evaluation, and only training has a first loss.
    """
    for name in force:
        rule = name.partition(":")[0]
        if name not in names and rule not in (TASK_CODE, FIRST_LOSS):
            hint = did_you_mean(name, names) or "; errors show their names in brackets"
            raise UserError(f"--force {name}: this config has no such error{hint}")


def refuse(findings: list[Finding], force: Sequence[str] = ()) -> list[Finding]:
    """Raise UserError unless --force overrides every error.

    Returns:
        Warnings, notes, and as warnings the overridden errors about untrusted code. Other errors are omitted.

    Raises:
        UserError: an error remains, or --force names an error that does not exist.
    """
    errors = [finding for finding in findings if finding.level == "error"]
    unknown_force(force, {error.name for error in errors})
    override_errors(errors, force)
    remaining = [str(error) for error in errors if error.level == "error"]
    if remaining:
        raise UserError("\n".join(remaining))
    return [finding for finding in findings if finding.name not in force or finding.scope == "code"]


Problems = Iterator[tuple[Level, str, str, str]]
Rule = Callable[["Case"], Problems]
RULES: list[Rule] = []


def rule(function: Rule) -> Rule:
    """Register a function as a rule; the rule's name is the function's, with hyphens."""
    RULES.append(function)
    return function


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
        changes: the changes by profiles, --set and a rehearsal.
    """

    written: Config
    config: Config
    wrong: set[str]
    gpu: Gpu | None = None
    gpus: int = 1
    launching: bool = False
    ask_hub: bool = False
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


def rule_findings(case: Case, scope: Scope | None = None) -> Iterator[Finding]:
    """Findings of the rules of a scope, by default of all."""
    for judge in RULES:
        name = judge.__name__.replace("_", "-")
        if scope in (None, _SCOPES.get(name)):
            for level, key, problem, remedy in judge(case):
                yield Finding(level, name, key, problem, remedy)
