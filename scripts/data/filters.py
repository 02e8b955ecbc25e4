"""The filters that expressions of a study.yaml have beside Jinja's own."""

from collections.abc import Callable
from typing import Any

import orjson


def tagged(patch: str) -> str:
    """A patch on one line, with a tag before each of its lines, as the authors' code of the first study writes it.

    The hunk header and blank lines are dropped, the others stripped; `<add>` stands for +, `<del>` for -,
    `<keep>` for the rest.
    """
    tags = {"+": "<add>", "-": "<del>"}
    lines = (line for line in patch.splitlines() if line[1:].strip() and not line.startswith("@@"))
    return "".join(tags.get(line[0], "<keep>") + line[1:].strip() for line in lines)


def tojson(value: Any) -> str:
    """A value as JSON; Jinja's own of that name writes it for HTML."""
    return orjson.dumps(value).decode()


FILTERS: dict[str, Callable[..., Any]] = {"tagged": tagged, "tojson": tojson}
