"""Trust in a run folder that may be another user's."""

from collections.abc import Sequence
from contextlib import chdir
from pathlib import Path

from ..base import paths
from ..check import code_rules, schema
from ..check.rule import Case
from ..config.finding import Finding, override_errors, refuse
from ..training.run_record import Run
from .rundir import RunDir


def refuse_code(run_dir: RunDir, record: Run, force: Sequence[str], adapter: str) -> None:
    """Refuse a run whose config or adapter names untrusted code or a private file, unless the user agrees.

    Args:
        run_dir: the run's folder.
        record: the run's record; if this user created the run, the findings that it overrides count, and all files.
        force: the names of findings to override; other names are ignored.
        adapter: folder of the adapter.

    Raises:
        UserError: a finding is not overridden.
    """
    is_users, config = run_dir.is_own(record), run_dir.config
    usable, wrong = schema.usable(config, schema.findings(config))
    case = Case(config, usable, wrong, ask_hub=not record.rehearsal)
    of_adapter = {"lora_model_dir": adapter}
    trained = Case(of_adapter, of_adapter, set())
    with chdir(record.cwd if Path(record.cwd).is_dir() else "."):  # the config's paths are relative to it
        findings = [*code_rules.findings(case), *code_rules.findings(trained)]
        if not is_users:
            findings += code_rules.private_files(case)
    for finding in findings:
        finding.where = paths.shown(run_dir.config_file)
    override_errors(findings, force)
    if is_users:
        override_errors(findings, record.forced)
    refuse(findings)


def refuse_rows(run_dir: RunDir, record: Run, files: Sequence[Path], force: Sequence[str]) -> None:
    """Refuse to score rows from elsewhere that another user's run names, unless the user agrees: they are copied.

    Raises:
        UserError: a file is outside the run's folder, the current one, and those of this project.
    """
    allowed = [folder.resolve() for folder in (run_dir.path, Path(), paths.cache(), paths.RECIPES)]
    file = next((file for file in files if not any(map(file.resolve().is_relative_to, allowed))), None)
    if file is None or run_dir.is_own(record):
        return
    remedy = "name rows with --data, or pass the name in brackets to --force"
    finding = Finding("error", "without-consent", "rows", f"would copy rows of {file}", remedy)
    finding.where = paths.shown(run_dir.config_file)
    override_errors([finding], force)
    refuse([finding])
