"""Run folders and checkpoints as real runs leave them, for tests that need no training."""

from pathlib import Path
from typing import Any

import orjson
import pytest
import torch
from conftest import recipe_config
from safetensors.torch import save_file

from qlora_recipes.base import paths, yamlfiles
from qlora_recipes.base.files import Row, sha256
from qlora_recipes.config import merging
from qlora_recipes.config.datafiles import training_sets
from qlora_recipes.config.merging import Difference, Override
from qlora_recipes.data import studies
from qlora_recipes.evaluate.evaluate import EvaluationPlan, EvaluationRequest, prepare, resolve
from qlora_recipes.evaluate.evaluation_rows import EvaluationRow
from qlora_recipes.evaluate.scores_file import VERSION, Evaluation, RowShares
from qlora_recipes.evaluate.settings import EvaluationSettings
from qlora_recipes.metrics import registry
from qlora_recipes.metrics.metric import ScoreRecord, ScorerRecord
from qlora_recipes.run import launch
from qlora_recipes.run.rundir import RunDir
from qlora_recipes.training import checkpoints
from qlora_recipes.training.run_record import Launch, Run, Summary

STUDY = studies.find("haider2024")
ADAPTER = "adapter_model.safetensors"


def a_run(runs: Path, recipe_name: str, name: str, bleu4: float, within: float = 0.1, **more: Any) -> RunDir:
    """A finished and evaluated run; `set` changes keys of its config, `settings` what it was evaluated on, and `scores`
    takes the place of the BLEU-4."""
    folder = RunDir(runs / recipe_name / name)
    folder.path.mkdir(parents=True)
    changed = more.pop("set", {})
    overrides = [Override(key, value) for key, value in changed.items()]
    folder.config_file.write_text(yamlfiles.write_yaml(recipe_config(recipe_name) | changed))
    ended = Launch(command=[], started="2026-01-01T00:00:00+00:00", ended="2026-01-01T10:00:00+00:00", exit_code=0)
    summary = Summary(train_seconds=9000, peak_memory=7.5, memory_kind="GPU, reserved", tokens_per_second=812.0)
    settings = more.pop("settings", {})
    scores = {"rows": 5000, "bleu4": bleu4, "intervals": {"bleu4": [bleu4 - within, bleu4 + within]}}
    scores = more.pop("scores", scores)
    run = Run(
        state=more.pop("state", "finished"),
        recipe=recipe_name,
        recipe_file="f",
        recipe_sha256=sha256(paths.recipe_file(recipe_name)),
        cwd="/",
        launches=[ended],
        summary=more.pop("summary", summary),
        overrides=overrides,
        differences=[Difference(key=change.key, run=change.value, source=change.source) for change in overrides],
        **more,
    )
    folder.write(run)
    evaluated(folder, scores, run.rehearsal, **settings)
    return folder


def configure(run: RunDir, **changes: Any) -> None:
    """Merge keys into a run's config; None deletes one."""
    run.config_file.write_text(yamlfiles.write_yaml(merging.merge(run.config, changes)))
    del run.config  # read again


def shell_for_axolotl(folder: Path, monkeypatch: pytest.MonkeyPatch, does: str) -> None:
    axolotl = folder / "axolotl"
    axolotl.write_text(f"#!/bin/sh\n{does}\n")
    axolotl.chmod(0o755)
    monkeypatch.setattr(launch, "AXOLOTL", axolotl)


def fields(record: dict[str, Any], *names: str) -> list[Any]:
    """Values of some fields of a record."""
    return [record[name] for name in names]


def evaluated(folder: RunDir, scores: dict[str, Any], rehearsal: bool = False, **settings: Any) -> None:
    default = {
        "base_model": "m",
        "adapter": "a",
        "adapter_sha256": "x",
        "data": "d",
        "data_sha256": "x",
        "test_set": "test-subset-1",
        "rows": 5000,
        "total_rows": 5000,
        "built_with": {},
        "decoding": STUDY.decoding,
        "batch_size": None,
        "batch_tokens": 8192,
        "quantized": True,
        "dtype": "float16",
    }
    evaluation = Evaluation(
        created="2026-01-01T11:00:00+00:00",
        rehearsal=rehearsal,
        scores=score_records(scores),
        shares=RowShares(rows=scores.get("rows", 5000)),
        version=VERSION,
        files={},
        data=[],
        settings=EvaluationSettings(**default | settings),
    )
    (folder.path / "scores.json").write_text(evaluation.model_dump_json())


