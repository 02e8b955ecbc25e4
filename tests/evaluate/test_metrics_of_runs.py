"""Metrics and decoding of runs and of files of predictions."""

from typing import TYPE_CHECKING

import orjson
import pytest
from run_folders import STUDY, configure, other_evaluation

from qlora_recipes.base.errors import UserError
from qlora_recipes.base.files import write_rows
from qlora_recipes.data import studies
from qlora_recipes.data.studies import Decoding
from qlora_recipes.evaluate import evaluate, score
from qlora_recipes.evaluate.evaluate import EvaluationRequest
from qlora_recipes.evaluate.scores_file import Evaluation, read_predictions
from qlora_recipes.evaluate.settings import Completion
from qlora_recipes.metrics import registry
from qlora_recipes.run.rundir import RunDir

if TYPE_CHECKING:
    from qlora_recipes.evaluate.transformers_engine import TransformersEngine

ANSWERS = [
    {"question": "1 + 2?", "gold": "A: 3", "model": {"solution": "so it is 3\nA: 3", "right": True}},
    {"question": "2 * 600?", "gold": "A: 1,200", "model": {"solution": "A: 1200", "right": True}},
    {"question": "5 - 1?", "gold": "A: 4", "model": {"solution": "5 - 1 is\nA: 5", "right": False}},
]
FIELDS = ("--prediction-field", "model.solution", "--reference-field", "gold")


@pytest.fixture
def generated(monkeypatch: pytest.MonkeyPatch) -> list["TransformersEngine"]:
    """The reference of each evaluation, none of which takes long."""
    from qlora_recipes.evaluate.transformers_engine import TransformersEngine

    batches: list[TransformersEngine] = []

    def generate(
        self: TransformersEngine, prompts: list[list[int]], done: dict[int, Completion]
    ) -> list[dict[int, Completion]]:
        batches.append(self)
        return [{i: Completion(f"answer {len(prompt)}", prompt) for i, prompt in enumerate(prompts)}]

    monkeypatch.setattr(TransformersEngine, "generate", generate)
    return batches


def evaluated(run: RunDir, *metrics: str, decoding: str | None = None) -> Evaluation:
    request = EvaluationRequest(adapter="none", limit=3, metrics=[*metrics, "bertscore:none"], decoding=decoding)
    return evaluate.evaluate_run(run, request)


def test_a_run_is_scored_with_its_studys_metrics_and_those_asked_for(run, generated):
    first = evaluated(run)
    assert list(first.scores) == ["bleu4", "rouge_l", "sacrebleu"]  # BERTScore was asked to be left out
    more = evaluated(run, "ours: {metric: number, parser: peft}", "perplexity")
    assert list(more.columns) == ["bleu4", "rouge_l", "sacrebleu", "ours", "perplexity"]
    assert more.scores["ours"].value == 0 and more.scores["ours"].notes[0].startswith("3 of 3 ")
    assert more.scores["perplexity"].value is None  # of a training, which this adapter is not from
    assert len(generated) == 1  # the predictions were there
    assert all(row["ours"] == 0 for row in read_predictions(other_evaluation(run)))
    assert evaluated(run) == more  # it has all that is asked for


def test_the_base_models_eval_loss_is_that_of_step_0(run, generated):
    write_rows(run.metrics, [{"step": step, "eval_loss_per_token": 2.0 - step / 10} for step in (0, 5)])
    assert evaluated(run, "eval_loss").scores["eval_loss"].value == 2.0
    configure(run, lora_model_dir="adapter")
    run = RunDir(run.path)
    assert evaluated(run, "eval_loss", "perplexity").scores["perplexity"].value is None  # step 0 has an adapter


def test_a_metric_of_the_study_is_not_declared_anew(run):
    with pytest.raises(UserError, match="--metric bleu4: "):
        evaluated(run, "bleu4: {metric: chrf}")
    with pytest.raises(UserError, match="--metric bleu: "):
        evaluated(run, "bleu")
    assert list(score.columns_of("mine", ["chrf"])) == ["chrf"]


