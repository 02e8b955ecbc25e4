"""Records of models' scores in public formats: Every Eval Ever, and the hub's `.eval_results` and `model-index`."""

import math
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any
from uuid import UUID

import orjson
from pydantic import AfterValidator, AliasChoices, AliasPath, BaseModel, Field, StringConstraints

from ..base import tables, yamlfiles
from ..base.errors import UserError
from ..base.files import Row, digest, parse_json, write_atomically
from ..base.processes import package_version
from ..config.merging import value_at
from ..data.studies import Study
from ..evaluate.intervals import Interval
from ..evaluate.scores_file import Evaluation
from ..metrics.metric import Benchmark, Column, LossMetric, ScoreRecord, is_of_trainer
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
    if card.scores and card.repository != ".":
        text = every_eval_ever(card)
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
        names = hub_benchmark(score)
        if names and score.benchmark:
            notes = _conditions(score.benchmark)
            if card.merged:
                notes += ", adapter before merging"
            entry = EvalResultEntry(
                *names,
                value=round(score.benchmark.value, 4),
                date=card.evaluation.created,
                source_url=source,
                notes=notes,
            )
            entries.append(entry)
    return yamlfiles.write_yaml(eval_result_entries_to_yaml(entries)) if entries else ""


def _conditions(benchmark: Benchmark) -> str:
    """Conditions of a benchmark's score."""
    shots = "unknown" if benchmark.shots is None else benchmark.shots
    return (
        f"lm-evaluation-harness {benchmark.harness}, {benchmark.task} version {benchmark.version}, {shots}-shot, "
        f"{benchmark.result} with {benchmark.filter}"
    )


def every_eval_ever(card: Card) -> str:
    """Record of all scores, in schema 0.3.0 of https://github.com/evaleval/every_eval_ever."""
    evaluated = str(int(datetime.fromisoformat(card.scored_at).timestamp()))
    results = [_result(card, column, score) for column, score in card.scores.values() if score.value is not None]
    relationship = "third_party" if card.result.run.published_adapter else "first_party"
    record = {
        "schema_version": "0.3.0",
        "evaluation_id": f"{TOOL}/{card.repository}/{evaluated}",
        "evaluation_timestamp": card.scored_at,
        "retrieved_timestamp": evaluated,
        "source_metadata": {
            "source_type": "evaluation_run",
            "source_organization_name": TOOL,
            "evaluator_relationship": relationship,
        },
        "eval_library": {"name": TOOL, "version": str(package_version(TOOL))},
        "model_info": _model(card),
        "evaluation_results": results,
    }
    return orjson.dumps(card.public(record), option=orjson.OPT_INDENT_2).decode() + "\n"


def _model(card: Card) -> Row:
    """Model, its config and the engine of its predictions."""
    details = {
        "deployment_type": "self_deployed",
        "model_availability": "open_weights",
        "adapter_sha256": card.adapter_sha256,
        "recipe": card.result.run.origin,
        "config": yamlfiles.write_yaml(card.config),
    }
    return {
        "name": card.repository,
        "id": card.repository,
        "inference_engine": {"name": card.evaluation.settings.engine if card.evaluation else "transformers"},
        "additional_details": details,
    }


def _result(card: Card, column: Column, score: ScoreRecord) -> Row:
    """Score with its uncertainty, settings and verdict."""
    metric = column.metric
    low = "-Infinity" if math.isinf(metric.low) else metric.low
    high = "Infinity" if metric.high is None else metric.high
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
        "score_details": {
            "score": score.value,
            "uncertainty": _uncertainty(card, column, score),
            "details": _details(card, column, score),
        },
    }
    is_generated = score.benchmark is None and not isinstance(metric, LossMetric)
    if is_generated and card.evaluation:
        result["generation_config"] = _generation(card.evaluation)
    return result


def _uncertainty(card: Card, column: Column, score: ScoreRecord) -> Row:
    """Number of rows or pairs if it is known, interval, and the standard error of a benchmark."""
    uncertainty: Row = {}
    pairs = card.result.summary.eval_pairs
    if isinstance(column.metric, LossMetric):
        uncertainty |= {"num_samples": pairs["count"]} if pairs else {}
    elif card.evaluation:
        uncertainty["num_samples"] = card.evaluation.shares.rows
    if score.interval:
        lower, upper = score.interval
        uncertainty["confidence_interval"] = {"lower": lower, "upper": upper, "confidence_level": 0.95}
    if score.benchmark:
        uncertainty["num_samples"] = score.benchmark.rows
        if score.benchmark.stderr is not None:
            uncertainty["standard_error"] = {"value": score.benchmark.stderr}
    return uncertainty


