"""Jinja as this project uses it: in a sandbox, with an error for a variable that is not set."""

from pathlib import Path

import jinja2
from jinja2.sandbox import SandboxedEnvironment

from .paths import TEMPLATES


def environment(folder: Path, escape: bool = False) -> SandboxedEnvironment:
    """The environment for the templates of a folder, which can extend the project's.

    Args:
        folder: the folder.
        escape: whether they are HTML, in which variables are text.
    """
    return SandboxedEnvironment(
        loader=jinja2.FileSystemLoader([folder, TEMPLATES]),
        undefined=jinja2.StrictUndefined,
        autoescape=escape,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
