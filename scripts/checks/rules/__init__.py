"""What can be wrong with a config whose keys and values are all allowed.

A rule is a function that yields (level, key, problem, remedy); its name, with dashes, is the finding's. Its docstring
says why the rule is there and how that is known; "seen" is with Axolotl 0.21 on this project's machine. Rules may
rely on the schema: what breaks it has been taken out of the config that they get.

Each module holds the rules about one subject; a further module is imported below.
"""

from collections.abc import Iterator

from ..finding import Finding
from . import adapter, data, hardware, model, schedule, settings  # noqa: F401 (each adds its rules to RULES)
from .case import RULES, Case

__all__ = ["Case", "findings"]


def findings(case: Case) -> Iterator[Finding]:
    """What every rule finds."""
    for rule in RULES:
        for level, key, problem, remedy in rule(case):
            yield Finding(level, rule.__name__.replace("_", "-"), key, problem, remedy)
