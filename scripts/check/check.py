"""`recipe check`: finds the mistakes in a config before anything starts."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from pathlib import Path

from ..base import paths, yamlfiles
from ..base.errors import UserError, recipe_command
from ..base.files import Row, digest, read_json, write_json
from ..base.hub import importing_axolotl
from ..base.processes import package_version
from ..base.yamlfiles import Config
from ..config import compose, datafiles, models, substitution
from ..config.compose import Composed, Request
from ..config.finding import (
    LEAKED,
    LEVELS,
    NO_BASE,
    NO_BATCH,
    Finding,
    Level,
    override_errors,
    refuse,
    remaining_errors,
)
from ..config.gpus import Gpu
from ..config.origin import header_of
from ..config.training_settings import TrainingSettings
from ..data import studies
from ..training import validation
from . import schema
from .rule import RULES, Case, rule_findings


@dataclass
class Report:
    """The result of checking one recipe or file.

    Attributes:
        composed: the config; None if it could not be read.
        data: one row per data set: its files, rows and bytes, and its lengths in tokens if known.
        validated: Axolotl has validated the config.
        compared: a sample of the rows was compared with its tokens.
    """

    name: str
    composed: Composed | None = None
    findings: list[Finding] = field(default_factory=list)
    data: list[Row] = field(default_factory=list)
    validated: bool = False
    compared: bool = False

    def as_json(self) -> Row:
        """The report for --json."""
        findings = [finding.as_json() for finding in self.findings]
        return {"checked": self.name, "findings": findings, "data": self.data}

    def data_table(self) -> list[Row]:
        """A row for each data set, with size, lengths and padding."""
        rows = []
        for measures in self.data:
            row = {"data": ", ".join(measures["files"])}
            for name, value in measures.items():
                if name not in ("key", "files", "unread_fields"):
                    row[name.replace("_", " ")] = value
            rows.append(row)
        return rows

    def count(self, level: str) -> int:
        """Number of findings of a level."""
        return sum(finding.level == level for finding in self.findings)

    def add(self, findings: Iterable[Finding]) -> None:
        """Add findings, errors first."""
        self.findings = sorted([*self.findings, *findings], key=lambda finding: LEVELS.index(finding.level))

    def skip(self, problem: str, key: str = "") -> None:
        """Add a note about a part that was not checked."""
        self.add([Finding("note", "not-checked", key, problem, where=self.name)])


def check_request(
    request: Request,
    gpu: Gpu | None = None,
    data: bool = False,
    launching: bool = False,
    composed: Composed | None = None,
) -> Report:
    """Find the mistakes in one recipe or file, apart from those that Axolotl itself finds; import no torch.

    Args:
        request: the recipe or file, with profiles and overrides.
        gpu: the GPU that the config is meant for.
        data: also read every row of the data; `tokenize_all` then tokenizes them.
        launching: a run is about to start here.
        composed: the request's config, if already composed.
    """
    report = Report(request.name)
    try:
        composed = composed or compose.compose(request, gpu)
        report = check_config(composed, gpu, request.gpus, launching, data, ask_hub=True)
        report.name = request.name
        override_errors(report.findings, request.force)
        report.add([])  # sorts the findings again, because levels have changed
    except UserError as error:
        report.add([_unreadable(request.name, error)])
    return report


def compare_rows(report: Report, request: Request) -> None:
    """Compare some rows of a checked config with their tokens, if the rows and the tokenizer are on this machine."""
    errors = remaining_errors(report.findings, request.force)
    if report.composed is None or any(error.scope in ("code", "step") for error in errors):
        return
    if not report.data:  # else all rows were read
        from . import rows

        row_findings, _ = rows.check_rows(report.composed.config, {finding.key for finding in report.findings}, SAMPLE)
        report.add(row_findings)
    try:
        report.compared = compare_sample(report, report.composed, request.ranks)
    except UserError as error:
        report.add([_unreadable(report.name, error)])


def tokenize_all(report: Report, request: Request) -> None:
    """Tokenize the readable rows of a checked config, unless errors in the config or a missing tokenizer prevent it."""
    if any(error.scope in ("code", "step") for error in remaining_errors(report.findings)):
        report.skip("skipped tokenizing the rows, because of errors; correct them, then check again")
        return
    if report.composed is None or not report.data:
        return
    if not _fetch_tokenizer(report.composed):
        words = ["check", request.name, *request.options, "--all-rows", "--rehearse"]
        command = recipe_command(*words, "--set", "datasets.0.split=train[:1000]")
        problem = "skipped tokenizing the rows: no tokenizer on this machine"
        report.skip(f"{problem}; {command} takes a small model's", "base_model")
        return
    try:
        tokenize(report, report.composed, request.ranks)
    except UserError as error:
        report.add([_unreadable(report.name, error)])


def add_validation(reports: Iterable[Report], gpu: Gpu | None, force: Sequence[str] = ()) -> None:
    """Add the findings of Axolotl's own validation to reports; it does not see settings with foreign code.

    Args:
        reports: the reports of configs for the same GPU.
        gpu: the GPU; rehearsals ignore it.
        force: the names of findings to override.
    """
    ready = []
    for report in reports:
        if report.composed is None:
            continue
        unsafe = _unsafe_keys(report, force)
        config = {key: value for key, value in report.composed.config.items() if key not in unsafe}
        ready.append((report, replace(report.composed, config=config)))
    results = validation.validate([composed for _, composed in ready], gpu)
    for (report, composed), findings in zip(ready, results, strict=True):
        report.validated = all(finding.rule != validation.NOT_VALIDATED for finding in findings)
        # the rules have better messages for the same mistake
        wrong = {error.top_key for error in remaining_errors(report.findings, force)} - {""}
        report.add(placed((finding for finding in findings if finding.key not in wrong), composed))


def _unsafe_keys(report: Report, force: Sequence[str]) -> set[str]:
    """Keys with code that Axolotl's validation could run, such as plugins; empty if the user accepts all code."""
    code = [finding for finding in report.findings if finding.scope == "code"]
    if not remaining_errors(code, force):
        return set()
    # the validation needs these names, and does not load what they name
    return {finding.top_key for finding in code} - {"base_model", "lora_model_dir", "datasets", "test_datasets"}


