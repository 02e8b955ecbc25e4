"""What can be wrong with a config whose keys and values are all allowed.

A rule is a function that yields (level, key, problem, remedy); its name, with hyphens, is the finding's. Its docstring
gives the reason for the rule and the evidence; "seen" means observed with Axolotl 0.21. Rules may rely on the schema:
values that break it have been removed from the config that they get. A rule about something other than the config, or
one that keeps a plan from being made, has its scope in `finding`.

Each module holds the rules about one subject; a new module has to be imported below.
"""

from collections.abc import Iterator

from ..finding import Finding
from . import data, foreign, hardware, model, settings, space  # noqa: F401 (each adds its rules to RULES)
from .case import RULES, Case

__all__ = ["Case", "findings"]


def findings(case: Case) -> Iterator[Finding]:
    """The findings of all rules."""
    for rule in RULES:
        for level, key, problem, remedy in rule(case):
            yield Finding(level, rule.__name__.replace("_", "-"), key, problem, remedy)
