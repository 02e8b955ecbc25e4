"""Reuse of a run's folder: trust by a keyed hash, consent to code in its config, and restored rehearsal files."""

import hashlib
import hmac
import secrets
from collections.abc import Sequence
from contextlib import chdir, suppress
from pathlib import Path

import orjson

from ..base import paths, yamlfiles
from ..base.errors import UserError
from ..base.processes import make_once
from ..base.yamlfiles import Config
from ..configs import substitution
from ..data import sample
from ..runs.records import Run
from ..runs.rundir import RunDir
from .check import code_in, refuse


def seal(folder: RunDir, record: Run) -> str | None:
    """Keyed hash of a run's config and of what its record has Axolotl do; None where no key can be kept.

    Whoever hands a run on does not have the key."""
    with suppress(OSError, UserError):
        key = (make_once(paths.kept() / "seal", _make_key) / "key").read_bytes()
        content = [folder.config.read_text(), record.cwd, record.axolotl_arguments, record.forced]
        return hmac.new(key, orjson.dumps(content), hashlib.sha256).hexdigest()
    return None


def _make_key(folder: Path) -> None:
    folder.mkdir(mode=0o700)
    former = paths.cache() / "seal" / "key"  # where earlier versions kept it
    (folder / "key").write_bytes(former.read_bytes() if former.is_file() else secrets.token_bytes(32))


def is_own(folder: RunDir, record: Run) -> bool:
    """Whether a command of this user's created a run, and nothing was changed in it since."""
    own = seal(folder, record) if record.seal else None
    return own is not None and hmac.compare_digest(own, record.seal or "")


def refuse_code(folder: RunDir, record: Run, config: Config, force: Sequence[str] = ()) -> None:
    """Refuse to load the model of a run whose config names others' code, but for what its user agreed to.

    Args:
        folder: the run's.
        record: its record; what it says was agreed to counts only for this user's own run.
        config: its config.
        force: the names of findings that are overridden; there may be others.

    Raises:
        UserError: something of it needs consent.
    """
    found = code_in(config, folder.config)
    agreed = [*force, *(record.forced if is_own(folder, record) else ())]
    refuse(found, [finding.name for finding in found if finding.name in agreed])


def restore(folder: RunDir, record: Run) -> None:
    """Put back what a rehearsal reads from the cache and is gone from there: the stand-in model, rows of a sample.

    Args:
        folder: the run's.
        record: its record.

    Raises:
        UserError: it cannot be made again as it was.
    """
    if not (record.rehearsal and folder.config.is_file()):
        return
    digests: dict[Path, dict[str, str]] = {}
    for file in record.data:
        digests.setdefault(Path(file.path).parent, {})[Path(file.path).name] = file.sha256
    for made, of_files in digests.items():
        if made.parent == paths.cache() and made.name.startswith("sample-") and not made.is_dir():
            began = record.cwd if Path(record.cwd).is_dir() else "."  # where there may be studies of the user's own
            with chdir(began):
                sample.restore(made, of_files)
    substitution.restore(Path(str(yamlfiles.read_yaml(folder.config).get("base_model"))), record.stand_in_sha256)
