from collections.abc import Container, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import orjson
import pytest
from run_folders import a_tiny_run

from qlora_recipes.base.errors import WorkFailed
from qlora_recipes.runs.rundir import RunDir
from qlora_recipes.scores import agreement, predict
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
            [tokens] = self.reference.answers([prompt], 0)
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
    class Other:
        """Another model, and how often it was asked."""

        asked = 0

    def other(answer: Answer) -> Answer:
        Other.asked += 1
        return Answer("something else", None)

    engine = Changed(parts.reference, other)
    monkeypatch.setattr(predict, "require", lambda *_, **__: None)
    monkeypatch.setattr(predict, "started", lambda *_: nullcontext(engine))
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
    assert done.scores["notes"][0].startswith("generated by server (as it is), which was accepted though 3 of 3")
    assert [row["prediction"] for row in read_predictions(folder)] == ["something else"] * ROWS


def test_an_accepted_evaluation_does_not_stand_for_the_references(run: RunDir) -> None:
    settings = EvaluationTask(run, EvaluationRequest(adapter="none", limit=ROWS)).settings
    equal = agreement.Agreement(rows=3, differences=[], scores={})
    for_all = settings.model_copy(update={"engine": "vllm", "agreement": equal})
    assert for_all.stands_for(settings)
    for change in ({"agreement": None}, {"agreement": equal.model_copy(update={"accepted": True})}):
        other = for_all.model_copy(update=change)
        assert other.stands_for(for_all) and not other.stands_for(settings)
    sampled = settings.decoding.model_copy(update={"do_sample": True})
    assert not for_all.model_copy(update={"decoding": sampled}).stands_for(settings)


@pytest.mark.parametrize("engine", ["vllm", "server"])
def test_an_evaluation_that_was_left_goes_on_and_a_server_is_compared_again(
    run: RunDir, parts: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, engine: Any
) -> None:
    request = EvaluationRequest(adapter="none", max_new_tokens=6, limit=ROWS, judge="none", agreement_rows=3)
    if engine == "server":
        request.server, request.model = "http://x", "m"
    else:
        request.engine = engine
    changed = Changed(parts.reference, rows=3 + 2)
    monkeypatch.setattr(predict, "require", lambda *_, **__: None)
    monkeypatch.setattr(predict, "started", lambda *_: nullcontext(changed))
    with pytest.raises(WorkFailed, match="the server is gone"):
        evaluate(run, request)
    folder = run.path / "evaluations" / "base-model"
    part = folder / f"predictions.{engine}.part.jsonl"
    assert sum("prediction" in orjson.loads(line) for line in part.read_bytes().splitlines()) == 2

    request.batch_size = 2  # how many requests at a time changes nothing
    changed.left = 100
    done = evaluate(run, request)
    assert 100 - changed.left == ROWS - 2 + (3 if engine == "server" else 0)
    assert done.settings.agreement and done.settings.agreement.equal == 3
    assert done.scores["notes"] == [
        f"generated by {engine} (as it is); 3 of 3 answers are the reference's, and the others part at near-ties"
    ]
    assert not part.exists()
    whole = evaluate(run, EvaluationRequest(adapter="none", max_new_tokens=6, limit=ROWS, judge="none"))
    assert whole == done  # the same model on the same rows, whatever generated
    more = evaluate(
        run, EvaluationRequest(adapter="none", max_new_tokens=6, judge="none", limit=ROWS, metrics=["chrf"])
    )
    assert more.settings == done.settings and "chrf" in more.scores


WORDS = {0: "", 1: "Returns", 2: " and", 3: " the", 4: "\n\n", 5: "\n", 6: "bar", 7: "\ufffd", 8: "Garbage"}
END = 0


def parted(own: list[int], best: list[dict[int, float]], other: str | list[int]) -> Any:
    """The difference of an answer in tokens, or as a text, from the reference's."""

    def decode(tokens: list[int], skip_special_tokens: bool = False) -> str:
        return "".join(WORDS[token] for token in tokens).replace("\ufffd\ufffd", "é")

    prompter: Any = SimpleNamespace(tokenizer=SimpleNamespace(decode=decode), ends={END})
    answer = Answer(other, None) if isinstance(other, str) else Answer(decode(other).strip(), other)
    return agreement._difference(prompter, 0, Answer(decode(own).strip(), own), best, answer)


@pytest.mark.parametrize(
    ("own", "best", "other", "token", "near"),
    [
        ([1, END], [{1: -0.1}, {END: -0.1, 2: -0.2}], [1, END, 3], 2, False),  # does not stop
        ([1, END], [{1: -0.1}, {END: -0.1, 3: -0.2}], "Returns and then garbage", 2, False),
        ([END], [{END: -0.1, 1: -3.0}], "anything", 1, False),
        ([1, 2, END], [{1: -0.1}, {2: -0.6, END: -0.7}, {END: -0.1}], [1], 2, True),  # stops at a tie
        ([1, 2, END], [{1: -0.1}, {2: -0.1, END: -9.0}, {END: -0.1}], "Returns", 2, False),
        ([1, 3], [{1: -0.6, 5: -0.7}, {3: -0.1}], "Garbage", 1, False),  # a token that writes nothing
        ([1, 4, 6], [{1: -0.1}, {4: -0.6, 5: -0.7}, {6: -0.1}], "Returns\nbar", 2, True),  # a tie of line breaks
        ([7, 7, 2], [{7: -0.1}, {7: -0.1}, {2: -0.6, 3: -0.7}], "é the", 3, True),  # a character of two tokens
    ],
)
def test_where_answers_part(
    own: list[int], best: list[dict[int, float]], other: str | list[int], token: int, near: bool
) -> None:
    found = parted(own, best, other)
    assert (found.token, found.near_tie) == (token, near)
