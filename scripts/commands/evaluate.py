"""The commands evaluate and score."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..base import tables
from ..base.files import write_rows
from ..base.run_files import RunFile
from ..base.terminal import Bar, say
from .help import RecipeCommand, name_of, suggest
from .options import (
    BatchSize,
    DecodingName,
    Force,
    Json,
    Limit,
    Metrics,
    On,
    RunName,
    backend_of,
    refuse_together,
    refuse_without,
    repeatable_option,
)

if TYPE_CHECKING:
    from ..evaluate.scores_file import Scores

Data = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="JSONL rows; default: the study's test set, else `test_datasets`, else held-out rows."
    ),
]
Adapter = Annotated[
    str | None,
    typer.Option(
        metavar="DIR|HUB ID|none",
        help="Use this adapter (none: base model); RUN may then be a recipe.",
    ),
]
EngineName = Annotated[
    str,
    typer.Option(
        metavar="transformers|vllm|URL",
        help="Inference engine. URL: vLLM or llama.cpp server (docs/laptop.md). `make vllm` installs vllm.",
    ),
]
ServersModel = Annotated[
    str | None,
    typer.Option("--served-model", metavar="NAME", help="With --engine URL: the model name that the server uses."),
]
commands = typer.Typer(rich_markup_mode=None)


@commands.command(
    "evaluate",
    cls=RecipeCommand,
    epilog="recipe evaluate latest --base\nrecipe evaluate latest --metric benchmark:mmlu",
)
def evaluate_command(
    *,
    run: RunName,
    data: Data = None,
    limit: Limit = None,
    adapter: Adapter = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Maximum tokens to generate per row; default: the study's limit."),
    ] = None,
    decoding: DecodingName = None,
    batch_size: BatchSize = None,
    engine: EngineName = "transformers",
    model: ServersModel = None,
    metric: Metrics,
    base: Annotated[bool, typer.Option("--base", help="Also score the base model, in a second column.")] = False,
    force: Force,
    on: On = "local",
    json: Json = False,
) -> None:
    """Generate predictions for test rows with a run's adapter, and score them."""
    from ..config import datafiles
    from ..evaluate.evaluate import EvaluationRequest
    from ..evaluate.scores_file import Evaluation, Scores, current
    from ..evaluate.settings import BASE
    from ..results import listing
    from ..run.rundir import RunDir
    from ..study import evaluation

    refuse_together({"--adapter": adapter, "--base": base})
    request = EvaluationRequest(
        data, limit, adapter, max_new_tokens, batch_size, metric, decoding, engine=engine, model=model, force=force
    )
    refuse_without("--served-model", model, "--engine URL", request.server)
    refuse_together({"--base": base, "--engine URL": request.server})
    if request.server:
        from ..evaluate import server

        server.api_at(request.server)  # refuse a wrong URL before anything is recorded
    backend = backend_of(on)
    folder, evaluated = evaluation.evaluate_by_name(run, request, backend)
    of_base = None
    if base:
        _, of_base = evaluation.evaluate_by_name(str(folder.path), replace(request, adapter=BASE), backend)
    if isinstance(evaluated, RunDir):
        print(evaluated.path)
        suggest("results", json=json)
        return
    scores: dict[str, Scores] = {"adapter": evaluated}
    if evaluated.settings.file:
        of_adapter = current(folder.path, folder.read())
        scores = {"adapter": of_adapter} if of_adapter else {}
        scores[str(evaluated.settings.file)] = evaluated
    if isinstance(of_base, Evaluation):
        scores["base"] = of_base
    title = listing.REHEARSALS if evaluated.rehearsal else None
    print_scores(scores, json, title)
    where, options = folder.quoted, datafiles.chat_options(folder.config)
    arguments = f"{where}/{RunFile.CONFIG} --lora-model-dir {where}/{RunFile.OUTPUT} {options}"
    say(f"chat: AXOLOTL_DO_NOT_TRACK=1 axolotl inference {arguments}")
    suggest("report", name_of(folder), json=json)


@commands.command("score", cls=RecipeCommand, epilog="recipe score predictions.jsonl --out scored.jsonl")
def score_command(
    *,
    file: Annotated[Path, typer.Argument(metavar="FILE.jsonl", help="Rows with the fields reference and prediction.")],
    metric: Annotated[
        list[str],
        repeatable_option(metavar="NAME", help="Use this metric, not the defaults. Repeatable."),
    ],
    prediction_field: Annotated[
        str,
        typer.Option(metavar="FIELD", help="The field with the prediction; use dots for nested fields (answer.text)."),
    ] = "prediction",
    reference_field: Annotated[
        str, typer.Option(metavar="FIELD", help="The field with the expected answer.")
    ] = "reference",
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write each row with its scores to a JSONL file.")
    ] = None,
    json: Json = False,
) -> None:
    """Score predictions from any source."""
    from ..evaluate.score import columns_of, read_pairs, refuse_run_metrics, score, scorer_models
    from ..evaluate.scores_file import about_file
    from ..metrics.registry import requested_scorer

    rows = read_pairs(file, prediction_field, reference_field)
    columns = columns_of("", metric, [row["reference"] for row in rows])
    refuse_run_metrics(columns)
    models = scorer_models(columns, requested_scorer(metric))
    with Bar("scoring", 1):
        scores, rows = score(rows, columns, models)
    if about := about_file(file):
        scores.notes.insert(0, about)
    if out:
        write_rows(out, rows)
    print_scores({"predictions": scores}, json)


def print_scores(models: "dict[str, Scores]", json: bool, title: str | None = None) -> None:
    """Print the scores of some models side by side, with intervals and notes; as JSON, without names for one model."""
    records = {model: scores.flat() for model, scores in models.items()}
    columns = {}
    notes = []
    for model, flat in records.items():
        columns[model] = {name: value for name, value in flat.items() if isinstance(value, int | float | None)}
        columns[f"{model}, 95 %"] = flat["intervals"]
        notes += [f"{model}: {note}" for note in _notes(models[model])]
    first = next(iter(records))
    titles = models[first].titles
    rows = []
    for name in columns[first]:
        rows.append(
            {"score": titles.get(name, name)} | {column: values.get(name) for column, values in columns.items()}
        )
    tables.show(json, records if len(records) > 1 else records[first], [tables.Table(rows, title)], notes)


def _notes(scores: "Scores") -> list[str]:
    """Details of scores, such as the scorer model, and notes."""
    notes = []
    for name, value in scores.details.items():
        text = value.get("hash", value) if isinstance(value, dict) else value
        notes.append(f"{name}: {tables.text_of(text)}")
    return notes + scores.all_notes
