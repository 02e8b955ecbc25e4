"""Evaluation rows of own data of every type, compared with what Axolotl itself does with them."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pytest
from run_folders import a_tiny_run, other_evaluation, planned

from qlora_recipes.base import yamlfiles
from qlora_recipes.base.errors import UserError
from qlora_recipes.base.files import sha256, write_rows
from qlora_recipes.base.yamlfiles import Config
from qlora_recipes.config import datafiles
from qlora_recipes.evaluate import evaluate, evaluation_rows
from qlora_recipes.evaluate.evaluate import EvaluationPlan, EvaluationRequest, is_complete, resolve
from qlora_recipes.evaluate.evaluation_rows import EvaluationRow, sample_positions
from qlora_recipes.evaluate.scores_file import changed, read_predictions, read_scores
from qlora_recipes.results.reports.report_runs import reader, reported_runs
from qlora_recipes.run.rundir import RunDir

OwnRun = Callable[..., RunDir]
BASE = EvaluationRequest(adapter="none", max_new_tokens=4, metrics=["bertscore:none"])


@pytest.fixture
def own_run(place: Path, tiny: Path, tiny_profile: Path) -> OwnRun:
    """A maker of finished runs of an own task, in a folder with own files, as far as their base model needs one."""

    def make(rehearsal: bool = False, **changes: Any) -> RunDir:
        folder = a_tiny_run(place / "runs" / "mine", tiny, tiny_profile, place)
        cfg = folder.config | {"sequence_len": 256, "evals_per_epoch": None, "eval_steps": 5}
        cfg |= {"dataset_prepared_path": str(place / "prepared"), "test_datasets": None} | changes
        if not cfg.get("test_datasets") and not cfg.get("val_set_size"):
            cfg["eval_steps"] = None
        cfg = {key: value for key, value in cfg.items() if value is not None}
        folder.config_file.write_text(yamlfiles.write_yaml(cfg))
        del folder.config  # read again
        data = [] if "pretraining_dataset" in cfg else datafiles.record(cfg)
        here = {"recipe": "mine", "cwd": str(place), "test_data": datafiles.test_file(cfg), "data": data}
        folder.write(folder.read().model_copy(update=here | {"rehearsal": rehearsal}))
        return folder

    return make


def plan_of(run: RunDir, **more: Any) -> EvaluationPlan:
    return planned(run, **more)[0]


def alpaca(count: int) -> list[dict[str, Any]]:
    return [{"instruction": f"Add {i} and {i}.", "output": f"{i} and {i} is {2 * i}."} for i in range(count)]


def asked(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [{"question": f"Double {i}?", "answer": f" {2 * i}, I say."} for i in range(start, start + count)]


def chats(count: int, turns: int = 1, role: str = "role", text: str = "content", who: str = "assistant") -> Any:
    return [
        [
            {role: said_by, text: f"{said} {turn} of chat {i}."}
            for turn in range(turns)
            for said_by, said in (("user", "Question"), (who, "Answer"))
        ]
        for i in range(count)
    ]


USER_DEFINED = {"field_instruction": "question", "field_output": "answer", "format": "Q: {instruction}\nA: "} | {
    "no_input_format": "Q: {instruction}\nA: "
}
CHATML = {"type": "chat_template", "chat_template": "chatml"}
SEGMENTS = [
    {"segments": [{"label": False, "text": f"<s>Q{i} and"}, {"label": True, "text": "so"},
                  {"label": False, "text": "\nA: "}, {"label": True, "text": f"A{i}</s>"}]}
    for i in range(3)
]  # fmt: skip
TYPES: dict[str, tuple[Config, list[dict[str, Any]], list[str]]] = {
    "alpaca": ({"type": "alpaca"}, alpaca(2), ["0 and 0 is 0.", "1 and 1 is 2."]),
    "alpaca with other names": ({"type": "alpaca_chat.load_qa"}, asked(2), [" 0, I say.", " 2, I say."]),
    "user-defined": ({"type": USER_DEFINED}, asked(2), [" 0, I say.", " 2, I say."]),
    "messages": (CHATML, [{"messages": chat} for chat in chats(2)], ["Answer 0 of chat 0.", "Answer 0 of chat 1."]),
    "messages as JSON text": (
        CHATML,
        [{"messages": orjson.dumps(chat).decode()} for chat in chats(2)],
        ["Answer 0 of chat 0.", "Answer 0 of chat 1."],
    ),
    "messages of several turns": (CHATML, [{"messages": chat} for chat in chats(1, 3)], ["Answer 2 of chat 0."]),
    "loss on the first answer alone": (
        CHATML | {"roles_to_train": ["user"], "train_on_eos": "all"},
        [{"messages": chat} for chat in chats(1, 2)],
        ["Answer 1 of chat 0."],
    ),
    "conversations": (
        CHATML | {"field_messages": "conversations", "message_property_mappings": {"role": "from", "content": "value"}},
        [{"conversations": chat} for chat in chats(1, 2, "from", "value", "gpt")],
        ["Answer 1 of chat 0."],
    ),
    "input_output": ({"type": "input_output"}, SEGMENTS, ["A0", "A1", "A2"]),
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "on_inputs"),
    [*((kind, False) for kind in TYPES), *((kind, True) for kind in ("alpaca", "messages", "input_output"))],
)
def test_prompts_and_references_of_own_rows_are_what_was_trained(own_run, tmp_path, kind, on_inputs):
    from axolotl.common.datasets import load_datasets

    from qlora_recipes.training.tokens import Tokenizer

    form, rows, references = TYPES[kind]
    write_rows(tmp_path / "train.jsonl", rows)
    run = own_run(datasets=[{"path": "train.jsonl", **form}], train_on_inputs=on_inputs)
    prompter, examples = examples_of(run, *planned(run, data=tmp_path / "train.jsonl"))
    assert [example.reference for example in examples] == references
    trained = load_datasets(cfg=Tokenizer(run.config).cfg).train_dataset
    left = [list(ids) for ids in trained["input_ids"]]  # in an order of their own
    for example in sorted(examples, key=lambda one: -len(one.prompt)):
        (ids,) = (ids for ids in left if ids[: len(example.prompt)] == example.prompt)
        left.remove(ids)
        answer = prompter.tokenizer.decode(ids[len(example.prompt) :])
        assert answer.strip().startswith(example.reference.strip()) and answer.count("</s>") <= 1
    assert left == []


def test_own_rows_are_evaluated_and_recognised_without_axolotl(own_run, tmp_path, monkeypatch, recipe):
    write_rows(tmp_path / "train.jsonl", alpaca(4))
    write_rows(tmp_path / "check.jsonl", [{"messages": chat} for chat in chats(5)])
    test = {"path": "check.jsonl", "split": "train[:3]", **CHATML}  # of another type than the training data
    run = own_run(datasets=[{"path": "train.jsonl", "type": "alpaca"}], test_datasets=[test])
    first = evaluate.evaluate_run(run, BASE)
    assert first.settings.data == first.settings.data_name == "check.jsonl, split train[:3]"
    assert first.settings.rows == 3
    assert first.settings.limit is None
    assert first.settings.test_set is None
    where = other_evaluation(run)
    assert [row["reference"] for row in read_predictions(where)] == [f"Answer 0 of chat {i}." for i in range(3)]

    monkeypatch.setattr(evaluate, "importing_axolotl", None)
    monkeypatch.setattr(evaluation_rows, "importing_axolotl", None)
    assert evaluate.evaluate_run(run, BASE) == first
    write_rows(tmp_path / "check.jsonl", [{"messages": chat} for chat in chats(3)])
    assert evaluate.evaluate_run(run, BASE) == first  # the rows that the split takes are the same
    write_rows(tmp_path / "check.jsonl", [{"messages": chat} for chat in chats(2)])
    with pytest.raises(TypeError):
        evaluate.evaluate_run(run, BASE)
    assert read_scores(where) == first  # of the former rows


@pytest.mark.parametrize("split", [None, "train[:3]"])
def test_whether_an_evaluation_is_complete_is_known_without_reading_rows(own_run, tmp_path, monkeypatch, split):
    write_rows(tmp_path / "train.jsonl", alpaca(4))
    write_rows(tmp_path / "check.jsonl", alpaca(5))
    entry = {"type": "alpaca"} | ({"split": split} if split else {})
    test_datasets = [{"path": "check.jsonl"} | entry]
    run = own_run(datasets=[{"path": "train.jsonl", "type": "alpaca"}], test_datasets=test_datasets)
    files = {*run.path.rglob("*")}
    assert not is_complete(resolve(run, BASE))
    assert {*run.path.rglob("*")} == files
    evaluate.evaluate_run(run, BASE)
    with monkeypatch.context() as patch:
        patch.setattr(evaluation_rows, "read_rows", None)
        assert is_complete(resolve(run, BASE))
        assert not is_complete(resolve(run, replace(BASE, metrics=["bertscore:none", "rouge_l"])))
        assert not is_complete(resolve(run, replace(BASE, max_new_tokens=5)))
        assert not is_complete(resolve(run, replace(BASE, limit=2)))
    write_rows(tmp_path / "check.jsonl", alpaca(2))
    assert not is_complete(resolve(run, BASE))


def test_results_and_reports_take_own_rows(own_run, tmp_path, recipe):
    write_rows(tmp_path / "train.jsonl", asked(4))
    write_rows(tmp_path / "check.jsonl", asked(3, 50))
    entry = {"type": USER_DEFINED}
    run = own_run(datasets=[{"path": "train.jsonl"} | entry], test_datasets=[{"path": "check.jsonl"} | entry])
    evaluation = evaluate.evaluate_run(run, BASE)
    assert evaluation.settings.data_name == "check.jsonl"
    assert evaluation.settings.data_sha256 == sha256(tmp_path / "check.jsonl")
    for file in ("predictions.jsonl", "scores.json"):  # as if they were the adapter's
        shutil.copy(other_evaluation(run) / file, run.path)
    (row,) = recipe.json("results")
    assert row["rows_evaluated"] == 3
    assert row["test_set"] is None
    assert row["exact_match_published"] is None
    (shown,) = reader(reported_runs([run]))
    assert len(shown["prompt"]) == 3


@pytest.mark.parametrize("tests", [1, 2])
def test_scores_of_own_rows_that_were_replaced_are_stale_in_a_rehearsal_too(own_run, tmp_path, tests):
    write_rows(tmp_path / "train.jsonl", alpaca(30))
    entry = {"type": "alpaca", "split": "train[:8]"}  # as a rehearsal limits rows
    files = [tmp_path / f"ev{i}.jsonl" for i in range(tests)]
    for file in files:
        write_rows(file, asked_alpaca := [{"instruction": f"Say {i}.", "output": f"{i}!"} for i in range(50, 70)])
    test_datasets = [{"path": file.name, **entry} for file in files]
    run = own_run(rehearsal=True, datasets=[{"path": "train.jsonl", **entry}], test_datasets=test_datasets)
    evaluation = evaluate.evaluate_run(run, BASE)
    where = other_evaluation(run)
    assert changed(where, evaluation) is None
    write_rows(files[-1], [*asked_alpaca[:8], *alpaca(3)])  # the same first rows
    assert changed(where, evaluation) is None and evaluate.evaluate_run(run, BASE) == evaluation
    shutil.copy(tmp_path / "train.jsonl", files[-1])
    assert changed(where, evaluation) == "stale"
    files[-1].write_text("not JSON\n")
    assert changed(where, evaluation) == "stale"


def test_what_the_config_names_wins_over_a_test_file_that_happens_to_lie_there(own_run, tmp_path):
    for name, count in (("train", 4), ("test", 2), ("check", 3)):
        write_rows(tmp_path / f"{name}.jsonl", alpaca(count))
    entry = {"path": "train.jsonl", "type": "alpaca"}
    configured = own_run(datasets=[entry], test_datasets=[{"path": "check.jsonl", "type": "alpaca"}])
    assert plan_of(configured).settings.data == str(tmp_path / "check.jsonl")
    shutil.rmtree(configured.path)
    assert plan_of(own_run(datasets=[entry])).settings.data == str(tmp_path / "test.jsonl")


def test_a_studys_data_is_evaluated_on_its_test_set_whatever_the_config_evaluates(own_run, sample):
    train, valid = ([{"path": str(sample / f"{name}.jsonl"), "type": "alpaca"}] for name in ("train", "valid"))
    assert plan_of(own_run(datasets=train, test_datasets=valid)).settings.data == str(sample / "test.jsonl")


def test_a_limit_takes_rows_from_all_of_the_data_and_a_larger_one_contains_them():
    all_positions = sample_positions(22_000, None)
    few, more = (sample_positions(22_000, limit) for limit in (100, 1_000))
    assert all_positions == [*range(22_000)] and [*map(len, (few, more))] == [100, 1_000]
    assert {*few} < {*more} < {*all_positions} and more == sorted(more)
    tenths = [sum(position // 2_200 == tenth for position in more) for tenth in range(10)]
    assert min(tenths) > 70 and max(tenths) < 130, tenths
    assert sample_positions(5, 9) == [*range(5)] and sample_positions(9, 0) == []


def test_a_rehearsal_takes_few_of_its_own_rows(own_run, tmp_path):
    for name in ("train", "check"):
        write_rows(tmp_path / f"{name}.jsonl", alpaca(30))
    data = {"path": "train.jsonl", "type": "alpaca", "split": "train[:20]"}
    run = own_run(rehearsal=True, datasets=[data], test_datasets=[{**data, "path": "check.jsonl"}])
    assert plan_of(run).settings.rows == 12
    assert plan_of(run).settings.limit == 12
    rows = alpaca(20)
    assert [row.content for row in planned(run)[1]] == [rows[i] for i in sample_positions(20, 12)]
    assert plan_of(run, limit=30).settings.rows == 20
    assert plan_of(run, limit=30).settings.limit is None


def outputs(rows: Any, tokenizer: Any) -> set[str]:
    """The numbers of rows that were tokenized, each of which is in its text alone."""
    return {word for ids in rows["input_ids"] for word in tokenizer.decode(ids).split() if word.startswith("row")}


HELD_OUT: dict[str, Config] = {
    "share": {},
    "number": {"val_set_size": 7},
    "packed": {"sample_packing": True, "eval_sample_packing": False, "attn_implementation": "sdpa"},
    "without duplicates": {"dataset_exact_deduplication": True},
    "not shuffled": {"shuffle_merged_datasets": False},
    "each shuffled first": {"shuffle_before_merging_datasets": True, "seed": 7},
    "cut": {"excess_length_strategy": "truncate"},
    "loss on all": {"train_on_inputs": True},
}
ALONE = "share", "number"  # of one data set, the others of two
FAST = *ALONE, "packed", "without duplicates"
LONG = [pytest.param(how, marks=pytest.mark.long) for how in HELD_OUT if how not in FAST]


def write_numbered_rows(folder: Path, duplicates: bool) -> None:
    """Write train.jsonl and chats.jsonl, with a number in each row."""
    rows = [{"instruction": f"Say row{i} please.", "output": f"Here: row{i} now."} for i in range(40)]
    rows[3]["output"] += " and more" * 300  # longer than sequence_len
    if duplicates:
        rows += rows[10:20]
    write_rows(folder / "train.jsonl", rows)
    chats = []
    for i in range(100, 130):
        answer = {"role": "assistant", "content": f"Here: row{i} now."}
        chats.append({"messages": [{"role": "user", "content": f"Say row{i} ."}, answer]})
    write_rows(folder / "chats.jsonl", chats)


@pytest.mark.parametrize("how", [*FAST, *LONG])
def test_rows_that_were_held_out_are_exactly_those_that_the_training_held_out(own_run, tmp_path, monkeypatch, how):
    from axolotl.common.datasets import load_datasets

    from qlora_recipes.training.tokens import Tokenizer

    write_numbered_rows(tmp_path, duplicates=how == "without duplicates")
    datasets: list[Config] = [{"path": "train.jsonl", "type": "alpaca"}]
    if how != "without duplicates":
        datasets[0]["split"] = "train[:35]"
    if two := how not in ALONE:
        datasets.append({"path": "chats.jsonl", **CHATML})
    changes = {"val_set_size": 0.2} | HELD_OUT[how]
    run = own_run(datasets=datasets, **changes)
    axolotl = Tokenizer(run.config)
    with monkeypatch.context() as patch:
        patch.setenv("AXOLOTL_IS_PREPROCESS", "1")  # does not count steps
        split = load_datasets(cfg=axolotl.cfg)  # as the training does

    plan, rows = planned(run)
    trained, held_out = (outputs(rows, axolotl.tokenizer) for rows in (split.train_dataset, split.eval_dataset))
    contents = [row.content for row in rows]
    texts_of = [row.get("output") or row["messages"][1]["content"] for row in contents]
    assert {text.split()[1] for text in texts_of} == held_out
    assert len(rows) == len(split.eval_dataset) == len(held_out)
    assert not held_out & trained
    assert how != "number" or len(held_out) == 7
    assert ("datasets.1" in {row.dataset.key for row in rows}) == two
    names = "train.jsonl" + ("" if how == "without duplicates" else ", split train[:35]")
    names += " and chats.jsonl" if two else ""
    assert plan.settings.data == f"val_set_size {changes['val_set_size']} of {names}"
    for text, example in zip(texts_of, examples_of(run, plan, rows)[1], strict=True):
        assert text.split()[1] in axolotl.tokenizer.decode(example.prompt)


def examples_of(run: RunDir, plan: EvaluationPlan, rows: list[EvaluationRow]) -> tuple[Any, list[Any]]:
    """The prompter of an evaluation, and what it makes of its rows."""
    from qlora_recipes.evaluate.prompter import Prompter

    prompter = Prompter(plan.settings, run.config, run.output)
    return prompter, prompter.examples(rows)


def test_held_out_rows_are_kept_and_not_looked_for_in_data_that_has_changed(own_run, tmp_path):
    train = tmp_path / "train.jsonl"
    write_rows(train, alpaca(20))
    run = own_run(datasets=[{"path": "train.jsonl", "type": "alpaca"}], val_set_size=0.2)
    write_rows(train, alpaca(21))
    with pytest.raises(UserError, match=r"train\.jsonl"):
        plan_of(run)
    write_rows(train, alpaca(20))
    first = evaluate.evaluate_run(run, BASE)
    assert first.shares.rows == 4
    train.unlink()
    assert evaluate.evaluate_run(run, BASE) == first


def test_a_data_set_of_other_files_with_a_split(own_run, tmp_path):
    from datasets import Dataset, DatasetDict

    write_rows(tmp_path / "train.jsonl", asked(4))
    Dataset.from_list(asked(6)).to_parquet(tmp_path / "check.parquet")
    saved = DatasetDict({"test": Dataset.from_list(asked(3, 70)), "train": Dataset.from_list(asked(3, 80))})
    saved.save_to_disk(tmp_path / "saved")
    entry = {"type": USER_DEFINED}
    tests = [{"path": "check.parquet", "split": "train[2:4]"} | entry, {"path": "saved", "split": "test"} | entry]
    run = own_run(datasets=[{"path": "train.jsonl"} | entry], test_datasets=tests)
    plan, rows = planned(run)
    assert [row.content for row in rows] == [*asked(6)[2:4], *asked(3, 70)]
    assert plan.settings.data == "check.parquet, split train[2:4] and saved, split test"
    assert [row.dataset.key for row in rows] == ["test_datasets.0"] * 2 + ["test_datasets.1"] * 3


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"datasets": [{"path": "a.jsonl", "type": "completion"}], "val_set_size": 0.1}, "datasets.0.type "),
        ({"datasets": [{"path": "a.jsonl", "type": "chatml.intel"}], "rl": "dpo"}, "rows for rl have"),
        ({"datasets": None, "pretraining_dataset": [{"path": "a.jsonl"}]}, "pretraining"),
        ({"datasets": [{"path": "a.jsonl", "type": "alpaca"}]}, "val_set_size.* --data.* test_datasets"),
    ],
)
def test_where_there_is_nothing_to_score_that_is_said(own_run, tmp_path, changes, says):
    write_rows(tmp_path / "a.jsonl", [{"text": "All of it."}])
    run = own_run(**changes)
    for file in (None, tmp_path / "a.jsonl") if says == "datasets.0.type " else (None,):
        with pytest.raises(UserError, match=says):
            plan_of(run, data=file)
    assert not list(run.path.glob("evaluation*"))


@pytest.mark.parametrize(
    ("form", "rows", "says"),
    [
        ({"type": "alpaca"}, [*alpaca(1), {"instruction": "x", "output": " "}, *alpaca(1)], "row 2 "),
        ({"type": USER_DEFINED}, [{"question": "x", "answer": ""}] * 12, "row 1 has no answer;"),
        (CHATML, [{"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": ""}]}],
         "row 1 has no answer;"),
        (CHATML, [{"messages": chats(1)[0]}, {"messages": chats(1)[0][:1]}], "row 2 "),
        (CHATML, [{"messages": chats(1)[0]}, {"messages": []}], "Axolotl cannot tokenize these rows"),
        ({"type": "input_output"}, [{"segments": [{"label": True, "text": "All of it."}]}], "row 1 .*prompt"),
    ],
)  # fmt: skip
def test_rows_without_an_answer_are_named(own_run, tmp_path, form, rows, says):
    write_rows(tmp_path / "check.jsonl", rows)
    run = own_run(datasets=[{"path": "check.jsonl", **form}], test_datasets=[{"path": "check.jsonl", **form}])
    with pytest.raises(UserError, match=rf"check\.jsonl: {says}"):
        evaluate.evaluate_run(run, BASE)


def test_questions_are_no_chats(own_run, tmp_path):
    write_rows(tmp_path / "check.jsonl", [{"messages": chat} for chat in chats(3)])
    write_rows(tmp_path / "test.jsonl", asked(3))
    run = own_run(datasets=[{"path": "check.jsonl", **CHATML}])
    with pytest.raises(UserError) as refused:
        plan_of(run, data=tmp_path / "test.jsonl")
    assert str(refused.value) == (
        f"{tmp_path}/test.jsonl:1: the field messages is missing; `recipe new NAME --data FILE` writes questions and "
        "answers as chats to variants/NAME.jsonl"
    )


def test_data_that_is_gone_is_named(own_run, tmp_path):
    write_rows(tmp_path / "check.jsonl", alpaca(4))
    entry = {"path": "check.jsonl", "type": "alpaca"}
    hub = own_run(datasets=[entry], test_datasets=[{"path": "somebody/none", "split": "test", "type": "alpaca"}])
    with pytest.raises(UserError, match=r"test_datasets\.0: somebody/none"):
        plan_of(hub)
    shutil.rmtree(hub.path)
    run = own_run(datasets=[entry], test_datasets=[entry])
    (tmp_path / "check.jsonl").unlink()
    with pytest.raises(UserError, match=r"test_datasets\.0\.path: .*/check\.jsonl"):
        plan_of(run)
