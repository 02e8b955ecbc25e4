"""Which of the cards that are for rent hold a config, by its plan, and what a training on one of them comes to."""

import math
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from ..base.errors import UserError
from ..checks import check
from ..checks.rules import space
from ..configs import gpus as cards
from ..configs.compose import Composed
from ..configs.gpus import Gpu
from ..runs.tasks import Work

_USUAL_DISK = 256  # GB; SkyPilot's default
_SYSTEM = 100  # GB for an image with CUDA and the packages of the lock
_AT_HOME = ("RTX", "Quadro", "Titan")  # SkyPilot spells these in ways of its own


def holding(works: Iterable[Work]) -> list[str]:
    """The cards, by SkyPilot's names, on which each of several works can be trained.

    Raises:
        UserError: there is none, or that cannot be planned.
    """
    found = [card for card in cards.catalogue().values() if not card.name.startswith(_AT_HOME)]
    for work in works:
        if work.composed is None or work.gpus > 1:
            raise UserError("--on sky: name a card, as in --sky resources.accelerators=A100")
        needed: dict[tuple[int, int], float | None] = {}
        found = [card for card in found if _holds(work.composed, card, needed)]
    if not found:
        raise UserError("--on sky: no card holds it by plan; `recipe plan` says what to change")
    return [card.name.replace(" ", "-") for card in found]


def _holds(composed: Composed, card: Gpu, needed: dict[tuple[int, int], float | None]) -> bool:
    """Whether a config fits a card and has no error there; what it needs depends on the card's capability alone."""
    from ..planning import fit, need

    if card.capability not in needed:
        needed[card.capability] = None
        found = check.examine(composed, card).findings
        if not any(finding.level == "error" and finding.scope == "gpu" for finding in found):
            with suppress(UserError):
                needed[card.capability] = need.needed_gib(composed.config, card, anew=True)
    size = needed[card.capability]
    return size is not None and size <= fit.usable_gib(card)


def disk_gb(works: Iterable[Work]) -> int | None:
    """GB of the disk that a machine of its own needs for the largest of several works: for the base model, checkpoints
    and rows beside the system and the environment; None where what SkyPilot takes by itself suffices."""
    written = max((space.elsewhere(work.composed.config) for work in works if work.composed), default=0)
    size = _SYSTEM + math.ceil(written / 1e9)
    return size if size > _USUAL_DISK else None


def hours(work: Work, name: str, runs: Path) -> float | None:
    """The hours that a training takes on a card of SkyPilot's name by plan; None where that is not known."""
    from ..planning import plan
    from ..planning.work import work as planned_work

    card = cards.named(name.partition(":")[0])
    if not card or work.composed is None or not work.gpus or "run" not in work.steps:
        return None
    with suppress(UserError):
        _, planner = plan.plan(work.composed.config, card, None, work.gpus)
        return planned_work(work.composed, planner, card, work.gpus, None, None, runs)["hours"]
    return None
