"""What the profiles fast and packed do not change in a config."""

from collections.abc import Iterator

from ..configs.compatibility import VARIANTS
from ..configs.compose import Composed
from ..configs.gpus import Gpu
from .finding import Finding


def findings(composed: Composed, gpu: Gpu | None, launching: bool) -> Iterator[Finding]:
    """A note for each reason for which keys of a profile are left out or get another value than the profile's, and one
    where a profile was fitted to no card in particular, a warning before a run; a rehearsal has none."""
    for why, changes in composed.incompatible.items():
        (key, instead), *others = changes.items()
        if others:
            problem = f"the profile leaves these out, because {why}: {', '.join(changes)}"
            yield Finding("note", "unfit", "", problem)
        else:
            does = "leaves it out" if instead is None else f"sets it to {str(instead).lower()}"
            yield Finding("note", "unfit", key, f"the profile {does}, because {why}")
    laid = [profile for profile in composed.profiles if profile in VARIANTS]
    if laid and gpu is None and not composed.rehearsal:
        problem = f"laid for a card from Ampere on, as none is known: {' and '.join(laid)}"
        remedy = "for another, name it: --gpu for checks and plans, the setting card for SLURM"
        yield Finding("warning" if launching else "note", "unfit", "", problem, remedy)
