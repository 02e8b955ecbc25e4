import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest
import torch
from run_folders import a_checkpoint, configure, other_evaluation, planned, rows_for
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qlora_recipes.base.errors import UserError, WorkFailed
from qlora_recipes.base.files import Row, sha256, write_rows
from qlora_recipes.commands.evaluate import evaluate_command
from qlora_recipes.config import substitution
from qlora_recipes.config.datafiles import DataFile
from qlora_recipes.data import studies
from qlora_recipes.data.studies import Decoding
from qlora_recipes.evaluate import evaluate, predict, transformers_engine
from qlora_recipes.evaluate.evaluate import EvaluationPlan, EvaluationRequest, resolve
from qlora_recipes.evaluate.evaluation_rows import sample_positions
from qlora_recipes.evaluate.prompter import Prompter
from qlora_recipes.evaluate.scores_file import ADAPTER, VERSION, Evaluation, RowShares, read_predictions, read_scores
from qlora_recipes.evaluate.settings import Completion, EvaluationSettings
from qlora_recipes.evaluate.transformers_engine import TransformersEngine, base_model
from qlora_recipes.metrics.metric import ScoreRecord, ScorerRecord
from qlora_recipes.results import card, listing
from qlora_recipes.results.run_result import RunResult
from qlora_recipes.run.rundir import RunDir
from qlora_recipes.training.run_record import FileState, Launch


def evaluated(run: RunDir, **more: Any) -> Evaluation:
    default = {"adapter": "none", "max_new_tokens": 8, "metrics": ["bertscore:none"]}
    return evaluate.evaluate_run(run, EvaluationRequest(**default | more))


def plan_of(run: RunDir, **more: Any) -> EvaluationPlan:
    """Plan of an evaluation of a run's base model."""
    return planned(run, **{"max_new_tokens": 8} | more)[0]


def prompter_of(run: RunDir, **settings: Any) -> Prompter:
    """The prompter of a run's base model, with some settings changed."""
    plan = plan_of(run)
    return Prompter(plan.settings.model_copy(update=settings), run.config, run.output)


def record(run: RunDir, **changes: Any) -> None:
    run.write(run.read().model_copy(update=changes))


@pytest.mark.parametrize(
    ("formats", "on_gpu", "dtype"),
    [
        ({"fp16": True, "bf16": False}, True, "float16"),  # the study's recipes
        ({"fp16": False, "bf16": True}, False, "bfloat16"),  # their rehearsal
        ({"fp16": True, "bf16": "auto"}, True, "float16"),
        ({}, True, "bfloat16"),
        ({"fp16": False}, False, "float32"),
    ],
)
def test_a_run_is_evaluated_in_the_precision_that_it_was_trained_in(run, formats, on_gpu, dtype):
    configure(run, **{"fp16": None, "bf16": None} | formats)
    record(run, provenance={"gpus": [{"name": "Tesla T4"}] if on_gpu else []})
    assert plan_of(run).settings.dtype == dtype


def test_a_prompt_does_not_depend_on_the_beginning_of_the_answer(run):
    jinja = "{% for message in messages %}{{ message['content'] }}{% endfor %}{{ eos_token }}"
    template = {"chat_template": "jinja", "chat_template_jinja": jinja}
    configure(run, datasets=[{"path": "x.jsonl", "type": "chat_template"} | template], test_datasets=None)
    answers = ("The end is 7", "7 is the end")
    chats = [[{"role": "user", "content": "Answer:"}, {"role": "assistant", "content": text}] for text in answers]
    rows = [{"messages": messages} for messages in chats]
    write_rows(run.path / "chats.jsonl", rows)
    plan = plan_of(run, data=run.path / "chats.jsonl")
    prompter = Prompter(plan.settings, run.config, run.output)
    prompter.tokenizer.add_tokens([":The"])  # as in Llama 3, whose vocabulary has it
    shared, apart = prompter.examples(rows_for(prompter, rows))
    assert shared.prompt == apart.prompt != []
    assert (shared.reference, apart.reference) == answers


