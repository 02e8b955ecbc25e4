"""Summary of a training, from the records of metrics.jsonl."""

from collections.abc import Iterable, Sequence

from ..base.files import Row
from ..config.finding import Finding
from .run_record import GPU_MEMORY, Summary


def is_evaluation(record: Row) -> bool:
    """True if a record has an eval loss, of either kind."""
    return "eval_loss" in record or "eval_loss_per_token" in record


_ON_GPU = "memory_reserved_gib"


def summarise(metrics: list[Row]) -> Summary:
    """Summary of a run's metrics."""
    if not metrics:
        return Summary()
    last: Row = {}
    for record in metrics:
        last |= record
    newest = metrics[-1]
    first, final = _first_and_final_evaluation(metrics)
    memory, memory_kind = "rss_peak_gib", "resident"
    if _ON_GPU in last:
        memory, memory_kind = _ON_GPU, GPU_MEMORY
    peaks = _peaks(metrics, memory)
    computed = {
        "eval_loss_first": first.get("eval_loss"),
        "eval_loss": final.get("eval_loss"),
        "eval_loss_per_token_first": first.get("eval_loss_per_token"),
        "eval_loss_per_token": final.get("eval_loss_per_token"),
        "eval_reward_accuracy": final.get("eval_reward_accuracy"),
        "eval_reward_margin": final.get("eval_reward_margin"),
        "kept_step": newest.get("kept_step"),
        "ended": newest.get("ended"),
        "trouble": "\n".join(Finding("warning", **finding).text for finding in last.get("findings", ())) or None,
    }
    computed |= {
        "train_seconds": _seconds(metrics),
        "tokens_per_second": _tokens_per_second(metrics),
        "peak_memory": max(peaks, default=None),
        "memory_kind": memory_kind if peaks else None,
    }
    return Summary.model_validate(last | computed)


def _first_and_final_evaluation(metrics: Sequence[Row]) -> tuple[Row, Row]:
    """Records of the first eval loss, and of the best checkpoint's or else the last one; empty if there are none."""
    evaluations = [record for record in metrics if is_evaluation(record)]
    if not evaluations:
        return {}, {}
    best_step = metrics[-1].get("kept_step")
    final = next((record for record in evaluations if record["step"] == best_step), evaluations[-1])
    return evaluations[0], final


def _seconds(metrics: Iterable[Row]) -> float:
    """Total time of the recorded steps."""
    return sum(record.get("step_seconds") or 0.0 for record in metrics)


def _tokens_per_second(metrics: Sequence[Row]) -> float | None:
    """Speed over all steps with a number of tokens, or None."""
    counted = [record for record in metrics if record.get("tokens")]
    seconds = _seconds(counted)
    return sum(record["tokens"] for record in counted) / seconds if seconds > 1e-6 else None


def _peaks(metrics: Sequence[Row], memory: str) -> list[float]:
    """Peaks of a kind of memory in GiB, of all ranks; a resumed training counts them anew."""
    peaks: list[float] = []
    for record in metrics:
        if record.get(memory):
            peaks += record.get("peak_gib_by_rank") or [record[memory]]
    return peaks