def check_config(
    composed: Composed,
    gpu: Gpu | None = None,
    gpus: int = 1,
    launching: bool = False,
    data: bool = False,
    ask_hub: bool = False,
    needs_data: bool = False,
) -> Report:
    """Report of all findings of the schema and the rules, with file and line.

    Args:
        gpu: the GPU that the config is meant for; ignored for a rehearsal.
        launching: a run is about to start here.
        data: also read the rows.
        ask_hub: also ask the hub about a base model that is not on this machine; always done before a run.
        needs_data: rows will be read, as with `launching` and `data`.

    Raises:
        UserError: the recipe's study.yaml is malformed.
    """
    studies.study_of(composed.origin)
    gpu = None if composed.rehearsal else gpu
    of_schema = list(schema.findings(composed.config))
    usable, wrong = schema.usable(composed.config, of_schema)
    ask_hub |= launching
    needs_data |= launching or data
    case = Case(composed.config, usable, wrong, gpu, gpus, launching, ask_hub, needs_data, composed.differences)
    report = Report(composed.recipe, composed)
    report.add(placed([*of_schema, *rule_findings(case), *_run_findings(case, composed)], composed))
    if data:
        from . import rows

        row_findings, report.data = rows.check_rows(usable, {finding.key for finding in report.findings})
        report.add(row_findings)
    return report


def _run_findings(case: Case, composed: Composed) -> Iterator[Finding]:
    """Findings about the file, the profiles, the GPU and the warm-up of a run."""
    yield from _duplicate_keys(composed.recipe_file)
    for why, changes in composed.incompatible.items():
        problem = f"the profile leaves out or changes {', '.join(changes)}, because {why}"
        yield Finding("note", "unfit", "", problem, rule_scope="gpu")
    if composed.base:
        differences = [change for change in composed.differences if change.source != compose.OF_REHEARSAL]
        yield from composed.base.findings(differences, case.launching)
    if composed.rehearsal:
        return
    if case.launching and not case.gpu and not models.is_small(composed.config):
        problem = "no NVIDIA GPU found; a CPU is too slow"
        yield Finding("error", "no-gpu", "", problem, "add --rehearse for a trial", rule_scope="machine")
    if not case.wrong:  # steps cannot be counted with values that break the schema
        yield from _fixed_warm_up(composed, case.gpus)


