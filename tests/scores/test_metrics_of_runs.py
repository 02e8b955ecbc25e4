"""What a run, and a file of predictions, are scored with, and how they are decoded."""

from pathlib import Path
from typing import TYPE_CHECKING

import orjson
import pytest
from conftest import SHARED, Recipe
from run_folders import STUDY, a_run

from qlora_recipes.base.errors import UserError
from qlora_recipes.base.files import write_rows
from qlora_recipes.data import study
from qlora_recipes.data.study import Decoding
from qlora_recipes.runs.rundir import RunDir
from qlora_recipes.scores import evaluate, score
from qlora_recipes.scores.evaluate import EvaluationRequest
from qlora_recipes.scores.evaluations import Completion, Evaluation, read_predictions, read_scores

if TYPE_CHECKING:
    from qlora_recipes.scores.reference import Reference

ANSWERS = [
    {"question": "1 + 2?", "gold": "A: 3", "model": {"solution": "so it is 3\nA: 3", "right": True}},
    {"question": "2 * 600?", "gold": "A: 1,200", "model": {"solution": "A: 1200", "right": True}},
    {"question": "5 - 1?", "gold": "A: 4", "model": {"solution": "5 - 1 is\nA: 5", "right": False}},
]
FIELDS = ("--prediction-field", "model.solution", "--reference-field", "gold")


@pytest.fixture
def generated(monkeypatch: pytest.MonkeyPatch) -> list["Reference"]:
    """The reference of each evaluation, none of which takes long."""
    from qlora_recipes.scores.reference import Reference

    batches: list[Reference] = []

    def generate(self: Reference, prompts: list[list[int]], done: dict[int, Completion]) -> list[dict[int, Completion]]:
        batches.append(self)
        return [{i: Completion(f"answer {len(prompt)}", prompt) for i, prompt in enumerate(prompts)}]

    monkeypatch.setattr(Reference, "generate", generate)
    return batches


def evaluated(run: RunDir, *metrics: str, decoding: str | None = None) -> Evaluation:
    request = EvaluationRequest(adapter="none", limit=3, metrics=[*metrics, "bertscore:none"], decoding=decoding)
    return evaluate.evaluate(run, request)


def test_a_run_is_scored_with_its_studys_metrics_and_those_asked_for(run: RunDir, generated: list["Reference"]) -> None:
    first = evaluated(run)
    assert list(first.scores["metrics"]) == ["bleu4", "rouge_l", "sacrebleu"]  # BERTScore was asked to be left out
    more = evaluated(run, "ours: {metric: number, parser: peft}", "perplexity")
    assert list(more.columns) == ["ours", "perplexity", "bleu4", "rouge_l", "sacrebleu"]
    assert more.scores["ours"] == 0 and more.scores["notes"][0].startswith("ours: 3 of 3 ")
    assert more.scores["perplexity"] is None  # of a training, which this adapter is not from
    assert len(generated) == 1  # the predictions were there
    assert all(row["ours"] == 0 for row in read_predictions(run.path / "evaluations" / "base-model"))
    assert evaluated(run) == more  # it has all that is asked for


def test_a_metric_of_the_study_is_not_declared_anew(run: RunDir) -> None:
    with pytest.raises(UserError, match="--metric bleu4: "):
        evaluated(run, "bleu4: {metric: chrf}")
    with pytest.raises(UserError, match="--metric bleu: "):
        evaluated(run, "bleu")
    assert list(score.columns_of("mine")) == list(score.columns_of())
    assert list(score.columns_of("mine", ["chrf"])) == ["chrf"]


def test_a_further_decoding_is_evaluated_beside_the_usual_one(
    run: RunDir, generated: list["Reference"], monkeypatch: pytest.MonkeyPatch
) -> None:
    sampled = Decoding(max_new_tokens=4, do_sample=True, temperature=0.1, top_k=40, top_p=0.95, seed=42)
    declared = STUDY.model_copy(update={"decodings": {"sampled": sampled}})
    monkeypatch.setattr(study, "of", lambda _: declared)
    evaluated(run)
    made = evaluated(run, decoding="sampled")
    assert made.settings.decoding == sampled
    used = generated[1].decoding()
    assert (used.do_sample, used.temperature, used.top_k, used.top_p) == (True, 0.1, 40, 0.95)
    assert {folder.name for folder in (run.path / "evaluations").iterdir()} == {
        "base-model",
        "base-model-decoding-sampled",
    }
    with pytest.raises(UserError, match=r"--decoding smpled: .* sampled\?"):
        evaluated(run, decoding="smpled")
    words = EvaluationRequest(metrics=["chrf"], decoding="sampled").options()
    assert words[-4:] == ["--decoding", "sampled", "--metric", "chrf"]


