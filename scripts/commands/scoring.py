"""What comes after a run, its predictions: evaluate and score."""

import shutil
import textwrap
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ..base.files import write_rows
from ..base.paths import RUNS
from ..base.progress import Bar, harmless, say
from ..terminal import tables
from .after import HEADING
from .help import Verb
from .next_step import name_of, next_step
from .options import (
    BatchSize,
    DecodingName,
    Force,
    Json,
    JudgeLayer,
    JudgeModel,
    Metrics,
    On,
    PromptsFile,
    RunName,
    Runs,
    SlurmOptions,
    backend_of,
    exclusive,
    form_of,
    only_with,
)

Data = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="JSONL rows; by default the study's test set or the config's own rows."),
]
Limit = Annotated[
    int | None,
    typer.Option(min=1, help="Evaluate at most this many rows, from the first on; by default 12 in a rehearsal."),
]
Adapter = Annotated[
    str | None, typer.Option(metavar="DIR|none", help="Another adapter, or none for the base model alone.")
]
Predictions = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Take the predictions that were made elsewhere for --export-prompts' rows."),
]
Checkpoints = Annotated[
    bool,
    typer.Option(
        "--checkpoints", help="Every kept checkpoint, on the validation rows; the best of them on the test rows."
    ),
]
EngineName = Annotated[
    Literal["transformers", "vllm"],
    typer.Option("--engine", help="What generates: vllm is much faster, and installed by `make vllm`."),
]
Server = Annotated[
    str | None,
    typer.Option("--server", metavar="URL", help="Generate by a server with OpenAI's protocol, as vLLM's or Ollama's."),
]
ServersModel = Annotated[
    str | None, typer.Option("--model", metavar="NAME", help="The server's name for the run's base model and adapter.")
]
AgreementRows = Annotated[
    int,
    typer.Option(min=0, metavar="N", help="How many rows vLLM or a server and transformers are compared on first."),
]
AcceptDifference = Annotated[
    bool, typer.Option("--accept-difference", help="Go on though they answer differently, and record that.")
]
verbs = typer.Typer()


@verbs.command(
    "evaluate",
    cls=Verb,
    rich_help_panel=HEADING,
    epilog="recipe evaluate latest\nrecipe evaluate latest --checkpoints",
)
def evaluate_verb(
    run: RunName,
    data: Data = None,
    limit: Limit = None,
    adapter: Adapter = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="By default the study's.")] = None,
    decoding: DecodingName = None,
    batch_size: BatchSize = None,
    engine: EngineName = "transformers",
    server: Server = None,
    model: ServersModel = None,
    agreement_rows: AgreementRows = 32,
    accept_difference: AcceptDifference = False,
    metric: Metrics = None,
    bertscore: JudgeModel = None,
    bertscore_layer: JudgeLayer = None,
    export_prompts: PromptsFile = None,
    predictions: Predictions = None,
    checkpoints: Checkpoints = False,
    force: Force = None,
    on: On = "local",
    slurm: SlurmOptions = None,
    runs: Runs = RUNS,
    json: Json = False,
) -> None:
    """Generate predictions for test rows with a run's adapter, and score them."""
    from ..running import evaluation
    from ..runs.lookup import find_run
    from ..runs.rundir import RunDir
    from ..scores import choice, evaluate, evaluations
    from ..scores.task import EvaluationRequest

    for option, value in (("--export-prompts", export_prompts), ("--predictions", predictions)):
        only_with(option, value, "--on local", on == "local", "it needs no GPU")
    exclusive({"--checkpoints": checkpoints, "--export-prompts": export_prompts, "--predictions": predictions})
    exclusive({"--checkpoints": checkpoints, "--adapter": adapter})
    exclusive({"--server": server, "--engine vllm": engine == "vllm", "--predictions": predictions})
    only_with("--model", model, "--server", server)
    exclusive({"--checkpoints": checkpoints, "--server": server})
    exclusive({"--export-prompts": export_prompts, "--server": server, "--engine vllm": engine == "vllm"})
    only_with("--accept-difference", accept_difference, "--server or --engine vllm", server or engine == "vllm")
    if server:
        from ..scores.engines import api

        api.at(server)  # an address that has to be refused is noted nowhere
    request = EvaluationRequest(
        data, limit, adapter, max_new_tokens, batch_size, bertscore, bertscore_layer, metric or [], decoding
    )
    request.predictions, request.checkpoints, request.force = predictions, checkpoints, force or []
    request.engine, request.server, request.model = engine, server, model
    request.agreement_rows, request.accept_difference = agreement_rows, accept_difference
    folder = find_run(run, runs)
    backend = backend_of(on, slurm)
    if export_prompts:
        count = evaluate.export_prompts(folder, request, export_prompts)
        say(f"{count} prompts; add the field prediction to each row; --predictions {export_prompts} then scores them")
        print(export_prompts)
        return
    evaluated = evaluation.start(folder, request, runs, backend)
    if isinstance(evaluated, RunDir):
        print(evaluated.path)
        next_step("results", runs=runs, json=json)
        return
    if isinstance(evaluated, choice.Choice):
        choice.show(evaluated, form_of(False, json))
    elif not json:
        for row in evaluations.beside_references(folder.path, evaluated, count=2):
            _print_texts(f"row {row.pop('row') + 1}", row)
    if isinstance(evaluated, evaluations.Evaluation):
        _print_scores(evaluated.scores, json)
    next_step("report", name_of(folder, runs), runs=runs, json=json)


