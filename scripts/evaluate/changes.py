"""Changes since an evaluation: of its adapter, rows and predictions."""

from operator import itemgetter
from pathlib import Path
from typing import Any, Literal

from ..base.run_files import RunFile
from ..training.run_record import Run
from .scores_file import ADAPTER, PREDICTIONS, SCORES, Evaluation, read_scores

# Kind of change since an evaluation: `edited` if only the predictions differ, else `stale`.
Changed = Literal["stale", "edited"]


def changed(folder: Path, evaluation: Evaluation | None, run: Run | None = None) -> Changed | None:
    """Kind of change since an evaluation; None if nothing has changed or there is no evaluation.

    A file is hashed only if its size or modification time differs. A new time alone is no change.

    Args:
        folder: folder of the evaluation.
        evaluation: content of scores.json.
        run: the run, if the run's adapter was evaluated.
    """
    if evaluation is None:
        return None
    if run and run.adapter and evaluation.settings.adapter_sha256 != run.adapter.sha256:
        return "stale"
    output = folder / RunFile.OUTPUT  # even in a moved run folder
    adapter = output if output.is_dir() else Path(evaluation.settings.adapter)
    files = {"adapter": adapter / ADAPTER, "predictions": folder / PREDICTIONS}
    differing = [name for name, state in evaluation.files.items() if state.differs(files[name])]
    if "adapter" in differing or evaluation.has_other_rows:
        return "stale"
    return "edited" if differing else None


def current(folder: Path, run: Run | None = None) -> Evaluation | None:
    """Evaluation in a folder; None if files changed, see `changed`."""
    evaluation = read_scores(folder)
    return None if changed(folder, evaluation, run) else evaluation


def find_evaluation(run: Path, default: Evaluation | None, **changes: Any) -> Evaluation | None:
    """Evaluation of the same rows with other settings.

    Returns None if there is no such evaluation, if its files changed, or without a default evaluation.

    Args:
        run: run folder.
        default: the run's default evaluation.
        changes: settings that differ.
    """
    if default is None:
        return None
    folder = default.settings.model_copy(update=changes).folder(run)
    other = current(folder)
    if other is None or other.settings.rows != default.settings.rows:
        return None
    if other.settings.limit != default.settings.limit:
        return None
    return other


def served_evaluations(folder: Path, run: Run) -> list[Evaluation]:
    """Current evaluations of GGUF files of a run's adapter, the files with the most bits first."""
    evaluations = []
    for file in sorted((folder / RunFile.EVALUATIONS).glob(f"*/{SCORES}")):
        evaluation = current(file.parent, run)
        if evaluation and evaluation.settings.file:
            evaluations.append((-evaluation.settings.file.bits, evaluation))
    return [evaluation for _, evaluation in sorted(evaluations, key=itemgetter(0))]
