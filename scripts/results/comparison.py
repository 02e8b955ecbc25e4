"""Two runs compared, their trainings and their predictions: `recipe results --compare`."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .. import tables
from ..base import yamlfiles
from ..base.errors import UserError
from ..base.files import sha256
from ..base.progress import say
from ..configs import config
from ..runs.lookup import find_run
from ..runs.rundir import Run, RunDir
from ..scores import compare
from ..scores.evaluations import ADAPTER, current, read_predictions

_SPARE = ["equal", "rows", "p_wilcoxon", "better", "worse"]


@dataclass(frozen=True)
class Divergence:
    """How far the losses of two trainings, a and b, are equal.

    Attributes:
        first, last: the first and the last step whose loss both have recorded.
        step: the first of these whose losses differ; None where all are equal, to the last bit.
        losses: the two losses of that step.
        same_adapter: whether the adapters are equal; None unless both runs are finished.
        differences: the settings in which the runs differ, with the values of a and b.
    """

    first: int
    last: int
    step: int | None
    losses: tuple[float | None, float | None] | None
    same_adapter: bool | None
    differences: dict[str, tuple[Any, Any]]

    def sentences(self) -> list[str]:
        """In words."""
        if self.step and self.losses:
            said = [f"The losses differ from step {self.step} on: {self.losses[0]} in a, {self.losses[1]} in b."]
        else:
            adapters = {None: "", True: ", and so are the adapters", False: ", but the adapters differ"}
            steps = f"steps {self.first} to {self.last}, which both have recorded"
            said = [f"The losses of {steps}, are equal{adapters[self.same_adapter]}."]
        if self.differences:
            return [*said, "What differs between the runs, by their records:"]
        if self.step:
            return [*said, "By their records, config, data, packages and machine are the same."]
        return said


def show(pair: tuple[str, str], runs: Path, metrics: Sequence[str], form: tables.Form) -> None:
    """Two runs, or a run and a file of predictions, on stdout: where losses diverge, then how the scores differ.

    Runs need not be evaluated for the first, and files have none.

    Args:
        pair: runs, or files of predictions.
        runs: the folder of the runs.
        metrics: what to score with beside what the runs were.
        form: the form; in Markdown and CSV only the scores go to stdout.

    Raises:
        UserError: there is no such run or file, they cannot be compared, or nothing of them can.
    """
    folders = {name: find_run(name, runs) for name in pair if not Path(name).is_file()}
    names = [str(folders[name].path) if name in folders else name for name in pair]
    diverged = _divergence([folders[name] for name in pair]) if len(folders) == len(set(pair)) else None
    unscored = [str(folder.path) for folder in folders.values() if not _is_evaluated(folder)] if diverged else []
    rows = None if unscored else compare.compare(*compare.several(names, runs, metrics))
    if form == "json":
        tables.print_json({"training": asdict(diverged) if diverged else None, "scores": rows})
        return
    title = f"a: {pair[0]}, b: {pair[1]}"
    if diverged:
        _show_divergence(diverged, f"Trainings, {title}", form)
    if rows is not None:
        tables.write(rows, form, title, spare=_SPARE)
        if len(rows) > 1:
            say(f"{len(rows)} metrics: their intervals and p are not corrected for multiple comparisons")
    else:
        which = f"{unscored[0]} is" if len(unscored) == 1 else "they are"
        say(f"their predictions are not compared: {which} not evaluated; `recipe evaluate {unscored[0]}` comes first")


def _is_evaluated(folder: RunDir) -> bool:
    return bool(current(folder.path) and read_predictions(folder.path))


def _divergence(folders: Sequence[RunDir]) -> Divergence | None:
    """Where the losses of two runs diverge; None, with a message, if they have no step in common.

    Raises:
        UserError: one is a rehearsal, and the other a real run.
    """
    a, b = (folder.read() for folder in folders)
    if a.rehearsal != b.rehearsal:
        raise UserError("--compare: one of the runs is a rehearsal, which compares with rehearsals only")
    of_a, of_b = (
        {record["step"]: record["loss"] for record in folder.read_metrics() if "loss" in record} for folder in folders
    )
    common = sorted(of_a.keys() & of_b.keys())
    if not common:
        say("their trainings are not compared: they have recorded the loss of no step in common")
        return None
    step = next((step for step in common if of_a[step] != of_b[step]), None)
    adapters = [_adapter(folder, run) for folder, run in zip(folders, (a, b), strict=True)]
    settings = [_settings(yamlfiles.read_yaml(folder.config), run) for folder, run in zip(folders, (a, b), strict=True)]
    keys = [key for key in settings[0] | settings[1] if settings[0].get(key) != settings[1].get(key)]
    return Divergence(
        first=common[0],
        last=common[-1],
        step=step,
        losses=(of_a[step], of_b[step]) if step is not None else None,
        same_adapter=adapters[0] == adapters[1] if all(adapters) else None,
        differences={key: (settings[0].get(key), settings[1].get(key)) for key in keys},
    )


def _adapter(folder: RunDir, run: Run) -> str | None:
    """Hash of a finished run's adapter."""
    adapter = folder.output / ADAPTER
    return sha256(adapter) if run.state == "finished" and adapter.is_file() else None


def _settings(cfg: yamlfiles.Config, run: Run) -> dict[str, Any]:
    """What the steps of a run may depend on, by name, as far as it is recorded."""
    machine = run.provenance
    gpus = [f"{gpu.get('name')}, driver {gpu.get('driver')}" for gpu in machine.get("gpus") or []]
    kept = {key: value for key, value in cfg.items() if not config.TRACKING.match(key)}
    return {
        **{key: value for key, value in config.flatten(kept) if key not in config.OF_THE_RUN},
        **{f"rows of {file.path}": f"sha256 {file.sha256[:12]}" for file in run.data},
        **{f"version of {name}": version for name, version in (machine.get("packages") or {}).items()},
        "version of python": machine.get("python"),
        "CUDA of torch": machine.get("cuda"),
        "processor": machine.get("cpu"),
        "cores": machine.get("cores"),
        "GPUs": "; ".join(gpus) or None,
        "ranks": run.ranks,
        "Axolotl's arguments": " ".join(run.axolotl_arguments) or None,
        "resumed from": ", ".join(launch.resumed_from for launch in run.launches if launch.resumed_from) or None,
    }


def _show_divergence(diverged: Divergence, title: str, form: tables.Form) -> None:
    differences = (f"{name}: {old} -> {new}" for name, (old, new) in diverged.differences.items())
    for line in (title, *diverged.sentences(), *differences):
        if form in ("csv", "md"):
            say(line)
        else:
            tables.print_text(line)
    if form not in ("csv", "md"):
        print()
