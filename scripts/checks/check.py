"""`recipe check`: all that is wrong with a config, found before anything starts."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..base import paths, yamlfiles
from ..base.errors import UserError
from ..base.quiet import importing_axolotl
from ..base.yamlfiles import Config
from ..configs import compose, models, standin
from ..configs.compose import Composed, Request
from ..configs.config import check_not_of_the_run
from ..configs.gpus import Gpu
from . import rows, rules, schema
from .finding import LEVELS, Finding


@dataclass
class Report:
    """What a check found of one recipe or file; `composed` is None where it could not be read.

    Attributes:
        data: for each data set that was read its files, rows and bytes, and its lengths in tokens where they are known.
    """

    name: str
    composed: Composed | None = None
    findings: list[Finding] = field(default_factory=list)
    data: list[dict[str, Any]] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """The report for --json."""
        found = [asdict(finding) | {"name": finding.name} for finding in self.findings]
        return {"checked": self.name, "findings": found, "data": self.data}

    def data_table(self) -> list[dict[str, Any]]:
        """Its data sets, a row each: size, lengths in tokens, and what becomes of them."""
        return [
            {
                "data": ", ".join(read["files"]),
                "rows": read["rows"],
                "MB": read["bytes"] / 1e6,
                "tokens": read.get("tokens"),
                "with loss": read.get("tokens_with_loss"),
                "median": read.get("percentiles", {}).get("50"),
                "95 %": read.get("percentiles", {}).get("95"),
                "longest": read.get("percentiles", {}).get("100"),
                "too long": read.get("longer_than_sequence_len"),
                "padding": read.get("padding_share"),
            }
            for read in self.data
        ]

    def count(self, level: str) -> int:
        """How many findings there are of a level."""
        return sum(finding.level == level for finding in self.findings)

    def add(self, found: Iterable[Finding]) -> None:
        """Add findings, errors first."""
        self.findings = sorted([*self.findings, *found], key=lambda finding: LEVELS.index(finding.level))


def check(
    request: Request,
    gpu: Gpu | None = None,
    data: bool = False,
    full: bool = False,
    launching: bool = False,
    composed: Composed | None = None,
) -> Report:
    """All that is wrong with one recipe or file.

    Args:
        request: the recipe or file, and what is laid over it.
        gpu: the GPU that it is meant for.
        data: also read every row of its data, and tokenize them where the tokenizer is on this machine.
        full: also ask Axolotl's own validation, which loads the plugins that the config lists.
        launching: a run is about to start here.
        composed: the request's config, where it is composed already.

    Without data and full no torch is imported.
    """
    report = Report(request.name)
    try:
        composed = composed or compose.compose(request)
        report = examine(composed, gpu, request.gpus, launching, data)
        report.name = request.name
        if full:
            with importing_axolotl():
                from . import installed

                of_axolotl = list(installed.validate(composed.config, gpu or installed.ANY_GPU))
            report.add(placed(of_axolotl, composed))
        if data and not report.count("error"):
            _measure_tokens(report, composed)
    except UserError as error:
        report.add([_unreadable(request.name, error)])
    except OSError as error:
        report.add([_unreadable(request.name, UserError(f"{error.filename}: {error.strerror}"))])
    return report


def examine(
    composed: Composed,
    gpu: Gpu | None = None,
    gpus: int = 1,
    launching: bool = False,
    data: bool = False,
) -> Report:
    """What the schema and the rules find in a config, each at its place. A rehearsal has no GPU.

    Args:
        launching: a run is about to start here.
        data: also read its rows.
    """
    of_schema = list(schema.findings(composed.config))
    wrong = [finding.key for finding in of_schema if finding.rule in ("value", "plugin-key")]
    sound = _without(composed.config, wrong)
    parts = {key.partition(".")[0] for key in wrong}
    case = rules.Case(sound, parts, None if composed.rehearsal else gpu, gpus, launching)
    report = Report(composed.recipe, composed)
    report.add(placed([*of_schema, *rules.findings(case)], composed))
    if data:
        of_rows, report.data = rows.check(sound)
        report.add(of_rows)
    return report


def tokens_of(request: Request, count: int) -> list[dict[str, Any]]:
    """The first rows of a config's training data, token by token, as `tokens.shown` describes them.

    Raises:
        UserError: the config, its data or its tokenizer does not allow it.
    """
    composed = compose.compose(request)
    refuse(examine(composed).findings, [])
    _need_tokenizer(composed, "--show-tokens", ", --rehearse takes a small model's")
    with importing_axolotl():
        from . import tokens

        return tokens.shown(composed.config, count)


def _need_tokenizer(composed: Composed, option: str, instead: str = "") -> None:
    if not _has_tokenizer(composed):
        name, revision = composed.config["base_model"], composed.config.get("revision_of_model")
        pinned = f" --revision {revision}" if revision else ""
        raise UserError(
            f"{option}: the tokenizer of {name} is not on this machine; `hf download {name}{pinned} "
            f"--include config.json --include 'tokenizer*'` fetches it{instead}"
        )


def _has_tokenizer(composed: Composed) -> bool:
    """Whether a config's tokenizer is on this machine; a rehearsal's is put there."""
    if composed.rehearsal:
        standin.model_folder()
    return models.find(composed.config).tokenizer_here


def _measure_tokens(report: Report, composed: Composed) -> None:
    """Add the lengths in tokens to a report."""
    if not _has_tokenizer(composed):
        problem = "lengths in tokens are not known: its tokenizer is not on this machine"
        report.add([Finding("note", "not-checked", "base_model", problem, where=report.name)])
        return
    of_tokens, measured = _lengths(composed)
    report.add(placed(of_tokens, composed))
    for read in report.data:
        read |= next((one for one in measured if one["key"] == read["key"]), {})


def lengths(composed: Composed) -> list[dict[str, Any]]:
    """How long the rows of a config's training data are in tokens, as `tokens.lengths` describes them.

    Raises:
        UserError: the data or the tokenizer is not on this machine, or Axolotl refuses them.
    """
    _need_tokenizer(composed, "--data")
    found = examine(composed).findings
    refuse(
        [finding for finding in found if finding.rule in ("missing-file", "no-data") and "test" not in finding.key], []
    )
    measured = [one for one in _lengths(composed)[1] if one["key"].startswith("datasets")]
    if not measured:
        raise UserError("--data: the config has no local JSONL file to measure")
    return measured


def _lengths(composed: Composed) -> tuple[list[Finding], list[dict[str, Any]]]:
    with importing_axolotl():
        from . import tokens

        return tokens.lengths(composed.config)


def _unreadable(name: str, error: UserError) -> Finding:
    """A finding for what keeps a config from being read: the place stands before the message."""
    match = re.fullmatch(r"(?s)(.+?\.ya?ml)(?::(\d+))?: (.*)", str(error))
    if not match:
        return Finding("error", "unreadable", "", str(error), where=name)
    return Finding("error", "unreadable", "", match[3], where=match[1], line=int(match[2]) if match[2] else None)


def refuse(found: list[Finding], force: list[str]) -> list[Finding]:
    """The findings that are left to show once those named by --force are overridden.

    Raises:
        UserError: an error is left, or --force names none.
    """
    names = {finding.name for finding in found if finding.level == "error"}
    for name in force:
        if name not in names:
            raise UserError(f"--force {name}: names no error of this config; they stand in brackets behind it")
        if name.startswith(("secret:", "value:plugins", "value:datasets")):
            raise UserError(f"--force {name}: a run cannot start with this")
    left = [finding for finding in found if finding.name not in force]
    if any(finding.level == "error" for finding in left):
        raise UserError("\n".join(str(finding) for finding in left if finding.level == "error"))
    return left


def _without(content: Config, keys: list[str]) -> Config:
    """A config without the values at some dotted keys."""
    for key in sorted(keys, key=lambda key: [(part.isdecimal(), part.zfill(9)) for part in key.split(".")])[::-1]:
        content = _removed(content, key.split("."))  # from the end, so that positions in lists stay
    return content


def _removed(value: Any, path: list[str]) -> Any:
    first, rest = path[0], path[1:]
    if isinstance(value, list) and first.isdecimal() and int(first) < len(value):
        kept = [_removed(value[int(first)], rest)] if rest else []
        return [*value[: int(first)], *kept, *value[int(first) + 1 :]]
    if isinstance(value, dict) and first in value:
        below = {first: _removed(value[first], rest)} if rest else {}
        return {key: item for key, item in value.items() if key != first} | below
    return value


def placed(found: list[Finding], composed: Composed) -> Iterator[Finding]:
    """The findings with the file and line, or the option, that their key is from.

    A warning whose line says `accepts RULE: reason` in a comment becomes a note.
    """
    for finding in found:
        file: Path | None = composed.recipe_file
        for difference in composed.differences:
            one, other = f"{difference.key}.", f"{finding.key}."
            if one.startswith(other) or other.startswith(one):
                file, finding.where = composed.files.get(difference.key), difference.why
        if file:
            finding.where, finding.line = paths.shown(file), yamlfiles.line_of(file, finding.key)
            comment = yamlfiles.read_text(file).splitlines()[finding.line - 1].partition("#")[2]
            accepted = re.search(rf"\baccepts {re.escape(finding.rule)}: (.+)", comment)
            if accepted and finding.level == "warning":
                finding.level, finding.remedy = "note", f"accepted: {accepted[1]}"
        yield finding


def check_arguments(arguments: list[str]) -> None:
    """Refuse options for `axolotl train` that it does not have, and what must not be given to it."""
    for argument in arguments:
        option = argument.lstrip("-").partition("=")[0].replace("-", "_")
        check_not_of_the_run(option, argument)
        if schema.is_secret(option):
            raise UserError(f"{argument}: would stand in the run's folder; give it by an environment variable")
        key = schema.key_of_option(option)
        if argument.startswith("--") and key:
            raise UserError(f"{argument}: a key of the config; --set {key}=... is checked and recorded as well")
        if argument.startswith("--") and option not in schema.TRAIN_OPTIONS:
            raise UserError(f"{argument}: `axolotl train` has no such option, and would ignore it")