@verbs.command("score", cls=Verb, rich_help_panel=HEADING, epilog="recipe score predictions.jsonl --out scored.jsonl")
def score_verb(
    file: Annotated[Path, typer.Argument(metavar="FILE.jsonl", help="Rows with the fields reference and prediction.")],
    metric: Metrics = None,
    prediction_field: Annotated[
        str,
        typer.Option(metavar="FIELD", help="The field with the prediction; a dot reaches below, as in answer.text."),
    ] = "prediction",
    reference_field: Annotated[str, typer.Option(metavar="FIELD", help="The field with the reference.")] = "reference",
    bertscore: JudgeModel = None,
    bertscore_layer: JudgeLayer = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the rows with their own scores to a JSONL file.")
    ] = None,
    json: Json = False,
) -> None:
    """Score predictions made anywhere."""
    from ..scores import judges
    from ..scores.columns import columns_of
    from ..scores.score import of_predictions, read_pairs, score

    columns = of_predictions(columns_of(None, metric or []))
    rows = read_pairs(file, prediction_field, reference_field)
    judged = judges.of_columns(columns, bertscore, bertscore_layer)
    with Bar("scoring", 1):
        scores, rows = score(rows, columns, judged)
    if out:
        write_rows(out, rows)
    _print_scores(scores, json)
    usual = (prediction_field, reference_field) == ("prediction", "reference")
    if usual or out:
        words = [word for text in metric or [] for word in ("--metric", text)]
        next_step("results", "--by", "length", "--run", file if usual else out or file, *words, json=json)


def _print_texts(title: str, texts: dict[str, str]) -> None:
    """Texts under their names, in a column as wide as the terminal, the first lines of each."""
    margin = " " * 12
    width = max(shutil.get_terminal_size((100, 24)).columns, 40)
    print(title)
    for name, text in zip(texts, map(harmless, texts.values()), strict=True):
        wrapped = textwrap.fill(text, width, initial_indent=margin, subsequent_indent=margin, max_lines=6)
        print(f"{name.replace('_', ' '):12}{wrapped.strip() or '(nothing)'}")
    print()


def _print_scores(scores: dict[str, Any], json: bool) -> None:
    if json:
        tables.print_json(scores)
        return
    for name, value in scores.items():
        if isinstance(value, dict) and "model" in value:  # what a judge made
            value = f"{value['model']}{' (stands in)' if value['stand_in'] else ''}, {value['hash']}"
        if name == "notes":
            for note in value:
                say(note)
        elif name not in ("intervals", "metrics"):
            interval = scores["intervals"].get(name)
            within = f"  [{tables.text_of(interval[0])}, {tables.text_of(interval[1])}]" if interval else ""
            print(f"{name:22}{tables.text_of(value)}{within}")
