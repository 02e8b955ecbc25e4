"""Two runs compared, their trainings and their predictions: `recipe results --compare`."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..base import yamlfiles
from ..base.errors import UserError
from ..base.files import sha256
from ..base.progress import say
from ..configs import config
from ..determinism import settings, trace
from ..determinism.parting import Parting, Training, parting
from ..runs.lookup import find_run
from ..runs.rundir import Run, RunDir
from ..scores import compare
from ..scores.evaluations import current, read_predictions
from ..terminal import tables

_SPARE = ["equal", "rows", "p_wilcoxon", "better", "worse"]


def show(pair: tuple[str, str], runs: Path, metrics: Sequence[str], form: tables.Form) -> None:
    """Two runs, or a run and a file of predictions, on stdout: where the trainings part, then how the scores differ.

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
    parted = _parting([folders[name] for name in pair]) if len(folders) == len(set(pair)) else None
    unscored = [str(folder.path) for folder in folders.values() if not _is_evaluated(folder)] if parted else []
    rows = None if unscored else compare.compare(*compare.several(names, runs, metrics))
    if form == "json":
        tables.print_json({"training": asdict(parted) if parted else None, "scores": rows})
        return
    title = f"a: {pair[0]}, b: {pair[1]}"
    if parted:
        _show_parting(parted, f"Trainings, {title}", form)
    if rows is not None:
        tables.write(rows, form, title, spare=_SPARE)
        if len(rows) > 1:
            say(f"{len(rows)} metrics: their intervals and p are not corrected for multiple comparisons")
    else:
        which = f"{unscored[0]} is" if len(unscored) == 1 else "they are"
        say(f"their predictions are not compared: {which} not evaluated; `recipe evaluate {unscored[0]}` comes first")


def _is_evaluated(folder: RunDir) -> bool:
    return bool(current(folder.path) and read_predictions(folder.path))


def _parting(folders: Sequence[RunDir]) -> Parting | None:
    """Where two runs part; None if there is no trace to tell it from, which is said.

    Raises:
        UserError: one is a rehearsal, and the other a real run.
    """
    a, b = ((folder, folder.read()) for folder in folders)
    if a[1].rehearsal != b[1].rehearsal:
        raise UserError("--compare: one of the runs is a rehearsal, which compares with rehearsals only")
    parted = parting(_training(*a), _training(*b))
    if not parted:
        untraced = [str(folder.path) for folder in folders if not trace.read(folder.path / trace.FILE)]
        reason = "an earlier version made it, or it has done no step" if untraced else "they have no step in common"
        say(f"where their trainings part is not known: {', '.join(untraced)}{': ' if untraced else ''}{reason}")
    return parted


def _training(folder: RunDir, run: Run) -> Training:
    cfg = yamlfiles.read_yaml(folder.config)
    adapter = folder.output / "adapter_model.safetensors"
    return Training(
        steps=trace.read(folder.path / trace.FILE),
        complete=run.state == "finished",
        settings=_settings(cfg, run),
        adapter=sha256(adapter) if run.state == "finished" and adapter.is_file() else None,
        deterministic=bool(cfg.get(settings.KEY)),
    )


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


def _show_parting(parted: Parting, title: str, form: tables.Form) -> None:
    differences = (f"{name}: {old} -> {new}" for name, (old, new) in parted.differences.items())
    for line in (title, *parted.sentences(), *differences):
        if form in ("csv", "md"):
            say(line)
        else:
            tables.print_text(line, form == "wide")
    if form not in ("csv", "md"):
        print()
