"""A study of another kind than the first: sums, scored by their number, with spreads, a curve, measured figures and a
further decoding. For tests of what results, reports and verdicts make of any study."""

import shutil
from pathlib import Path
from typing import Any

from run_folders import a_run

from qlora_recipes.base import paths, yamlfiles
from qlora_recipes.base.files import write_rows
from qlora_recipes.data import studies
from qlora_recipes.data.studies import Decoding, Study
from qlora_recipes.evaluate.scores_file import read_scores
from qlora_recipes.results import study_tables, verdict
from qlora_recipes.run.rundir import RunDir
from qlora_recipes.training.run_record import Summary

PLAIN, WIDE = "sums2030/plain", "sums2030/wide"
SAMPLED = {"max_new_tokens": 64, "do_sample": True, "temperature": 0.1, "top_k": 40, "top_p": 0.95}
GREEDY = {"max_new_tokens": 64}
ACCURACY = {"metric": "number", "label": "accuracy", "markers": ["= "]}
GIB = 1 << 30


def write(place: Path, **changes: Any) -> None:
    first = paths.RECIPES / "haider2024"
    haider2024 = yamlfiles.read_yaml(first / "study.yaml")
    content: dict[str, Any] = {
        "title": "Sums",
        "paper": {"title": "On sums", "authors": "A. Nobody"},
        "data": haider2024["data"] | {"key": "sums"},
        "decoding": SAMPLED,
        "decodings": {"greedy": GREEDY},
        "metrics": {"accuracy": ACCURACY, "perplexity": {}, "chrf": {}},
        "shown": ["accuracy", "perplexity"],
        "published": {
            PLAIN: {
                "scores": {"accuracy": {"value": 67.4, "spread": 1.0}, "perplexity": 3.0},
                "curve": "plain.csv",
                "log": {
                    "source": "On sums",
                    "train_seconds": 585.2,
                    "tokens_per_second": 7198,
                    "reserved_bytes": 20 * GIB,
                    "trainable": 9175040,
                },
            },
            WIDE: {"scores": {"accuracy": 70}},
        },
        "reported": haider2024["reported"],
        "tolerances": {"perplexity": 0.1},
        "differences": ["The authors tokenize prompt and answer together"],
    }
    folder = place / "recipes" / "sums2030"
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("plain", "wide"):
        shutil.copy(first / "llama-3.2-3b.yaml", folder / f"{name}.yaml")
    shutil.copytree(first, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.yaml", "results"))
    (folder / "plain.csv").write_text("step,train_loss\n2,2.5\n4,1.5\n")
    (folder / "study.yaml").write_text(yamlfiles.write_yaml(content | changes))
    studies._load.cache_clear()


def read() -> Study:
    return studies.find("sums2030")


def row_of(runs: Path, recipe_name: str = PLAIN) -> dict[str, Any]:
    (row,) = [row for row in verdict.rows(read(), runs, False) if row.recipe == recipe_name]
    return study_tables.record(row)


def ran(
    runs: Path,
    recipe_name: str,
    name: str,
    accuracy: float,
    within: float | None = 0.5,
    loss: float | None = 1.1,
    **more: Any,
) -> RunDir:
    """A finished and evaluated run of it, in its folder of work."""
    entry = yamlfiles.read_yaml(Path("recipes", "sums2030", "study.yaml"))["metrics"]["accuracy"]
    scores = {
        "rows": 5000,
        "accuracy": accuracy,
        "chrf": 20.5,
        "metrics": {"accuracy": entry, "chrf": {"metric": "chrf"}},
    }
    of_rows = None if within is None else [accuracy - within, accuracy + within]
    scores["intervals"] = {"accuracy": of_rows, "chrf": [20.0, 21.0]}
    measured = {"train_seconds": 600, "peak_memory": 19.5, "memory_kind": "GPU, reserved", "tokens_per_second": 7000.0}
    tokens = {"count": 9, "sha256": "a" * 64}
    summary = Summary(eval_loss_per_token=loss, eval_tokens=tokens, trainable_parameters=9175040, **measured)
    decoding = Decoding.model_validate(more.pop("decoding", SAMPLED))
    settings = {"decoding": decoding} | more.pop("settings", {})
    folder = a_run(runs, recipe_name, name, 0, scores=scores, settings=settings, summary=summary, **more)
    losses = (3.0, 2.0, 1.6, 1.2)
    write_rows(
        folder.metrics, [{"step": step, "loss": loss, "step_seconds": 1.0} for step, loss in enumerate(losses, 1)]
    )
    return folder


def decoded(folder: RunDir, accuracy: float) -> None:
    evaluation = read_scores(folder.path)
    assert evaluation
    settings = evaluation.settings.model_copy(update={"decoding": Decoding.model_validate(GREEDY)})
    scores = evaluation.scores | {"accuracy": evaluation.scores["accuracy"].model_copy(update={"value": accuracy})}
    other = evaluation.model_copy(update={"scores": scores, "settings": settings})
    where = settings.folder(folder.path)
    where.mkdir(parents=True)
    (where / "scores.json").write_text(other.model_dump_json())
