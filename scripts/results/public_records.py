"""Records of a model's scores in public formats: Every Eval Ever, and the hub's `.eval_results`."""

import math
from datetime import datetime
from pathlib import Path
from uuid import UUID

import orjson

from ..base import yamlfiles
from ..base.files import Row, digest, write_atomically
from ..base.processes import package_version
from ..evaluate.scores_file import Evaluation
from ..metrics.metric import Benchmark, Column, ScoreRecord
from . import verdict
from .card import Card, hub_benchmark

TOOL = "qlora-recipes"
EVAL_RESULTS = f".eval_results/{TOOL}.yaml"


def write(card: Card, folder: Path) -> list[str]:
    """Write the public records of a model into its folder, and return their names.

    Scores of benchmarks that the hub registers are in `.eval_results`. If the card has a repository, an Every Eval Ever
    record has all scores.
    """
    files = {}
    source = None
    if card.evaluation and card.repository != ".":
        text = every_eval_ever(card, card.evaluation)
        name = f"data/{TOOL}/{card.repository}/{UUID(digest(text)[:32], version=4)}.json"
        files[name] = text
        source = f"https://huggingface.co/{card.repository}/blob/main/{name}"
    entries = hub_entries(card, source)
    if entries:
        files[EVAL_RESULTS] = entries
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / name, text)
    return [*files]


def hub_entries(card: Card, source: str | None = None) -> str:
    """Content of a file in `.eval_results`; empty without a score of a registered benchmark.

    Args:
        card: facts of the model.
        source: URL of a record of its scores.
    """
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

    if card.evaluation is None or card.evaluation.rehearsal:
        return ""
    entries = []
    for score in card.evaluation.scores.values():
        names, benchmark = hub_benchmark(score), score.benchmark
        if names and benchmark:
            value, date = round(benchmark.value, 4), card.evaluation.created
            notes = _conditions(benchmark)
            if card.merged:
                notes += ", adapter before merging"
            entries.append(EvalResultEntry(*names, value=value, date=date, source_url=source, notes=notes))
    return yamlfiles.write_yaml(eval_result_entries_to_yaml(entries)) if entries else ""


def _conditions(benchmark: Benchmark) -> str:
    """Conditions of a benchmark's score."""
    shots = "unknown" if benchmark.shots is None else benchmark.shots
    return (
        f"lm-evaluation-harness {benchmark.harness}, {benchmark.task} version {benchmark.version}, {shots}-shot, "
        f"{benchmark.result} with {benchmark.filter}"
    )


def every_eval_ever(card: Card, evaluation: Evaluation) -> str:
    """Record of all scores, in schema 0.3.0 of https://github.com/evaleval/every_eval_ever."""
    evaluated = str(int(datetime.fromisoformat(evaluation.created).timestamp()))
    results = []
    for column in evaluation.columns.values():
        score = evaluation.scores[column.name]
        if score.value is not None:
            results.append(_result(card, evaluation, column, score))
    relationship = "third_party" if card.result.run.published_adapter else "first_party"
    source = {
        "source_type": "evaluation_run",
        "source_organization_name": TOOL,
        "evaluator_relationship": relationship,
    }
    library = {"name": TOOL, "version": str(package_version(TOOL))}
    record = {
        "schema_version": "0.3.0",
        "evaluation_id": f"{TOOL}/{card.repository}/{evaluated}",
        "evaluation_timestamp": evaluation.created,
        "retrieved_timestamp": evaluated,
        "source_metadata": source,
        "eval_library": library,
        "model_info": _model(card, evaluation),
        "evaluation_results": results,
    }
    return orjson.dumps(card.public(record), option=orjson.OPT_INDENT_2).decode() + "\n"


def _model(card: Card, evaluation: Evaluation) -> Row:
    """Model, its config and the engine of its predictions."""
    details = {
        "deployment_type": "self_deployed",
        "model_availability": "open_weights",
        "adapter_sha256": card.adapter_sha256,
        "config": yamlfiles.write_yaml(card.config),
    }
    engine = {"name": evaluation.settings.engine}
    return {
        "name": card.repository,
        "id": card.repository,
        "inference_engine": engine,
        "additional_details": details,
    }


def _result(card: Card, evaluation: Evaluation, column: Column, score: ScoreRecord) -> Row:
    """Score with its uncertainty, settings and verdict."""
    metric = column.metric
    low = "-Infinity" if math.isinf(metric.low) else metric.low
    high = "Infinity" if metric.high is None else metric.high
    scored: Row = {"score": score.value, "uncertainty": _uncertainty(evaluation, score)}
    definition = {
        "evaluation_description": column.meaning,
        "metric_id": column.name,
        "lower_is_better": not metric.higher_is_better,
        "score_type": "continuous",
        "min_score": low,
        "max_score": high,
    }
    dataset = card.dataset_of(column)
    result: Row = {
        "evaluation_name": dataset,
        "source_data": {"source_type": "other", "dataset_name": dataset},
        "metric_config": definition,
        "score_details": scored,
    }
    details = _details(card, column, score)
    if details:
        scored["details"] = details
    if score.benchmark is None and evaluation.settings.rows:
        result["generation_config"] = _generation(evaluation)
    return result


def _uncertainty(evaluation: Evaluation, score: ScoreRecord) -> Row:
    """Number of rows, interval, and the standard error of a benchmark."""
    uncertainty: Row = {"num_samples": evaluation.shares.rows}
    if score.interval:
        lower, upper = score.interval
        uncertainty["confidence_interval"] = {"lower": lower, "upper": upper, "confidence_level": 0.95}
    if score.benchmark:
        uncertainty["num_samples"] = score.benchmark.rows
        if score.benchmark.stderr is not None:
            uncertainty["standard_error"] = {"value": score.benchmark.stderr}
    return uncertainty


def _details(card: Card, column: Column, score: ScoreRecord) -> dict[str, str]:
    """Conditions of a benchmark, and the published score with the verdict if there is one."""
    details = {}
    if score.benchmark:
        details["conditions"] = _conditions(score.benchmark)
    published = card.result.aim.scores.get(column.name)
    judged = verdict.of_run(column, card.result) if published else None
    if judged:
        details |= {"published": str(published), "verdict": judged}
    return details


def _generation(evaluation: Evaluation) -> Row:
    """Decoding of the predictions."""
    decoding = evaluation.settings.decoding
    arguments: Row = {"temperature": 0.0, "max_tokens": decoding.max_new_tokens}
    if decoding.do_sample:
        arguments |= decoding.model_dump(include={"temperature", "top_p", "top_k"})
    details = {"num_beams": str(decoding.num_beams), "dtype": evaluation.settings.dtype}
    return {"generation_args": arguments, "additional_details": details}
