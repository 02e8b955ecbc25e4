from collections.abc import Container, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import orjson
import pytest
from run_folders import a_tiny_run

from qlora_recipes.base.errors import WorkFailed
from qlora_recipes.runs.rundir import RunDir
from qlora_recipes.scores import agreement
from qlora_recipes.scores.engines.engine import Answer
from qlora_recipes.scores.evaluate import evaluate
from qlora_recipes.scores.evaluations import EvaluationSettings, read_predictions, read_scores
from qlora_recipes.scores.task import EvaluationRequest, EvaluationTask

ROWS = 6


@pytest.fixture
def run(tmp_path: Path, tiny: Path, tiny_profile: Path, sample: Path) -> RunDir:
    """A finished run of the tiny Llama as far as an evaluation of its base model needs one."""
    return a_tiny_run(tmp_path, tiny, tiny_profile, sample)


class Changed:
    """An engine that is the reference, with some answers changed.

    Args:
        reference: what answers.
        change: what becomes of an answer.
        rows: how many answers it gives before it fails.
    """

    served = "as it is"

    def __init__(self, reference: Any, change: Any = lambda answer: answer, rows: int = 10**6):
        self.reference, self.change, self.left = reference, change, rows
        self.settings = self.settings.model_copy(update={"engine": "server"})

    @property
    def settings(self) -> EvaluationSettings:
        return self.reference.settings

    @settings.setter
    def settings(self, settings: EvaluationSettings) -> None:
        self.reference.settings = settings

    def generate(self, prompts: Sequence[list[int]], done: Container[int]) -> Iterator[dict[int, Answer]]:
        for i, prompt in enumerate(prompts):
            if i in done:
                continue
            self.left -= 1
            if self.left < 0:
                raise WorkFailed("the server is gone")
            [tokens] = self.reference.answers([prompt], 0, 1024)
            text = self.reference.tokenizer.decode(tokens, skip_special_tokens=True).strip()
            yield {i: self.change(Answer(text, tokens))}


@pytest.fixture
def parts(run: RunDir) -> SimpleNamespace:
    """The reference of a run's base model, with what it writes for some rows."""
    from qlora_recipes.scores.engines.reference import Reference
    from qlora_recipes.scores.prompter import Prompter

    task = EvaluationTask(run, EvaluationRequest(adapter="none", max_new_tokens=6, limit=ROWS))
    prompter = Prompter(task.settings, task.cfg, run.output)
    examples = prompter.examples(task.rows.rows)
    written = agreement.by_reference(prompter, examples, 3)
    return SimpleNamespace(
        prompter=prompter, examples=examples, written=written, columns=task.columns, reference=Reference(prompter)
    )


def compared(parts: SimpleNamespace, engine: Changed) -> Any:
    return agreement.compare(parts.written, engine, parts.prompter, parts.examples, parts.columns)


def test_rows_at_even_distances_are_compared_and_equal_answers_agree(parts: SimpleNamespace) -> None:
    assert parts.written.rows == [0, 2, 4]
    found = compared(parts, Changed(parts.reference))
    assert (found.rows, found.equal, found.differences) == (3, 3, [])
    assert found.scores["bleu4"][0] == found.scores["bleu4"][1]
    assert agreement.require(found, "vllm", accepted=False) == found


@pytest.mark.parametrize("as_text", [False, True])
@pytest.mark.parametrize("rank", [1, 10_000])
def test_the_first_other_token_is_found_with_how_likely_the_reference_finds_it(
    parts: SimpleNamespace, rank: int, as_text: bool
) -> None:
    at, tokenizer = 2, parts.prompter.tokenizer
    own, best = parts.written.answers[0], parts.written.best[0][at]
    others = [i for i in range(300, len(tokenizer)) if i not in best and tokenizer.decode([i]).isalpha()]
    token = sorted(best, key=lambda t: -best[t])[rank] if rank < len(best) else others[0]

    def change(answer: Answer) -> Answer:
        if answer.tokens != own.tokens:
            return answer
        tokens = [*answer.tokens[:at], token, *answer.tokens[at + 1 :]]
        return Answer(tokenizer.decode(tokens, skip_special_tokens=True).strip(), None if as_text else tokens)

    found = compared(parts, Changed(parts.reference, change))
    [one, *more] = found.differences  # two rows of the tiny model can have the same answer
    assert (one.row, one.token, found.equal) == (0, at + 1, 2 - len(more))
    if rank < len(best):
        assert one.gap == pytest.approx(best[own.tokens[at]] - best[token], abs=1e-6)
        assert (one.near_tie, one.at_least) == (one.gap <= agreement.NEAR_TIE, False)
    else:
        assert one.at_least and not one.near_tie
        with pytest.raises(WorkFailed, match=r"vllm does not answer as the reference does: [1-3] of 3 answers part"):
            agreement.require(found, "vllm", accepted=False)
        assert agreement.require(found, "vllm", accepted=True).accepted


def test_no_row_is_generated_by_an_engine_that_differs_unless_that_is_accepted(
    run: RunDir, parts: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from contextlib import nullcontext

    from qlora_recipes.scores.engines import start

    class Other:
        """Another model, and how often it was asked."""

        asked = 0

    def other(answer: Answer) -> Answer:
        Other.asked += 1
        return Answer("something else", None)

    engine = Changed(parts.reference, other)
    monkeypatch.setattr(start, "started", lambda *_: nullcontext(engine))
    request = EvaluationRequest(
        adapter="none", max_new_tokens=6, limit=ROWS, judge="none", server="http://x", model="m", agreement_rows=3
    )
    with pytest.raises(WorkFailed, match="--accept-difference"):
        evaluate(run, request)
    folder = run.path / "evaluations" / "base-model"
    assert Other.asked == 3 and not read_scores(folder)
    assert "server and the reference: 0 of 3 answers equal" in capfd.readouterr().err

    request.accept_difference = True
    done = evaluate(run, request)
    assert done.settings.served == "as it is" and done.settings.agreement and done.settings.agreement.accepted
    assert done.scores["notes"][0].startswith("generated by server, which was accepted though 3 of 3 answers")
    assert [row["prediction"] for row in read_predictions(folder)] == ["something else"] * ROWS


def test_an_evaluation_that_a_server_left_goes_on_and_is_not_compared_again(
    run: RunDir, parts: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    from contextlib import nullcontext

    from qlora_recipes.scores.engines import start

    request = EvaluationRequest(
        adapter="none", max_new_tokens=6, limit=ROWS, judge="none", server="http://x", model="m", agreement_rows=3
    )
    engine = Changed(parts.reference, rows=3 + 2)
    monkeypatch.setattr(start, "started", lambda *_: nullcontext(engine))
    with pytest.raises(WorkFailed, match="the server is gone"):
        evaluate(run, request)
    part = run.path / "evaluations" / "base-model" / "predictions.part.jsonl"
    assert sum("prediction" in orjson.loads(line) for line in part.read_bytes().splitlines()) == 2

    engine.left = ROWS - 2
    monkeypatch.setattr(agreement, "by_reference", None)
    done = evaluate(run, request)
    assert engine.left == 0 and done.settings.agreement == agreement.Agreement(
        rows=3, differences=[], scores=done.settings.agreement.scores if done.settings.agreement else {}
    )
    assert "notes" not in done.scores
    whole = evaluate(run, EvaluationRequest(adapter="none", max_new_tokens=6, limit=ROWS, judge="none"))
    assert whole == done  # the same model on the same rows, whatever generated
