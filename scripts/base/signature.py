"""Keyed hashes that only this user can make: what has one was written by this user."""

import hashlib
import hmac
import secrets
from contextlib import suppress
from pathlib import Path
from typing import Any

import orjson

from . import paths
from .errors import UserError
from .processes import make_once


def signature(content: Any) -> str | None:
    """Keyed hash of a JSON value; None if this user's key cannot be read or made."""
    with suppress(OSError, UserError):
        key = (make_once(paths.user_data() / "hmac", _make_key) / "key").read_bytes()
        return hmac.new(key, orjson.dumps(content), hashlib.sha256).hexdigest()
    return None


def _make_key(folder: Path) -> None:
    folder.mkdir(mode=0o700)
    (folder / "key").write_bytes(secrets.token_bytes(32))


def is_signed(content: Any, claimed: str | None) -> bool:
    """True if a claimed hash of a JSON value was made with this user's key."""
    return bool(claimed) and hmac.compare_digest((signature(content) or "").encode(), str(claimed).encode())