def _details(card: Card, column: Column, score: ScoreRecord) -> dict[str, str]:
    """Conditions of a benchmark, weighting of a loss, and the published score with the verdict if there is one."""
    details = {}
    if isinstance(column.metric, LossMetric):
        mean_over = "batches" if is_of_trainer(column) else "tokens with loss"
        details["weighting"] = f"mean over {'pairs' if card.result.summary.eval_pairs else mean_over}"
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


def _at(*keys: str) -> Any:
    """Field with the value at the first of some dotted keys that a record has."""
    return Field(None, validation_alias=AliasChoices(*(AliasPath(*key.split(".")) for key in keys)))


def _bounded(value: Row) -> Row:
    if len(orjson.dumps(value)) > _MOST_TEXT:
        raise ValueError("too long")
    return value


_MOST_TEXT, _MOST_SCORES = 10_000, 1000
Text = Annotated[str, StringConstraints(max_length=_MOST_TEXT)]
Name = Annotated[str, StringConstraints(max_length=300)]
Mapping = Annotated[Row, AfterValidator(_bounded)]


class PublicScore(BaseModel, validate_default=True):
    """Score in a public record, by this tool or another.

    Attributes:
        model: name in an Every Eval Ever record; other files are the model's own.
        on: data set, benchmark or scored rows.
        score: the score; in a model card also a text, such as 20.0 ± 1.2.
        uncertainty: interval, standard error and rows, in the form of Every Eval Ever.
        conditions: settings of the measurement, in the form of the record.
        recipe: recipe of the run; only this tool records it.
        published: score published for the recipe, if the record compares with it.
    """

    model: Name | None = _at("model_info.id")
    metric: Name = _at("metric_config.metric_id", "evaluation_name", "metric_type", "dataset.task_id")
    on: Name = _at("source_data.dataset_name", "dataset_name", "dataset.id")
    score: float | Name = _at("score_details.score", "metric_value", "value")
    uncertainty: Mapping | None = _at("score_details.uncertainty")
    conditions: Mapping | Text | None = _at(
        "score_details.details.conditions", "generation_config", "notes", "dataset_args"
    )
    recipe: Name | None = _at("model_info.additional_details.recipe")
    published: Name | None = _at("score_details.details.published")

    def verdict_in(self, study: Study) -> str | None:
        """Our verdict, if the record has conditions and states the published score of its recipe."""
        published = study.aimed_at(self.recipe or "").scores.get(self.metric)
        if not self.conditions or published is None or str(published) != self.published:
            return None
        bounds = value_at(self.uncertainty, "confidence_interval")
        interval = None
        if bounds:
            interval = Interval(bounds["lower"], bounds["upper"])
        return verdict.verdict(float(self.score), interval, published, study.tolerances.get(self.metric))


def read(file: Path, study: Study) -> list[Row]:
    """Scores in an Every Eval Ever record (.json), a model card (.md) or a file of `.eval_results`, with our verdicts.

    Raises:
        UserError: the file cannot be read, is too large, or has another form.
    """
    scores = []
    try:
        rows = _rows(file)
        if len(rows) > _MOST_SCORES:
            raise UserError(f"more than {_MOST_SCORES:,} scores", file=file)
        for row in rows:
            score = PublicScore.model_validate(row)
            scores.append({"file": str(file), **score.model_dump(), "verdict": score.verdict_in(study)})
    except (AttributeError, LookupError, TypeError, ValueError):
        problem = "neither an Every Eval Ever record, a model card with `model-index`, nor a file of `.eval_results`"
        raise UserError(problem, file=file) from None
    return scores


def _rows(file: Path) -> list[Row]:
    """Scores in a file, with the facts about all of them."""
    from huggingface_hub.repocard_data import model_index_to_eval_results

    text = yamlfiles.read_text(file)
    if file.suffix == ".json":
        record = parse_json(text.encode())
        return [record | result for result in record["evaluation_results"]]
    if file.suffix != ".md":
        return yamlfiles.parse(text, file)
    front = yamlfiles.parse(text.split("---\n")[1], file)
    if not front["model-index"]:
        return []
    _, results = model_index_to_eval_results(front["model-index"])
    return [*map(vars, results)]


def show(study: Study, files: Sequence[str], json: bool) -> None:
    """Print the scores in public records of a study."""
    rows = []
    for file in files:
        rows += read(Path(file), study)
    tables.show(json, rows, [tables.Table(rows, "Public records", below=["file", "uncertainty", "conditions"])])