def test_an_answer_without_text_keeps_its_tokens(run):
    call = "{{ message['content'] or message['tool_calls'][0]['function']['name'] }}"
    jinja = "{% for message in messages %}" + call + "{% endfor %}{{ eos_token }}"
    configure(run, datasets=[{"path": "x.jsonl", "type": "chat_template", "chat_template": "jinja",
                              "chat_template_jinja": jinja}], test_datasets=None)  # fmt: skip
    calls = [{"type": "function", "function": {"name": "search", "arguments": {}}}]
    answer = {"role": "assistant", "content": "", "tool_calls": calls}
    rows = [{"messages": [{"role": "user", "content": "Find it."}, answer]}]
    write_rows(run.path / "chats.jsonl", rows)
    plan = plan_of(run, data=run.path / "chats.jsonl")
    prompter = Prompter(plan.settings, run.config, run.output)
    (example,) = prompter.examples(rows_for(prompter, rows))
    assert example.reference == "search"
    assert prompter.tokenizer.decode(example.prompt + example.answer).endswith("search</s>")


@pytest.mark.parametrize(("rehearsal", "asked", "most"), [(False, None, 1024), (True, None, 96), (True, 200, 200)])
def test_a_rehearsal_ends_answers_early(run, rehearsal, asked, most):
    record(run, recipe="pissa-metamathqa/llama-2-7b-lora", variant_of=None, rehearsal=rehearsal)
    plan = plan_of(run, max_new_tokens=asked)
    assert plan.settings.decoding.max_new_tokens == most


def test_a_rehearsal_evaluates_another_decoding_as_results_look_it_up(run):
    record(run, recipe="loftq-gsm8k/llama-2-7b-qlora", variant_of=None, rehearsal=True)
    declared = studies.find("loftq-gsm8k").decodings["greedy"]
    plan = plan_of(run, max_new_tokens=None, decoding="greedy")
    assert plan.settings.decoding == declared


