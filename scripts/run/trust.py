"""Trust in a run folder that may be another user's."""

from collections.abc import Sequence
from contextlib import chdir
from pathlib import Path
from typing import Any

from ..base import paths, yamlfiles
from ..base.errors import UserError
from ..base.signature import is_signed, signature
from ..check import code_rules, schema
from ..check.rule import Case
from ..config.finding import override_errors, refuse
from ..training.run_record import Run
from .rundir import RunDir


def hmac_of(run_dir: RunDir, record: Run) -> str | None:
    """Keyed hash of a run's config, working directory and overridden findings; None without a key.

    Only this user can read the key, so that nobody else can create a valid hash.

    Raises:
        UserError: the config is missing or damaged.
    """
    return signature(_signed(run_dir, record))


def _signed(run_dir: RunDir, record: Run) -> list[Any]:
    return [yamlfiles.read_text(run_dir.config_file), record.cwd, record.forced]


def is_own(run_dir: RunDir, record: Run) -> bool:
    """True if this user created a run, or trusted it with --trust, and its hashed content has not changed since."""
    try:
        return is_signed(_signed(run_dir, record), record.hmac)
    except UserError:  # no readable config
        return False


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
    is_users, config = is_own(run_dir, record), run_dir.config
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
