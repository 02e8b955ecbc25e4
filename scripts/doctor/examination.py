"""`recipe doctor`: everything about this machine and environment that a run depends on, a line each."""

import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from ..base.private import names_here
from . import gpu, machine, network, packages, probes
from .line import Line, first_line, shareable

Look = Callable[[], Line | Sequence[Line] | None]


def examine() -> list[Line]:
    """Look at everything; what cannot be looked at is a line that says so.

    Lines have no secrets, and no name of this machine or its user that `shareable` can tell.
    """
    facts = probes.start()
    drivers = gpu.driver()
    quick = [*_lines(_quick(drivers))]  # while torch and Axolotl are being imported
    slow = [*_lines(_slow(drivers, facts()))]
    names = names_here()
    order = list(_ORDER)
    lines = sorted(quick + slow, key=lambda line: order.index(line.name))
    return [
        Line(line.name, line.state, *(shareable(text, names) for text in (line.found, line.remedy, line.command)))
        for line in lines
    ]


_ORDER = (
    *("Python", "project", "lock", "Axolotl", "torch", "driver", "GPU", "bitsandbytes", "optional packages"),
    *("runs", "cache", "hub's cache", "temporary files", "memory", "caches", "proxy", "hub", "hub token"),
    *("SLURM", "containers"),
)


def _quick(drivers: gpu.Driver) -> dict[str, Look]:
    """How to look at what needs no probe, by what it is."""
    return {
        "Python": packages.python,
        "project": packages.project,
        "lock": packages.lock,
        "optional packages": packages.optional,
        "GPU": partial(gpu.cards_lines, drivers),
        "runs": machine.folder_lines,
        "memory": machine.memory,
        "caches": machine.caches,
        "proxy": network.proxy,
        "hub": network.hub_lines,
        "SLURM": machine.slurm,
        "containers": partial(machine.containers, len(drivers.cards)),
    }


def _slow(drivers: gpu.Driver, facts: probes.Facts) -> dict[str, Look]:
    """How to judge what the probes found."""
    env = os.environ
    return {
        "Axolotl": partial(packages.axolotl, facts["axolotl"]),
        "torch": partial(gpu.torch_line, drivers, facts["torch"], env.get("CUDA_VISIBLE_DEVICES")),
        "driver": partial(gpu.driver_line, drivers, facts["torch"], machine.container(), gpu.given_no_gpu()),
        "bitsandbytes": partial(gpu.bitsandbytes_line, drivers, facts["bitsandbytes"], env.get("BNB_CUDA_VERSION")),
    }


def _lines(looks: dict[str, Look]) -> Iterator[Line]:
    for name, look in looks.items():
        try:
            found = look()
        except Exception as error:  # in a broken environment, anything; the other lines still say what they can
            remedy = "if the other lines do not explain it, report it with this output"
            yield Line(name, "wrong", f"cannot be looked at: {first_line(error)}", remedy)
            continue
        yield from [found] if isinstance(found, Line) else found or ()