def test_an_interrupted_evaluation_goes_on_and_gives_the_same(run, monkeypatch):
    complete = evaluated(run, limit=10, batch_size=4)
    where = other_evaluation(run)
    expected = read_predictions(where)
    assert [row["row"] for row in expected] == sample_positions(complete.settings.total_rows, 10)
    (where / "scores.json").unlink()
    answers, calls = TransformersEngine.answers, []

    def interrupted(self: TransformersEngine, prompts: list[list[int]], *how: int) -> list[list[int]]:
        calls.append(len(prompts))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return answers(self, prompts, *how)

    monkeypatch.setattr(TransformersEngine, "answers", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluated(run, limit=10, batch_size=4)
    assert plan_of(run).folder == where != plan_of(run, max_new_tokens=9).folder
    [part_file] = where.glob("predictions.*.part.jsonl")
    with pytest.raises(UserError, match=part_file.name):
        evaluated(run, limit=2)  # would lose two of four predictions
    with part_file.open("ab") as part:
        broken = b'{"row": "x"}', b'{"row": 1, "prediction": "'
        part.write(b"\n".join([b"\0" * 4096, b"{}", b"[3]", *broken]))  # as killed processes leave
    again = evaluated(run, limit=10, batch_size=4)
    assert calls[0] == 4 and calls[1] == calls[2]
    assert calls[0] + sum(calls[2:]) == 10  # the first batch was not done twice
    assert read_predictions(where) == expected
    assert again.scores == complete.scores
    assert again.settings == complete.settings


def test_a_complete_evaluation_is_not_done_again_but_another_is(run, monkeypatch):
    evaluate.evaluate_run(run, EvaluationRequest(adapter="none", limit=5, max_new_tokens=9))
    first = evaluated(run, limit=3)
    assert len([*run.path.glob("evaluations/*/scores.json")]) == 2  # one of another decoding
    other = evaluated(run, limit=4)
    assert first.shares.rows == 3
    assert other.shares.rows == 4
    monkeypatch.setattr("qlora_recipes.evaluate.transformers_engine.TransformersEngine.__init__", None)
    with pytest.raises(UserError, match=r"scores\.json: .* 4 .* 2 "):
        evaluated(run, limit=2)
    assert evaluated(run, limit=4) == other
    assert evaluated(run, limit=4, batch_size=2) == other  # the same work, done another way
    (other.settings.folder(run.path) / "predictions.jsonl").write_bytes(b"")
    with pytest.raises(TypeError):  # predictions that are lost are made anew
        evaluated(run, limit=4)


@pytest.mark.parametrize(
    ("changes", "metrics", "reason"),
    [
        ({}, [], None),
        ({"version": 1}, [], "the scoring code has changed"),
        ({"limit": 2}, [], "another --limit"),
        ({"test_set": "test"}, [], "another test set"),
        ({}, ["chrf"], "metric chrf is new or has changed"),
        ({}, ["bertscore:some/model"], "another scorer model"),
        ({}, ["bertscore:none"], "no scorer model"),
        ({}, ["benchmark:mmlu"], "metric mmlu is new or has changed"),
    ],
)
def test_the_reason_to_score_again_is_named(run, changes, metrics, reason):
    record(run, recipe="haider2024/llama-2-7b", variant_of=None)
    plan = plan_of(run, limit=3, metrics=metrics)
    declared = {column.name: column.entry for column in plan_of(run, limit=3).columns.values()}
    settings = {key: value for key, value in changes.items() if key != "version"}
    scorer = ScorerRecord(model="roberta-large", layer=17, revision=None, hash="")
    former = Evaluation(
        created="",
        rehearsal=False,
        scores={
            name: ScoreRecord(value=1.0, declaration=declaration, scorer=scorer if name == "bertscore_f1" else None)
            for name, declaration in declared.items()
        },
        shares=RowShares(rows=3),
        version=changes.get("version", VERSION),
        settings=plan.settings.model_copy(update=settings),
        files={},
        data=[],
    )
    assert evaluate.outdated(former, plan) == reason


def test_the_runs_predictions_move_to_their_folder_unless_they_are_stale(run, tiny):
    save_adapter(tiny, run.output)
    request = {"adapter": None, "limit": 2, "max_new_tokens": 4}
    first = evaluated(run, **request)
    second = evaluated(run, **request | {"max_new_tokens": 5})
    assert read_scores(run.path) == second
    (folder,) = run.path.glob("evaluations/*")
    assert read_scores(folder) == first and len(read_predictions(folder)) == 2
    changes = second.model_copy(update={"files": {"adapter": second.files["predictions"]}})  # of another adapter
    (run.path / "scores.json").write_text(changes.model_dump_json())
    assert evaluated(run, **request | {"max_new_tokens": 6}).settings.decoding.max_new_tokens == 6
    assert [*run.path.glob("evaluations/*")] == [folder]


def test_predictions_do_not_replace_those_of_more_rows(run, tiny):
    save_adapter(tiny, run.output)
    for limit, most in ((3, 4), (2, 5), (2, 4), (2, 5)):
        evaluated(run, adapter=None, limit=limit, max_new_tokens=most)
    assert {len(read_predictions(folder)) for folder in run.path.glob("evaluations/*")} == {2, 3}


@pytest.fixture
def reference(run: RunDir) -> Callable[..., TransformersEngine]:
    """A maker of references for the run's base model, in fp32."""
    return lambda **settings: TransformersEngine(prompter_of(run, **settings))


@pytest.fixture
def rows(sample: Path) -> list[dict[str, Any]]:
    return [orjson.loads(line) for line in (sample / "test.jsonl").read_bytes().splitlines()]


def generated(reference: TransformersEngine, rows: list[dict[str, Any]]) -> list[Completion]:
    """A prediction for each row."""
    done: dict[int, Completion] = {}
    examples = reference.prompter.examples(rows_for(reference.prompter, rows))
    for answers in reference.generate([example.prompt for example in examples], done):
        done |= answers
    return [done[i] for i in range(len(rows))]


def test_batched_predictions_are_those_of_one_row_at_a_time(reference, rows):
    single = generated(reference(batch_size=1), rows)
    assert generated(reference(batch_size=16), rows) == single


@pytest.mark.parametrize("attention", ["sdpa", "flash_attention_2"])
def test_merged_weights_compute_in_fp32_and_stay_in_16_bits(reference, tiny, monkeypatch, attention):
    def loaded(*how: Any) -> Any:
        model = base_model(*how)
        model.config._attn_implementation = attention
        return model

    merged = reference()
    monkeypatch.setattr(transformers_engine, "base_model", loaded)
    merged.merge()
    logits = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)(torch.tensor([[1, 50, 60, 70]])).logits
    for _ in range(2):
        probabilities = merged.log_probabilities([1, 50], [60, 70, 80])
        assert torch.equal(probabilities, logits[0, 1:].double().log_softmax(-1))
    assert {weight.dtype for weight in merged.model.parameters()} == {torch.bfloat16}