def a_gguf_file(run: RunDir, bleu4: float) -> None:
    """An evaluation of a quantized file of a run's adapter."""
    folder = RunDir(run.path / "evaluations" / "of-a-file")
    folder.path.mkdir(parents=True)
    distance = {"rows": 32, "tokens": 900, "kl": 0.056, "difference": 0.166, "loss": 0.821, "trained_loss": 0.772}
    file = {"name": "m-q4_k_m.gguf", "quantization": "Q4_K - Medium", "bits": 4.9}
    distance |= {"merged_loss": 0.773}
    scores = {"rows": 5000, "bleu4": bleu4, "intervals": {}}
    trained = run.read().adapter
    sha256 = trained.sha256 if trained else "x"
    evaluated(folder, scores, adapter_sha256=sha256, engine="server", model="m", file=file, distance=distance)


def score_records(scores: dict[str, Any]) -> dict[str, ScoreRecord]:
    """Records of scores by name, from a dictionary as `--json` prints it."""
    records = {}
    default = {name: {"metric": name} for name in scores if name in registry.METRICS}
    for name, declaration in scores.get("metrics", default).items():
        interval = scores.get("intervals", {}).get(name)
        records[name] = ScoreRecord(value=scores.get(name), interval=interval, declaration=declaration)
    scorer = scores.get("bertscore")
    if scorer:
        records["bertscore_f1"].scorer = ScorerRecord(model=scorer["model"], layer=17, revision=None, hash="x")
    signature = scores.get("sacrebleu_signature")
    if signature:
        records["sacrebleu"].signature = signature
    return records


def a_tiny_run(place: Path, tiny: Path, profile: Path, sample: Path) -> RunDir:
    """A finished run of the tiny Llama as far as an evaluation of its base model needs one; see conftest.py."""
    from transformers import AutoTokenizer

    folder = RunDir(place / "run")
    folder.output.mkdir(parents=True)
    AutoTokenizer.from_pretrained(tiny, pad_token="</s>").save_pretrained(folder.output)  # as a training leaves it
    cfg = merging.merge(recipe_config("haider2024/llama-2-7b"), yamlfiles.read_yaml(profile))
    cfg = merging.merge(cfg, {"bf16": False, "special_tokens": {"pad_token": "</s>"}})
    folder.config_file.write_text(yamlfiles.write_yaml(cfg))
    folder.write(
        Run(
            state="finished",
            recipe="haider2024/llama-2-7b",
            recipe_file="x",
            recipe_sha256=sha256(paths.recipe_file("haider2024/llama-2-7b")),
            cwd=str(place),
            test_data=str(sample / "test.jsonl"),
        )
    )
    return folder


def a_checkpoint(output: Path, step: int, ranks: int = 1) -> Path:
    folder = output / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    save_file({"lora_A": torch.ones(8, 64), "lora_B": torch.ones(64, 8)}, folder / ADAPTER)
    rng_states = ["rng_state.pth"] if ranks == 1 else [f"rng_state_{rank}.pth" for rank in range(ranks)]
    for name in ("optimizer.pt", "scheduler.pt", *rng_states):
        torch.save({"state": torch.ones(1000)}, folder / name)
    (folder / "trainer_state.json").write_bytes(orjson.dumps({"global_step": step}))
    checkpoints.write_manifest(folder)
    return folder


def rows_for(prompter: Any, contents: list[Row]) -> list[EvaluationRow]:
    """Rows in the format of the first training data set of a prompter's config."""
    first = training_sets(prompter.cfg)[0]
    return [EvaluationRow(position, first, content) for position, content in enumerate(contents)]


def planned(run: RunDir, adapter: str | None = "none", **more: Any) -> tuple[EvaluationPlan, list[EvaluationRow]]:
    """Plan of an evaluation, by default of a run's base model, and the rows that it evaluates."""
    plan, rows = prepare(resolve(run, EvaluationRequest(adapter=adapter, **more)))
    return plan, rows.at(plan.positions).rows


def other_evaluation(run: RunDir) -> Path:
    """The only folder in a run's `evaluations`."""
    (folder,) = (run.path / "evaluations").iterdir()
    return folder
