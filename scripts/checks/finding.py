"""A finding of a check."""

from dataclasses import dataclass
from typing import Literal, get_args

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
    "no-room": "machine",
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
        """What it is about: `step`, the training step, which cannot be planned then; `config`, another setting;
        `code`, what it runs that is neither Axolotl's nor this project's;
        `data`, a data file or its rows; `file`, another file; `gpu`, the GPU that the config is meant for; `machine`,
        the hardware of this machine."""
        scope = _SCOPES.get(self.rule, "config")
        return "data" if self.key.endswith(".path") and scope not in ("step", "code") else scope

    @property
    def name(self) -> str:
        """What `--force` calls it."""
        return f"{self.rule}:{self.key}" if self.key else self.rule

    def __str__(self) -> str:
        place = f"{self.where}:{self.line}" if self.line else self.where
        about = f"{self.key}: " if self.key else ""
        remedy = f"; {self.remedy}" if self.remedy else ""
        name = f" [{self.name}]" if self.rule else ""
        return f"{place}: {self.level}: {about}{self.problem}{remedy}{name}"