def test_a_batch_that_does_not_fit_is_done_in_halves(reference, rows, monkeypatch):
    small, fits, sizes = reference(batch_size=7), 2, []
    expected = generated(small, rows[:7])
    answers = TransformersEngine.answers

    def with_little_memory(self: TransformersEngine, prompts: list[list[int]], *how: int) -> list[list[int]]:
        sizes.append(len(prompts))
        if len(prompts) > fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return answers(self, prompts, *how)

    monkeypatch.setattr(TransformersEngine, "answers", with_little_memory)
    assert generated(small, rows[:7]) == expected
    assert max(sizes) > fits and sum(size for size in sizes if size <= fits) == 7
    fits = 0
    with pytest.raises(WorkFailed, match=r"1 x \d+ tokens.* GPU"):
        generated(small, rows[:7])
    small.settings.decoding.do_sample = True  # halves would give other answers
    with pytest.raises(WorkFailed, match=r"5 x \d+ tokens.* GPU"):
        generated(small, rows[:7])


@pytest.mark.parametrize(
    ("changes", "in_4_bits", "in_8_bits"),
    [
        ({}, 0, 0),  # dequantized, as its layers compute in the model's dtype
        ({"bnb_config_kwargs": {"bnb_4bit_compute_dtype": "float16"}}, 14, 0),
        ({"adapter": "lora", "load_in_4bit": None, "bnb_config_kwargs": None, "load_in_8bit": True}, 0, 14),
        ({"attn_implementation": "fp8"}, 0, 0),  # Axolotl's own, which transformers lacks
    ],
)
def test_layers_are_quantized_as_in_training_or_dequantized_where_that_gives_the_same(
    run, changes, in_4_bits, in_8_bits
):
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    configure(run, **changes)
    layers = [*TransformersEngine(prompter_of(run)).model.modules()]
    assert sum(isinstance(layer, Linear4bit) for layer in layers) == in_4_bits
    assert sum(isinstance(layer, Linear8bitLt) for layer in layers) == in_8_bits