def _duplicate_keys(file: Path) -> Iterator[Finding]:
    """Keys that occur twice in a file: an error in a recipe or variant, a warning in a config of somebody else."""
    duplicates = "; ".join(map(str, yamlfiles.duplicates(file)))
    if duplicates:
        level: Level = "error" if header_of(file).name else "warning"
        problem = f"keys occur twice, and Axolotl takes the last value: {duplicates}"
        yield Finding(level, "duplicate-key", "", problem, "delete the others", rule_scope="file")


def _fixed_warm_up(composed: Composed, gpus: int) -> Iterator[Finding]:
    """Note on a warm-up in steps that stays, although the variant or the run changes the number of steps."""
    steps = composed.config.get("warmup_steps")
    original = {change.key: change.recipe for change in composed.from_origin}
    if not steps or "warmup_steps" in original:
        return
    cause = _step_change(composed.config, original, gpus)
    if cause:
        problem = f"still {steps} steps, although {cause} changes the number of steps"
        yield Finding("note", "fixed-warm-up", "warmup_steps", problem, "set it for the new number of steps")


def _step_change(config: Config, original: Config, gpus: int) -> str | None:
    """Cause of a changed number of steps, from the original values of the changed keys; None without one."""
    settings = TrainingSettings.of(config)
    if settings.max_steps:
        return "max_steps" if "max_steps" in original else None
    for key in original:
        if key.startswith(_DECIDES_STEPS):
            return key
    former = TrainingSettings.of(config | original)
    if former.rows_per_step != gpus * settings.rows_per_step:
        return "the number of rows per step"
    return None


_DECIDES_STEPS = ("num_epochs", "max_steps", "datasets", "val_set_size", "sample_packing")
"""Beginnings of keys that set epochs and rows."""


def tokens_of(request: Request, count: int) -> list[Row]:
    """First rows of a config's training data, token by token; see `token_lengths.by_token`.

    Raises:
        UserError: the config has errors, or its data or tokenizer is missing.
    """
    composed = compose.compose(request)
    refuse(check_config(composed, needs_data=True).findings, request.force)
    _need_tokenizer(composed, "--show-tokens", ", or add --rehearse for a small model's tokenizer")
    with importing_axolotl():
        from . import token_lengths

        return token_lengths.by_token(composed.config, count)


def _fetch_tokenizer(composed: Composed) -> bool:
    """True if a config's tokenizer is on this machine, or the hub has sent it now."""
    if not has_tokenizer(composed):
        models.fetch_tokenizer(composed.config)
    return has_tokenizer(composed)


def _need_tokenizer(composed: Composed, option: str, instead: str = "") -> None:
    if not _fetch_tokenizer(composed):
        problem = f"the tokenizer of {composed.config['base_model']} is not on this machine"
        remedy = f"run {models.tokenizer_command(composed.config)}{instead}"
        raise UserError(problem, key=option, remedy=remedy)


def has_tokenizer(composed: Composed) -> bool:
    """True if a config's tokenizer is on this machine.

    This function first creates the small model of rehearsals, if the config names it.
    """
    substitution.restore(composed.config)
    return models.find(composed.config).tokenizer_here


def tokenize(report: Report, composed: Composed, gpus: int = 1) -> None:
    """Tokenize all rows with Axolotl; add findings and lengths in tokens to a report.

    Args:
        report: the report.
        composed: the config, whose tokenizer is on this machine.
        gpus: the number of GPUs that train.
    """
    with importing_axolotl():
        from . import token_lengths

        findings, measured = token_lengths.lengths(composed.config, None, gpus)
    _add_row_findings(report, findings, composed)
    by_key = {measures["key"]: measures for measures in measured}
    for size in report.data:
        size.update(by_key.get(size["key"], {}))


