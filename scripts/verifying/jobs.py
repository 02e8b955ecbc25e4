"""The process that one job of a verification runs in: `python -m qlora_recipes.verifying.jobs JOB FOLDER [--quick]`.

A process each, so that what a job takes of the GPU is free for the next, and what kills it ends nothing else.
"""

import sys
import traceback
from pathlib import Path

from ..base.errors import WorkFailed
from ..base.quiet import importing_axolotl
from . import bench, trainings
from .bench import Bench, CannotBeShown, Figures

OF_TRAININGS = {
    "training": trainings.training,
    "resume": trainings.resume,
    "precision": trainings.precision,
    "fast": trainings.fast,
    "packed": trainings.packed,
}
OF_RECIPES = {"shape": trainings.shape, "engine": trainings.engine}
OF_MODELS = ("adapter", "numerics", "generation")  # in this process, which imports torch for them
JOBS = {*OF_TRAININGS, *OF_RECIPES, *OF_MODELS}


def measure(job: str, at: Bench) -> Figures:
    """What a job finds.

    Args:
        job: its name; what follows a colon in it is a recipe or an engine.

    Raises:
        CannotBeShown: this machine lacks something.
        Exception: whatever the libraries raise where something is wrong.
    """
    kind, _, about = job.partition(":")
    if kind in OF_TRAININGS:
        return OF_TRAININGS[kind](at)
    if kind in OF_RECIPES:
        return OF_RECIPES[kind](at, about)
    with importing_axolotl():
        from . import generation, numerics, packing, plugin

        plugin.cap_memory()
        if kind == "numerics":
            return {**numerics.numerics(at), **packing.packing(at)}
        return {"adapter": numerics.adapter, "generation": generation.generation}[kind](at)


def carry_out(job: str, at: Bench) -> int:
    """Carry a job out and keep what it found, or why it found nothing; the exit code of its process."""
    try:
        at.keep(job, measure(job, at))
    except CannotBeShown as lack:
        at.keep(job, {}, lacks=str(lack))
    except Exception as error:  # of any library; it fails the job's lines
        traceback.print_exc()
        lines = [line for line in str(error).splitlines() if line.strip()] or [""]
        # of a training that failed, the log's last line, which says why, comes before what `recipe run` says of it
        said = lines[-2] if isinstance(error, WorkFailed) and len(lines) > 1 else f"{type(error).__name__}: {lines[0]}"
        at.keep(job, {}, problem=said)
        return 1
    return 0


if __name__ == "__main__":
    name, folder, *options = sys.argv[1:]
    sys.exit(carry_out(name, bench.here(Path(folder), "--quick" in options)))
