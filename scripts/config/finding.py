"""Findings of a check."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from ..base.errors import UserError, did_you_mean
from . import keys
from .merging import top_key

Level = Literal["error", "warning", "note"]
LEVELS: tuple[Level, ...] = get_args(Level)

Scope = Literal["step", "config", "code", "data", "file", "gpu", "machine"]
MOST_FINDINGS = 100
"""Largest number of findings about one key; looking for similar names takes milliseconds each."""
NO_BASE = "no-base"
"""Finding about a base in the recipe's header that has no merged run."""
NO_BATCH = "no-batch"
"""Finding about rows that fill no batch."""
TASK_CODE = "task-code"
"""Rule about the task files of benchmarks."""
DATED = "dated-template"
"""Rule about chat templates that write today's date."""
FIRST_LOSS = "first-loss"
"""Rule about the first loss of a training, see `losses.highest_first_loss`."""
LEAKED = "leaked-row"
"""Rule about evaluation rows that are also training rows."""
MODEL = "model"
"""Rule about a model that differs from its config, see the module `model_facts`."""
SIGNALS = "training"
"""Rule about the losses, gradients and warnings of a training, see the module `signals`."""


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
        rule_scope: the scope that the rule states, see `scope`.
    """

    level: Level
    rule: str
    key: str
    problem: str
    remedy: str = ""
    where: str = ""
    line: int | None = None
    rule_scope: Scope = "config"

    @property
    def scope(self) -> Scope:
        """Subject of the finding: the rule's; for a rule about settings, `data` if that is the key's kind in keys.yaml.

        `step`: a setting of the training step; an error in it makes a plan impossible. `config`: any other setting.
        `code`: foreign code. `data`: a data file or its rows. `file`: a missing file. `gpu`: the GPU that the config is
        meant for. `machine`: this machine.
        """
        if self.rule_scope == "config" and keys.find(self.key).kind == "data":
            return "data"
        return self.rule_scope

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

    @property
    def text(self) -> str:
        """Key, problem, remedy, and the name for `--force`."""
        description = UserError(self.problem, key=self.key, remedy=self.remedy).description
        return f"{description} [{self.name}]" if self.rule else description

    def as_json(self) -> dict[str, Any]:
        """JSON fields."""
        row = vars(self) | {"name": self.name}
        del row["rule_scope"]
        return row

    def __str__(self) -> str:
        place = UserError("", file=self.where, line=self.line).place
        return f"{place}: {self.level}: {self.text}"


@dataclass
class FaultyRows:
    """Rows with the same fault: their number, and the first of them.

    Attributes:
        first: file, line and example of each of the first rows.
        last: file and line of the last row.
    """

    count: int = 0
    last: tuple[str, int] | None = None
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
        """Count a faulty row, once; beyond `MOST_SUBJECTS`, subjects are counted together."""
        if len(self) >= self.MOST_SUBJECTS and (rule, about) not in self:
            about = "…"
        rows = self.setdefault((rule, about), FaultyRows())
        if rows.last == (file, line):  # another message or answer of this row
            return
        rows.last = (file, line)
        rows.count += 1
        if len(rows.first) < self.MOST_ROWS:
            rows.first.append((file, line, example))


_NEVER_OVERRIDDEN = ("secret", "axolotl", "no-adapter", "")
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

    Task files are read only before an evaluation, and a training finds mistakes of its own.
    """
    for name in force:
        rule = name.partition(":")[0]
        if name not in names and rule not in (TASK_CODE, FIRST_LOSS, MODEL, SIGNALS):
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