SAMPLE = 200
"""Number of rows per data set that a check compares with their tokens."""
_VERSION = 4
"""Version of the cached findings about them; raise it when the comparison changes."""


def compare_sample(report: Report, composed: Composed, gpus: int = 1) -> bool:
    """Add findings about some rows and their tokens to a report; False if the rows or the tokenizer are not here.

    The findings of earlier checks of the same rows and settings are reused: importing Axolotl takes 10 s.

    Raises:
        UserError: Axolotl refuses the config or the tokenizer.
    """
    files = chain.from_iterable(datafiles.local_files(dataset.entry) for dataset in datafiles.datasets(composed.config))
    if not all(file.is_file() for file in files) or not has_tokenizer(composed):
        return False
    data = datafiles.record(composed.config)
    if not data:
        return False
    versions = [package_version(name) for name in ("axolotl", "transformers", "datasets")]
    depends = [_VERSION, versions, gpus, replace(composed, data=data).digest, str(models.folder_of(composed.config))]
    file = paths.cache() / "compared" / f"{digest(depends)[:24]}.json"
    rows = read_json(file).get("findings")
    if rows is None:
        with importing_axolotl():
            from . import token_lengths

            findings, _ = token_lengths.lengths(composed.config, SAMPLE, gpus)
        rows = [asdict(finding) for finding in findings]
        with suppress(OSError):
            write_json(file, {"findings": rows})
    _add_row_findings(report, [Finding(**row) for row in rows], composed)
    return True


def _add_row_findings(report: Report, findings: Iterable[Finding], composed: Composed) -> None:
    """Add findings about tokens, except for leaked rows that the text of the rows has shown."""
    leaked = {finding.name for finding in report.findings if finding.rule == LEAKED}
    report.add(placed((finding for finding in findings if finding.name not in leaked), composed))


def training_lengths(composed: Composed, force: Sequence[str] = ()) -> tuple[list[int], float]:
    """Lengths in tokens of the rows that a config trains on; see `tokens.trained_on`.

    Args:
        composed: the config.
        force: the names of findings to override.

    Raises:
        UserError: the data or the tokenizer is missing, or Axolotl refuses the rows.
    """
    _need_tokenizer(composed, "--all-rows")
    findings = check_config(composed, data=True).findings
    refuse([finding for finding in findings if finding.top_key == "datasets" or finding.scope == "code"], force)
    with importing_axolotl():
        from ..training import tokens

        return tokens.trained_on(composed.config)


def is_found_at_start(name: str) -> bool:
    """True for the name of a finding about a data file, its rows or this machine, see `Finding.name`."""
    rule, _, key = name.partition(":")
    if rule in (NO_BASE, NO_BATCH, validation.NOT_VALIDATED):
        return True
    scope = RULES[rule].scope if rule in RULES else "config"
    return Finding("note", rule, key, "", rule_scope=scope).scope in ("data", "machine")


def _unreadable(name: str, error: UserError) -> Finding:
    """Finding for an unreadable config, at the error's place."""
    first = error.explanation if error.key == name else error.description
    problem = "\n".join([first, *map(str, error.further)])
    return Finding("error", "unreadable", "", problem, where=error.file or name, line=error.line)


def placed(findings: Iterable[Finding], composed: Composed) -> Iterator[Finding]:
    """Add the source of each finding's key: file and line, or an option."""
    for finding in findings:
        if not finding.where:  # already known, for a row of a file
            _place(finding, composed)
        yield finding


def _place(finding: Finding, composed: Composed) -> None:
    """Set the source of a finding's key: file and line, or an option.

    A key of --set that nothing reads is an error: the user would train something else.
    """
    file: Path | None = composed.recipe_file
    for difference in composed.differences:
        key, changed = f"{finding.key}.", f"{difference.key}."
        if key.startswith(changed) or changed.startswith(key):  # the same key, or one inside the other
            file = compose.profile_file(difference.source)
            finding.where = difference.without_secrets().source.text
            if finding.rule == "unknown-key" and difference.source.kind == "override":
                finding.level = "error"
    if file:
        finding.where = paths.shown(file)
        finding.line = yamlfiles.line_of(file, finding.key.split("."))