@pytest.fixture
def scored(run: RunDir, sample: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """The same run with an adapter, evaluated on two rows of a file of its own; what it generates is made up."""

    def predicted(settings: EvaluationSettings, test: Any, *_: Any) -> tuple[list[Row], EvaluationSettings]:
        return [
            {"row": i, "reference": "a b c d", "prediction": "a b"} for i in [row.position for row in test.rows]
        ], settings

    monkeypatch.setattr(evaluate, "predict", predicted)
    a_checkpoint(run.path, 1).joinpath(ADAPTER).rename(adapter := run.output / ADAPTER)
    shutil.copy(sample / "test.jsonl", data := run.path / "test.jsonl")
    configure(run, test_datasets=[{"path": str(data), "type": "alpaca"}])
    files = [DataFile(path=str(data), sha256=sha256(data), bytes=0)]
    record(run, test_data=str(data), adapter=FileState.of(adapter), data=files)
    evaluated(run, adapter=None, limit=2)
    return run


def listed(run: RunDir) -> tuple[str | None, bool]:
    """Note of a list on a run's evaluation, and whether it has a score."""
    row = listing.record(RunResult(run, run.read()))
    return row["evaluation"], row["bleu4"] is not None


def scored_again(run: RunDir) -> Evaluation:
    evaluation = evaluated(run, adapter=None, limit=2)
    assert listed(run) == (None, True)
    return evaluation


def test_times_alone_make_no_evaluation_another(scored):
    before = read_scores(scored.path)
    later = "2999-01-01T00:00:00+00:00"
    record(scored, launches=[Launch(command=[], started=later, ended=later)])
    assert listed(scored) == (None, True)
    for file in (scored.output / ADAPTER, scored.path / "test.jsonl", scored.path / "predictions.jsonl"):
        os.utime(file, (1, 1))  # as a copy's
    assert listed(scored) == (None, True)
    after = scored_again(scored)
    assert before and (after.created, after.scores) == (before.created, before.scores)


def test_edited_predictions_are_not_scored_as_the_adapters(scored):
    file = scored.path / "predictions.jsonl"
    before = file.read_bytes()
    file.write_bytes(before.replace(b'"a b"', b'"a b c d"'))
    assert listed(scored) == ("edited", False)
    with pytest.raises(UserError):
        scored_again(scored)
    file.write_bytes(before)
    scored_again(scored)


@pytest.mark.parametrize("moved", [0, 1])
def test_after_a_kill_while_new_scores_move_into_place_the_same_command_finishes(scored, monkeypatch, moved):
    """Scores in two files, of which a kill lets `moved` into place."""
    folder, replace, files = scored.path, Path.replace, {file.name for file in scored.path.iterdir()}
    names = iter(["predictions.jsonl"][:moved])

    def killed(part: Path, file: Path) -> Path:
        return replace(part, file) if next(names, None) == file.name else file

    request = {"adapter": None, "limit": 2, "metrics": ["bertscore:none", "chrf"]}
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        evaluated(scored, **request)
    assert len([*folder.glob(".*.part")]) == 2 - moved
    if moved:
        predict.part_file(folder, read_scores(folder).settings).touch()
    assert "chrf" in evaluated(scored, **request).scores
    assert {file.name for file in folder.iterdir()} == files
    assert listed(scored) == (None, True)


def test_a_replaced_adapter_is_not_scored_as_the_runs(scored):
    save_file({"other": torch.ones(1)}, scored.output / ADAPTER)
    assert listed(scored) == ("stale", False)
    with pytest.raises(UserError):
        scored_again(scored)
    by_name = evaluated(scored, adapter=str(scored.output), limit=2)
    assert by_name.settings.adapter_sha256 == sha256(scored.output / ADAPTER)


def test_an_evaluation_of_rows_that_changed_since_is_stale(scored, monkeypatch):
    data, predict = scored.path / "test.jsonl", evaluate.predict
    data.write_bytes(data.read_bytes() * 2)
    assert listed(scored) == ("stale", False)
    scored_again(scored)

    def meanwhile(*words: Any) -> Any:
        data.write_bytes(data.read_bytes() * 2)
        return predict(*words)

    monkeypatch.setattr(evaluate, "predict", meanwhile)
    evaluated(scored, adapter=None, limit=3)
    assert listed(scored) == ("stale", False)


def test_a_larger_limit_goes_on_with_the_predictions_of_a_smaller_one(run, monkeypatch):
    answers, asked = TransformersEngine.answers, []

    def interrupted(self: TransformersEngine, prompts: list[list[int]], *how: int) -> list[list[int]]:
        if len(asked) == 2:
            asked.append(prompts)
            raise KeyboardInterrupt
        asked.extend(prompts)
        return answers(self, prompts, *how)

    monkeypatch.setattr(TransformersEngine, "answers", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluated(run, limit=4, batch_size=1)
    asked.clear()
    asked += [[], [], []]
    more = evaluated(run, limit=9, batch_size=1)
    assert len(asked) - 3 == 9 - 2
    rows = read_predictions(other_evaluation(run))
    assert [row["row"] for row in rows] == sample_positions(more.settings.total_rows, 9)


def test_every_output_of_scores_of_a_part_says_so(scored, recipe):
    predictions = scored.path / "predictions.jsonl"
    part = f"2 of {len(predictions.with_name('test.jsonl').read_bytes().splitlines())} rows"
    commands = {
        "evaluate": ("evaluate", scored.path, "--limit", "2", "--max-new-tokens", "8", "--metric", "bertscore:none"),
        "results": ("results", scored.path),
        "compare": ("results", scored.path, predictions),
        "score": ("score", predictions),
    }
    done = {command: recipe.ok(*words) for command, words in commands.items()}
    assert {command: part in f"{said.stdout}{said.stderr}" for command, said in done.items()} == dict.fromkeys(
        commands, True
    )


def test_scored_rows_that_are_training_rows_are_named(scored, recipe, tmp_path):
    rows = [orjson.loads(line) for line in (scored.path / "test.jsonl").read_bytes().splitlines()]
    first, last = sample_positions(len(rows), 2)
    copied = {name: rows[last].get(name) for name in ("instruction", "input", "output")}  # without idx
    write_rows(train := tmp_path / "train.jsonl", [{"instruction": "other", "output": "b"}, copied, rows[first]])
    configure(scored, datasets=[{"path": str(train), "type": "alpaca", "split": "train[:2]"}])
    files = [DataFile(path=str(file), sha256=sha256(file), bytes=0) for file in (train, scored.path / "test.jsonl")]
    record(scored, data=files)
    (scored.path / "scores.json").unlink()
    evaluation = evaluated(scored, adapter=None, limit=2)
    note = "2 of 26 rows; 1 also in the training data"
    assert evaluation.also_trained == [last]
    assert evaluation.notes == [note, "rows: 2 are too few to compare scores"]
    assert note in recipe.ok("results", scored.path).stdout
    assert recipe.json("results", scored.path)[0]["rows_also_trained"] == [last]
    assert note in card.card(RunResult(scored, scored.read()), False, None)
    assert note in recipe.ok("publish", scored.path).stderr
    train.write_bytes(train.read_bytes() * 2)  # no longer what was trained on
    (scored.path / "scores.json").unlink()
    assert evaluated(scored, adapter=None, limit=2).also_trained is None


def test_other_rows_are_evaluated_beside_the_usual_ones(run, sample, tmp_path):
    default = evaluated(run, limit=3)
    few = tmp_path / "few.jsonl"
    few.write_bytes(b"".join((sample / "valid.jsonl").read_bytes().splitlines(keepends=True)[:2]))
    other = evaluated(run, data=few)
    assert plan_of(run, data=few).folder not in (run.path, plan_of(run).folder)
    assert default.shares.rows == 3
    assert other.shares.rows == 2
    assert evaluated(run, limit=3) == default


def test_an_evaluation_notes_that_the_recipe_has_changed(run, capsys):
    record(run, recipe_sha256="of another file")
    evaluated(run, limit=1)
    assert capsys.readouterr().err.splitlines()[0] == (
        "x is missing or has changed since the run began; the run keeps its own config"
    )


@pytest.mark.parametrize("state", ["interrupted", "queued"])
def test_a_run_without_an_adapter_is_said_what_to_do_about(run, state):
    record(run, state=state)
    with pytest.raises(UserError, match=rf"adapter_model\.safetensors.*{state}"):
        resolve(run, EvaluationRequest())


def test_a_judge_that_is_not_there_is_told_before_anything_is_generated(run):
    with pytest.raises(WorkFailed, match="some/nowhere"):
        evaluate.evaluate_run(run, EvaluationRequest(adapter="none", metrics=["bertscore:some/nowhere"]))
    assert not list(run.path.rglob("predictions*"))


def test_scoring_anew_leaves_no_score_of_another_judge(run, monkeypatch):
    from bert_score import utils as bert_score_utils

    judge = substitution.scorer_folder()
    request = EvaluationRequest(adapter="none", max_new_tokens=8, limit=3, metrics=[f"bertscore:{judge}"])
    monkeypatch.setitem(bert_score_utils.model2layers, judge.name, 6)
    first = evaluate.evaluate_run(run, request)
    scorer = first.scores["bertscore_f1"].scorer
    assert scorer and scorer.model == "model"
    where = other_evaluation(run)
    by_row = [row["bertscore_f1"] for row in read_predictions(where)]
    (where / "predictions.other.part.jsonl").write_text("answers of another evaluation")
    request.metrics = ["chrf"]  # the default scorer model is not here
    more = evaluate.evaluate_run(run, request)
    assert more.scores == first.scores | {"chrf": more.scores["chrf"]}
    assert [row["bertscore_f1"] for row in read_predictions(where)] == by_row
    assert (where / "predictions.other.part.jsonl").exists()
    request.metrics = []
    assert evaluate.evaluate_run(run, request) == more
    without = evaluated(run, limit=3)
    assert "bertscore_f1" not in without.scores
    assert not any("bertscore_f1" in row for row in read_predictions(other_evaluation(run)))
    record(run, recipe="mine")  # of no study
    for layer, parameter in ((2, ", layer: 2"), (6, "")):
        metrics = [f"bertscore_f1: {{model: {judge}{parameter}}}"]
        evaluation = evaluated(run, limit=3, metrics=metrics)
        scorer = evaluation.scores["bertscore_f1"].scorer
        assert scorer and scorer.layer == layer


def test_decoding_is_the_studys_and_not_the_models_own(run, tiny):
    from transformers import GenerationConfig

    GenerationConfig(do_sample=True, temperature=5.0, max_new_tokens=3, eos_token_id=[7, 8]).save_pretrained(tiny)
    configure(run, eot_tokens=["<s>"])
    try:
        used = TransformersEngine(prompter_of(run)).decoding()
    finally:
        (tiny / "generation_config.json").unlink()
    assert used.do_sample is False
    assert used.temperature is None
    assert used.max_new_tokens == 8
    assert used.eos_token_id == [1, 2, 7, 8]  # those of the training, the tokenizer's too, and the model's


def test_the_model_is_configured_as_in_training(run):
    def logits() -> torch.Tensor:
        with torch.inference_mode():
            model = base_model(prompter_of(run), torch.float32, None)
            computed: torch.Tensor = model(torch.arange(5, 205)[None]).logits
        return computed

    before = logits()
    stretched = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    configure(run, overrides_of_model_config={"rope_parameters": stretched})
    assert not torch.allclose(logits(), before, atol=1e-3)


def save_adapter(model: Path, folder: Path) -> None:
    """Save an adapter for a model that changes its answers."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(model), lora).save_pretrained(folder)


def test_an_adapter_that_does_not_apply_is_refused(reference, tiny, tmp_path):
    save_adapter(tiny, tmp_path / "adapter")
    settings = {"adapter": str(tmp_path / "adapter"), "adapter_sha256": "x"}
    reference(**settings)
    file = tmp_path / "adapter" / ADAPTER
    trained = load_file(file)
    renamed = {name.replace("layers.1.self_attn", "layers.1.attention"): part for name, part in trained.items()}
    without_one = {name: part for name, part in trained.items() if "layers.1.self_attn.v_proj" not in name}
    untrained = {name: part * ("lora_A" in name) for name, part in trained.items()}
    for damaged in (renamed, without_one, untrained):
        save_file(damaged, file)
        with pytest.raises(UserError):
            reference(**settings)


def test_sampled_predictions_depend_on_the_seed_and_not_on_the_batches_before(reference):
    sampling = reference(decoding=Decoding(max_new_tokens=8, do_sample=True, seed=1))
    first, second = (sampling.answers([[1, 50, 60]], number) for number in (0, 1))
    assert sampling.answers([[1, 50, 60]], 0) == first != second


def test_a_prompt_longer_than_the_trainings_rows_stays_whole(run):
    configure(run, sequence_len=64)
    patch = "+".join(f"line {i}" for i in range(40))
    prompter = prompter_of(run)
    (example,) = prompter.examples(rows_for(prompter, [{"instruction": "Review.", "input": patch, "output": "Fine."}]))
    assert len(example.prompt) > 64
    assert patch in prompter.tokenizer.decode(example.prompt)


def test_answers_as_long_as_the_context_are_refused(run):
    prompter = prompter_of(run, decoding=Decoding(max_new_tokens=4096))
    with pytest.raises(UserError):
        prompter.examples(rows_for(prompter, [{"instruction": "Review.", "output": "Fine."}]))


def test_a_run_whose_rows_have_no_answers_needs_none_for_benchmarks_alone(run):
    configure(run, datasets=[{"path": "x.jsonl", "type": "completion"}], test_datasets=None)
    plan = plan_of(run, metrics=["benchmark:mmlu"], limit=7)
    assert [*plan.columns] == ["mmlu"]
    assert plan.settings.rows == 0
    assert plan.settings.limit == 7
    for metrics in ([], ["bleu4", "benchmark:mmlu"]):
        with pytest.raises(UserError):
            plan_of(run, metrics=metrics)


def test_bad_test_data_is_told_before_a_model_is_loaded(run, tmp_path):
    (tmp_path / "x.jsonl").write_text('{"instruction": "a"}\n')
    with pytest.raises(UserError, match=r"x\.jsonl:1: .*output"):
        evaluated(run, data=tmp_path / "x.jsonl")
    assert not (run.path / "evaluations").exists()


def test_the_base_model_is_scored_beside_the_adapter(run, tiny, capsys):
    save_adapter(tiny, run.output)
    evaluate_command(run=str(run.path), limit=2, max_new_tokens=4, metric=["bertscore:none"], base=True, force=[])
    heading, *scores = capsys.readouterr().out.splitlines()
    assert heading.split() == ["score", "adapter", "base"] and scores[0].split() == ["rows", "2", "2"]
    assert read_scores(run.path) and read_scores(other_evaluation(run))
    with pytest.raises(UserError, match="--base"):  # the server has one model
        evaluate_command(
            run=str(run.path), base=True, engine="http://localhost:1", model="adapter", metric=[], force=[]
        )