def test_the_first_two_predictions_are_shown_wrapped_and_cut(
    tmp_path: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_run = a_run(tmp_path / "runs", "haider2024/llama-2-7b", "20260101-000000-a", 5.0).path
    texts = [("short", "Reuse it."), ("Why not reuse the pool? " * 40, ""), ("short", "x")]
    rows = ({"row": i, "reference": text, "prediction": answer} for i, (text, answer) in enumerate(texts))
    write_rows(of_run / "predictions.jsonl", rows)
    monkeypatch.setattr(evaluate, "evaluate", lambda *_: read_scores(of_run))
    monkeypatch.setenv("COLUMNS", "60")
    shown, empty, scores = recipe("evaluate", "latest").stdout.split("\n\n")
    assert shown == "row 1\nreference   short\nprediction  Reuse it."
    assert len(empty.splitlines()) == 8 and all(len(line) <= 60 for line in empty.splitlines())
    assert scores.startswith("rows ")
    assert "row 1" not in recipe("evaluate", "latest", "--json").stdout


def test_predictions_are_scored_by_other_fields(recipe: Recipe, tmp_path: Path) -> None:
    write_rows(tmp_path / "answers.jsonl", ANSWERS)
    done = recipe(
        "score", "answers.jsonl", "--metric", 'number: {markers: ["A: "]}', *FIELDS, "--json", "--out", "s.jsonl"
    )
    assert done.returncode == 0, done.stderr
    scores = orjson.loads(done.stdout)
    assert scores["number"] == pytest.approx(200 / 3) and len(scores["intervals"]["number"]) == 2
    assert scores["metrics"] == {"number": {"metric": "number", "markers": ["A: "]}}
    assert "bleu4" not in scores
    rows = list(map(orjson.loads, (tmp_path / "s.jsonl").read_bytes().splitlines()))
    assert [row["number"] == 100 for row in rows] == [row["model"]["right"] for row in rows]
    assert [row["question"] for row in rows] == [row["question"] for row in ANSWERS]
    compared = recipe("results", "s.jsonl", "s.jsonl", "--metric", "number", "--json")
    assert [row["score"] for row in orjson.loads(compared.stdout)["scores"]] == ["number"]


def test_why_no_number_is_found_is_said(recipe: Recipe, tmp_path: Path) -> None:
    write_rows(tmp_path / "answers.jsonl", ANSWERS)
    done = recipe("score", "answers.jsonl", "--metric", "number: {parser: peft}", *FIELDS)
    assert "number                0" in done.stdout
    assert "number: 3 of 3 " in done.stderr and "`markers`" in done.stderr


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
def test_what_cannot_be_scored_is_refused(recipe: Recipe, tmp_path: Path, words: tuple[str, ...], says: str) -> None:
    write_rows(tmp_path / "answers.jsonl", ANSWERS)
    reference = ("--reference-field", "gold") if words and words != FIELDS else ()
    done = recipe("score", "answers.jsonl", *words, *reference)
    assert (done.returncode, done.stdout) == (2, "")
    assert says in done.stderr


@pytest.mark.skipif(not (SHARED / "gsm8k").is_dir(), reason="needs GSM8K's published solutions, which are not ours")
@pytest.mark.parametrize(
    ("which", "percent", "by_peft"),
    [("6b_finetuning", 21.68, {610, 819}), ("6b_verification", 39.04, {249, 610})],
)
def test_the_verdicts_of_gsm8ks_authors(which: str, percent: float, by_peft: set[int]) -> None:
    """LoftQ's way agrees with each; PEFT's, whose numbers keep their commas, counts some of these wrong."""
    rows = score.read_pairs(SHARED / "gsm8k" / "solutions-6b.jsonl", f"{which}.solution")
    asked = [
        'number: {markers: ["A: "]}',
        'peft: {metric: number, parser: peft, markers: ["A: "]}',
        "theirs: {metric: number, parser: peft}",
    ]
    scores, scored = score.score(rows, score.columns_of(None, asked))
    verdicts = [row[which]["is_correct"] for row in rows]
    assert len(rows) == 1319
    assert [row["number"] == 100 for row in scored] == verdicts
    assert round(scores["number"], 2) == percent
    disagreeing = {i for i, row in enumerate(scored) if (row["peft"] == 100) != verdicts[i]}
    assert disagreeing == by_peft
    assert all("," in rows[i]["reference"].rpartition("A: ")[2] and verdicts[i] for i in disagreeing)
    assert scores["theirs"] == 0
    assert any("theirs: 1319 of 1319 predictions" in note for note in scores["notes"])
