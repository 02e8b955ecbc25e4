"""Runs that no command of this user's created: what they would run is shown, and needs consent by name."""

import hashlib
import hmac
import secrets
import shlex
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import orjson

from ..base import paths
from ..base.errors import UserError
from ..base.locks import make_once
from ..base.yamlfiles import Config
from ..runs.rundir import Run, RunDir
from .check import code_in, refuse
from .finding import Finding


def seal(folder: RunDir, record: Run) -> str | None:
    """What shows that a command of this user's wrote a run's config, and what its record has Axolotl do; None where no
    key can be kept. It is a keyed hash: who hands a run on does not have the key."""
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


def refuse_unseen(folder: RunDir, record: Run, config: Config, force: Sequence[str] = ()) -> list[Finding]:
    """Refuse a run that runs code which is neither Axolotl's nor this project's, but for what its user agreed to.

    Of a run that is not this user's own, what its record says was agreed to does not count, and what it passes to
    Axolotl and its links to files elsewhere need consent too.

    Args:
        folder: the run's.
        record: its record.
        config: its config.
        force: the names of findings that are overridden; there may be others.

    Returns:
        What was agreed to, as warnings.

    Raises:
        UserError: something else of it needs consent.
    """
    own = is_own(folder, record)
    found = [*code_in(config, folder.config), *([] if own else _foreign(folder, record))]
    agreed = [*force, *(record.forced if own else ())]
    return refuse(found, [finding.name for finding in found if finding.name in agreed])


def _foreign(folder: RunDir, record: Run) -> Iterator[Finding]:
    where = paths.shown(folder.path)
    remedy = "this run was not made here: look at it first; --force with the name in brackets accepts it"
    if record.axolotl_arguments:
        problem = f"`{shlex.join(record.axolotl_arguments)}` is passed to Axolotl"
        yield Finding("error", "foreign-arguments", "", problem, remedy, where)
    top = folder.path.resolve()
    links = sorted(path for path in folder.path.rglob("*") if path.is_symlink())
    if outside := [link for link in links if not link.resolve().is_relative_to(top)]:
        problem = f"{outside[0].relative_to(folder.path)} is a link to {outside[0].resolve()}, which may be written to"
        yield Finding("error", "foreign-links", "", problem, remedy, where)