@pytest.mark.parametrize(
    ("config", "recipe", "requested", "labels"),
    [
        ({"rl": "dpo"}, "start/dpo-qlora", [], ["eval loss", "reward accuracy, %", "reward margin"]),
        ({"rl": "dpo"}, "start/dpo-qlora", ["reward_margin"], ["reward margin"]),
        ({"rl": "dpo"}, "zephyr/dpo-qlora", [], ["eval loss", "reward accuracy, %", "reward margin"]),
        ({}, "start/qlora", [], ["eval loss, nats per token", "exact match, %"]),
    ],
)
def test_a_preference_training_has_rewards_by_default(config, recipe, requested, labels):
    columns = score.columns_of_training(config, recipe, requested)
    assert [column.label for column in columns.values()] == labels


SHORT, LONG = "x" * (registry.LONGER - 1), "x" * registry.LONGER


@pytest.mark.parametrize(
    ("recipe", "references", "names"),
    [
        ("mine", [], ["eval_loss", "exact_match"]),
        ("mine", [SHORT, SHORT, LONG], ["eval_loss", "exact_match"]),
        ("mine", [SHORT, LONG, LONG], ["eval_loss", "exact_match", "rouge_l", "sacrebleu"]),
        ("start/qlora", [LONG], ["eval_loss", "exact_match", "rouge_l", "sacrebleu"]),
        ("", [LONG], ["exact_match", "rouge_l", "sacrebleu"]),  # predictions without a run
        ("", [SHORT], ["exact_match"]),
    ],
)
def test_the_length_of_answers_decides_the_default_metrics(recipe, references, names):
    assert list(score.columns_of(recipe, references=references)) == names


def test_a_further_decoding_is_evaluated_beside_the_usual_one(run, generated, monkeypatch):
    sampled = Decoding(max_new_tokens=4, do_sample=True, temperature=0.1, top_k=40, top_p=0.95, seed=42)
    declared = STUDY.model_copy(update={"decodings": {"sampled": sampled}})
    monkeypatch.setattr(studies, "study_of", lambda _: declared)
    default = evaluated(run)
    sampled_evaluation = evaluated(run, decoding="sampled")
    assert sampled_evaluation.settings.decoding == sampled
    used = generated[1].decoding()
    assert used.do_sample is True
    assert used.temperature == 0.1
    assert used.top_k == 40
    assert used.top_p == 0.95
    assert {folder / "scores.json" for folder in (run.path / "evaluations").iterdir()} == {
        evaluation.settings.folder(run.path) / "scores.json" for evaluation in (default, sampled_evaluation)
    }
    with pytest.raises(UserError, match=r"--decoding smpled: .* has sampled$"):
        evaluated(run, decoding="smpled")
    words = EvaluationRequest(metrics=["chrf"], decoding="sampled").options()
    assert words == ["--decoding", "sampled", "--engine", "transformers", "--metric", "chrf"]


def test_predictions_are_scored_by_other_fields(recipe, tmp_path):
    write_rows(tmp_path / "answers.jsonl", ANSWERS * 2)
    number = ("--metric", 'number: {markers: ["A: "]}')
    scores = recipe.json("score", "answers.jsonl", *number, *FIELDS, "--out", "s.jsonl")
    assert scores["number"] == pytest.approx(200 / 3) and len(scores["intervals"]["number"]) == 2
    assert scores["metrics"] == {"number": {"metric": "number", "markers": ["A: "]}}
    assert "bleu4" not in scores
    rows = list(map(orjson.loads, (tmp_path / "s.jsonl").read_bytes().splitlines()))
    assert [row["number"] == 100 for row in rows] == [row["model"]["right"] for row in rows]
    assert [row["question"] for row in rows] == [row["question"] for row in ANSWERS * 2]
    compared = recipe.json("results", "s.jsonl", "s.jsonl", "--metric", "number")
    assert [row["score"] for row in compared["scores"]] == ["number"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--prediction-field", "model.text"), "model.text; "),
        (("--prediction-field", "model.right"), "model.right"),
        ((), "--reference-field"),
        ((*FIELDS, "--metric", "perplexity"), "--metric perplexity: "),
        ((*FIELDS, "--metric", "number: {markers: 3}"), "markers: "),
    ],
)
def test_what_cannot_be_scored_is_refused(recipe, tmp_path, words, says):
    write_rows(tmp_path / "answers.jsonl", ANSWERS)
    reference = ("--reference-field", "gold") if words and words != FIELDS else ()
    done = recipe("score", "answers.jsonl", *words, *reference)
    assert done.returncode == 2
    assert done.stdout == ""
    assert says in done.stderr
