import re
from collections.abc import Container, Iterator, Sequence
from contextlib import nullcontext
from itertools import cycle
from types import SimpleNamespace
from typing import Any

import orjson
import pytest
from run_folders import other_evaluation

from qlora_recipes.base.errors import UserError, WorkFailed
from qlora_recipes.evaluate import predict
from qlora_recipes.evaluate.evaluate import EvaluationRequest, EvaluationTask, evaluate
from qlora_recipes.evaluate.scores_file import Agreement, Completion, EvaluationSettings, read_predictions
from qlora_recipes.run.rundir import RunDir

ROWS = 6


class Changed:
    """An engine that is the reference with changed answers, and fails after some rows."""

    def __init__(self, reference: Any, change: Any = lambda answer: answer, rows: int = 10**6):
        self.reference, self.change, self.left = reference, change, rows
        self.settings = self.settings.model_copy(update={"engine": "server"})

    @property
    def settings(self) -> EvaluationSettings:
        return self.reference.settings

    @settings.setter
    def settings(self, settings: EvaluationSettings) -> None:
        self.reference.settings = settings

    def generate(self, prompts: Sequence[list[int]], done: Container[int]) -> Iterator[dict[int, Completion]]:
        for i, prompt in enumerate(prompts):
            if i in done:
                continue
            self.left -= 1
            if self.left < 0:
                raise WorkFailed("the server is gone")
            [tokens] = self.reference.answers([prompt], 0)
            text = self.reference.tokenizer.decode(tokens, skip_special_tokens=True).strip()
            yield {i: self.change(Completion(text, tokens))}


@pytest.fixture(autouse=True)
def three_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predict, "COMPARED", 3)
    monkeypatch.setattr(predict, "require", lambda *_: None)
    monkeypatch.setattr("qlora_recipes.config.gpus.here", lambda: ["a GPU"])  # where a server is compared


@pytest.fixture
def parts(run: RunDir) -> SimpleNamespace:
    """The reference of a run's base model, with what it writes for some rows."""
    from qlora_recipes.evaluate.prompter import Prompter
    from qlora_recipes.evaluate.transformers_engine import Reference

    task = EvaluationTask(run, EvaluationRequest(adapter="none", max_new_tokens=6, limit=ROWS))
    prompter = Prompter(task.settings, task.cfg, run.output)
    examples = prompter.examples(task.rows.rows)
    prompts = predict.sampled([example.prompt for example in examples])
    expected = predict.answers_of_reference(prompter, prompts)
    return SimpleNamespace(prompter=prompter, prompts=prompts, expected=expected, reference=Reference(prompter))


def request_of(**more: Any) -> EvaluationRequest:
    usual = {"adapter": "none", "max_new_tokens": 6, "limit": ROWS, "metrics": ["bertscore:none"]}
    return EvaluationRequest(**usual | more)


def compared(parts: SimpleNamespace, engine: Changed) -> Any:
    return predict.compare_answers(parts.expected, engine, parts.prompts)


def test_rows_at_even_distances_are_compared_and_equal_answers_agree(parts):
    assert predict.sampled([[i] for i in range(ROWS)]) == [[0], [2], [4]]
    assert compared(parts, Changed(parts.reference)) == Agreement(rows=3, equal=3)


def test_another_model_is_recorded_and_does_not_stand_for_the_references(run, parts, monkeypatch, capfd):
    other = Changed(parts.reference, lambda _: Completion("another", [7]))
    monkeypatch.setattr(predict, "start_engine", lambda *_: nullcontext(other))
    done = evaluate(run, request_of(engine="http://x", model="m"))
    assert done.settings.agreement and done.settings.agreement.equal == 0
    assert "0 of 3 " in done.notes[0] and "0 of 3 " in capfd.readouterr().err
    with pytest.raises(UserError, match=re.escape(str(other_evaluation(run) / "scores.json"))):
        evaluate(run, request_of())


def test_answers_at_the_limit_without_an_end_are_cut(run, parts, monkeypatch):
    answers = cycle([[7] * 6, [7] * 5 + [min(parts.prompter.ends)], [7]])
    other = Changed(parts.reference, lambda _: Completion("another", next(answers)))
    monkeypatch.setattr(predict, "start_engine", lambda *_: nullcontext(other))
    done = evaluate(run, request_of(engine="http://x", model="m"))
    rows = read_predictions(other_evaluation(run))
    assert [row.get("cut", False) for row in rows] == [True, False, False] * 2
    assert any("2 of 6 " in note and "--max-new-tokens" in note for note in done.notes)


def test_only_greedy_answers_that_mostly_agree_stand_for_the_references(run):
    settings = EvaluationTask(run, EvaluationRequest(adapter="none", limit=ROWS)).settings
    equal = Agreement(rows=4, equal=2)
    for_all = settings.model_copy(update={"engine": "vllm", "agreement": equal})
    assert for_all.stands_for(settings)
    for found in (None, Agreement(rows=4, equal=1)):
        other = for_all.model_copy(update={"agreement": found})
        assert other.stands_for(for_all) and not other.stands_for(settings)
    sampled = settings.decoding.model_copy(update={"do_sample": True})
    assert not for_all.model_copy(update={"decoding": sampled}).stands_for(settings)


@pytest.mark.parametrize("engine", ["vllm", "server"])
def test_an_evaluation_that_was_left_goes_on_and_a_server_is_compared_again(run, parts, monkeypatch, engine):
    request = request_of()
    request.engine, request.model = ("http://x", "m") if engine == "server" else (engine, None)
    changed = Changed(parts.reference, rows=3 + 2)
    monkeypatch.setattr(predict, "start_engine", lambda *_: nullcontext(changed))
    with pytest.raises(WorkFailed, match="2 of 6 "):
        evaluate(run, request)
    folder = other_evaluation(run)
    [part] = folder.glob("predictions.*.part.jsonl")
    assert sum("prediction" in orjson.loads(line) for line in part.read_bytes().splitlines()) == 2

    request.batch_size = 2  # how many requests at a time changes nothing
    changed.left = 100
    done = evaluate(run, request)
    assert 100 - changed.left == ROWS - 2 + (3 if engine == "server" else 0)
    assert done.settings.agreement and done.settings.agreement.equal == 3
    assert "3 of 3 " in done.notes[0]
    assert not part.exists()
    whole = evaluate(run, request_of())
    assert whole == done  # the same model on the same rows, whatever generated
    more = evaluate(run, request_of(metrics=["chrf", "bertscore:none"]))
    assert more.settings == done.settings and "chrf" in more.scores
