"""What `recipe check` shows of tokens is what the trainer gets, for a tokenizer like Llama's and for SmolLM2's."""

from pathlib import Path
from typing import Any

import orjson
import pytest
from conftest import config_with

from qlora_recipes.base import yamlfiles
from qlora_recipes.base.errors import UserError
from qlora_recipes.config import compose, gpus, substitution
from qlora_recipes.config.compose import Request

NAME = "haider2024/code-llama-7b"


def trained(content: yamlfiles.Config, cache: Path) -> list[tuple[list[int], list[int]]]:
    """The ids and labels of the training data as Axolotl prepares it for its trainer."""
    from axolotl.common.datasets import load_datasets

    from qlora_recipes.training.tokens import Tokenizer

    cfg = Tokenizer(content | {"dataset_prepared_path": str(cache)}).cfg
    data = load_datasets(cfg=cfg).train_dataset
    return sorted(zip(map(list, data["input_ids"]), map(list, data["labels"]), strict=True))


def shown(content: yamlfiles.Config, count: int) -> list[dict[str, Any]]:
    from qlora_recipes.check.token_lengths import by_token

    return by_token(content, count)


@pytest.fixture(scope="session")
def smollm2() -> yamlfiles.Config:
    substitution.model_folder()
    return compose.compose(Request(NAME, rehearse=True)).config


def test_the_stand_in_has_the_context_that_rehearsals_assume(smollm2):
    sizes = orjson.loads(Path(smollm2["base_model"], "config.json").read_bytes())
    assert sizes["max_position_embeddings"] == substitution.CONTEXT


@pytest.fixture
def llama(tiny: Path, sample: Path) -> yamlfiles.Config:
    """A recipe with a tokenizer that puts BOS first and has no padding token."""
    data = {"path": str(sample / "train.jsonl"), "type": "alpaca"}
    change = {"base_model": str(tiny), "revision_of_model": None, "special_tokens": None, "test_datasets": None}
    return config_with(change | {"datasets": [data], "evals_per_epoch": None})


CHANGES: list[dict[str, Any]] = [
    {},
    {"special_tokens": {"pad_token": "</s>"}},
    {"type": {"field_instruction": "input", "field_output": "output", "format": "{instruction}\n=> "}},
    {"sequence_len": 300},  # some rows are longer
    {"sequence_len": 300, "excess_length_strategy": "truncate"},
]


@pytest.mark.parametrize("change", CHANGES, ids=map(str, CHANGES))
def test_shown_labels_are_the_trainers_for_a_llama_tokenizer(llama, tmp_path, change):
    agree(llama, tmp_path, dict(change))


@pytest.mark.parametrize("change", [{}, {"type": "chat_template"}], ids=str)
def test_shown_labels_are_the_trainers_for_smollm2(smollm2, tmp_path, change):
    if change.get("type") == "chat_template":
        rows = [{"messages": [{"role": "user", "content": f"Is {i} odd?"}, {"role": "assistant", "content": "Yes"}]}
                for i in range(1, 9, 2)]  # fmt: skip
        file = tmp_path / "chat.jsonl"
        file.write_bytes(b"\n".join(map(orjson.dumps, rows)))
        smollm2 = smollm2 | {"datasets": [{"path": str(file), "type": "chat_template"}]}
    agree(smollm2, tmp_path, dict(change))


def agree(content: yamlfiles.Config, folder: Path, change: dict[str, Any]) -> None:
    kind = change.pop("type", content["datasets"][0]["type"])
    content = content | change | {"datasets": [content["datasets"][0] | {"type": kind}]}
    rows = shown(content, 200)
    ours = sorted(
        (row["ids"], row["labels"])
        for row in rows
        if not row["too_long"] or content["excess_length_strategy"] == "truncate"
    )
    limit = content["sequence_len"]
    cut = [(ids[:limit], labels[:limit]) for ids, labels in ours]
    theirs = trained(content, folder / "prepared")
    assert cut == theirs
    assert len(theirs) > 3
    assert any(row["too_long"] for row in rows) == (limit == 300)


def test_the_text_of_a_row_shows_what_carries_loss(llama, tmp_path):
    file = tmp_path / "odd.jsonl"
    rows = [
        {"instruction": "\U0001f600", "output": "\u00e9\U0001f680"},
        {"instruction": "a", "input": "SEEN", "output": "b"},
    ]
    file.write_bytes(b"\n".join(map(orjson.dumps, rows)))
    first, second = shown(llama | {"datasets": [{"path": str(file), "type": "alpaca"}]}, 5)
    assert first["text"].startswith("<s>") and first["text"].endswith("⟪\u00e9\U0001f680</s>⟫")
    assert "\U0001f600" in first["text"]
    assert first["length"] == len(first["ids"])
    assert first["learnt"] == sum(label != -100 for label in first["labels"])
    assert "SEEN" in second["text"]  # a field that the first row has not


def test_lengths(llama, sample):
    from qlora_recipes.check.token_lengths import lengths

    found, (measured,) = lengths(llama)
    sizes = [row["length"] for row in shown(llama, 200)]
    assert found == []
    assert measured["rows"] == 109
    assert measured["tokens"] == sum(sizes)
    assert measured["median"] == sorted(sizes)[54]
    assert measured["longest"] == max(sizes)
    assert measured["too_long"] == 0
    assert 0 < measured["padding"] < 0.3
    _, (padded,) = lengths(llama | {"pad_to_sequence_len": True})
    assert padded["padding"] == pytest.approx(1 - sum(sizes) / 109 / 2048)
    assert lengths(llama | {"sample_packing": True})[1][0]["padding"] is None
    assert lengths(llama | {"group_by_length": True})[1][0]["padding"] < 0.7 * measured["padding"]


def judged(content: yamlfiles.Config, rows: list[Any], **dataset: Any) -> list[tuple[str, str, int | None]]:
    """The level, rule and line of what Axolotl finds in some training rows."""
    from qlora_recipes.check.token_lengths import lengths

    Path("rows.jsonl").write_bytes(b"\n".join(map(orjson.dumps, rows)) + b"\n")
    data = {"datasets": [{"path": "rows.jsonl", "type": "alpaca"} | dataset], "test_datasets": None}
    findings, _ = lengths(content | {"evals_per_epoch": None} | data)
    return [(finding.level, finding.rule, finding.line) for finding in findings]


def said(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content} | more


def chat(*messages: Any, **fields: Any) -> dict[str, Any]:
    return {"messages": list(messages)} | fields


ASKED, ANSWER, SYSTEM = said("user", "What is it?"), said("assistant", "A test."), said("system", "Be brief.")
PARTS = [{"type": "text", "text": "A test."}]
SEGMENTS = {"segments": [{"label": False, "text": "a"}, {"label": True, "text": "b</s>"}]}
ROW = {"instruction": "Say it.", "output": "x"}
FAILS, UNLEARNT, UNKNOWN = ("error", "bad-row"), ("warning", "nothing-learnt"), ("warning", "unknown-role")


@pytest.mark.parametrize(
    ("kind", "row", "found"),
    [
        ("chatml", chat(SYSTEM, ASKED, ANSWER, ASKED, ANSWER), []),
        ("chatml", chat(said("user", PARTS), said("assistant", PARTS)), []),
        ("chatml", chat(ASKED), [UNLEARNT]),
        ("chatml", chat(said("User", "a"), said("Assistant", "b")), [UNLEARNT, UNKNOWN, UNKNOWN]),
        ("chatml", chat(ASKED, ANSWER, said("observer", "a"), ANSWER), [UNKNOWN]),
        ("gemma", chat(ASKED, ASKED, ANSWER), [FAILS]),
        ("gemma", chat(SYSTEM, ASKED, ANSWER), [FAILS]),
        ("input_output", SEGMENTS, []),
        ("input_output", {"segments": [{"label": False, "text": "a"}]}, [UNLEARNT]),
    ],
)
def test_axolotl_reads_a_row_behind_good_ones(llama, place, kind, row, found):
    good: Any = {"input_output": SEGMENTS}.get(kind, chat(said("user", "Fine?"), ANSWER))
    chats = {"type": "chat_template", "chat_template": kind, "eot_tokens": None} if kind in ("chatml", "gemma") else {}
    rows = [good, good, row] if found else [row]
    masked = [("warning", "eos-masked", None)] * bool(chats)  # as of a base model
    assert judged(llama, rows, **({"type": kind} | chats)) == [*((*one, 3) for one in found), *masked]


@pytest.mark.parametrize(
    ("name", "text", "kind", "found"),
    [
        ("rows.csv", "instruction,output\na,b\nc,\n", "alpaca", (*UNLEARNT, 2)),
        ("rows.csv", "instruction,output\na,b\n", "chat_template", (*FAILS, 1)),
        ("rows.json", '[{"instruction": "a", "output": "b"}, {"instruction": "c"}]', "alpaca", (*UNLEARNT, 2)),
    ],
)
def test_axolotl_loads_other_formats(llama, place, name, text, kind, found):
    Path(name).write_text(text)
    assert judged(llama | {"chat_template": "chatml"}, [], path=name, type=kind) == [found]


def test_rows_with_values_of_several_types_are_found_with_the_line(llama, place):
    mixed = [ROW | {"id": 1}] * 40 + [ROW | {"id": "x"}] * 2
    assert judged(llama, mixed) == [("error", "bad-row", 41)]
    with pytest.raises(UserError, match=r"datasets\.0: .*alpaca"):
        shown(llama | {"datasets": [{"path": "rows.jsonl", "type": "alpaca"}]}, 42)


def test_rows_of_which_nothing_is_learnt_are_an_error_where_there_are_no_others(llama, place):
    found = judged(llama, [chat(ASKED), chat(said("user", "And?"))], type="chat_template", chat_template="chatml")
    assert found == [("error", "nothing-learnt", 1), ("warning", "eos-masked", None)]
    packed = {"sample_packing": True, "micro_batch_size": 2, "sequence_len": 32, "val_set_size": 0.1, "warmup_steps": 0}
    rows = [SEGMENTS] * 6 + [{"segments": [{"label": False, "text": "a"}]}] * 40
    assert ("error", "no-batch", None) in judged(llama | packed, rows, type="input_output")


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({}, []),
        ({"sequence_len": 300}, ["warning too-long:datasets.0.path"]),
        ({"sequence_len": 300, "excess_length_strategy": "raise"}, ["error too-long:datasets.0.path"]),
        ({"sequence_len": 20}, ["error too-long:datasets.0.path"]),  # nothing would be left
        # a pad token that equals EOS masks nothing: Axolotl pads labels, not ids
        ({"special_tokens": {"pad_token": "</s>"}}, []),
        ({"sample_packing": True, "micro_batch_size": 200}, ["error no-batch:micro_batch_size"]),
    ],
)
def test_long_rows_and_too_few_packed_ones(llama, change, found):
    from qlora_recipes.check.token_lengths import lengths

    packed = {"gradient_accumulation_steps": 64, "warmup_steps": 0} if "sample_packing" in change else {}
    findings, _ = lengths(llama | change | packed)
    assert [f"{finding.level} {finding.name}" for finding in findings] == found


def test_an_end_that_is_not_taught(llama, smollm2, place):
    masked = {"input_ids": [1, 5, 2], "attention_mask": [1, 1, 1], "labels": [-100, 5, -100]}
    assert judged(llama, [masked], type="") == [("warning", "eos-masked", None)]
    base = {"special_tokens": {"eos_token": "<|endoftext|>"}}  # as of a base model, which the template does not write
    chats = {"type": "chat_template", "chat_template": "chatml"}
    assert judged(smollm2 | base, [chat(ASKED, ANSWER)], **chats) == [("warning", "eos-masked", None)]
    assert judged(smollm2 | base | {"eot_tokens": ["<|im_end|>"]}, [chat(ASKED, ANSWER)], **chats) == []


def test_rows_are_judged_by_the_rehearsals_tokenizer_if_asked(recipe, tmp_path):
    data = [{"path": "rows.jsonl", "type": "chat_template"}]
    change = {"chat_template": "gemma", "datasets": data, "warmup_steps": 0}
    change |= {"test_datasets": None, "evals_per_epoch": None}
    (tmp_path / "own.yaml").write_text(yamlfiles.write_yaml(config_with(change)))
    lines = [chat(ASKED, ANSWER), chat(ASKED), chat(said("user", "Why?")), chat(SYSTEM, ASKED, ANSWER)]
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(map(orjson.dumps, lines)))
    (unread,) = recipe.json("check", "own.yaml", "--data")
    assert "--rehearse" in next(
        found["problem"] for found in unread["findings"] if found["name"] == "not-checked:base_model"
    )
    assert "tokens" not in unread["data"][0]
    (report,) = recipe.json("check", "own.yaml", "--data", "--rehearse", code=2)
    found = {finding["rule"]: finding for finding in report["findings"]}
    assert found["bad-row"]["where"] == "rows.jsonl"
    assert found["bad-row"]["line"] == 4
    assert " 2, 3)" in found["nothing-learnt"]["problem"]
    assert report["data"][0]["rows"] == 3


def test_faults_of_the_text_and_of_the_tokens_are_reported_together(recipe, tmp_path, llama):
    data = [{"path": "rows.jsonl", "type": "chat_template", "chat_template": "gemma"}]
    (tmp_path / "own.yaml").write_text(yamlfiles.write_yaml(llama | {"datasets": data, "eot_tokens": None}))
    fine = orjson.dumps(chat(ASKED, ANSWER))
    lines = [fine, b"{", orjson.dumps(chat(ASKED)), orjson.dumps(chat(SYSTEM, ASKED, ANSWER)), fine]
    lines += [orjson.dumps(chat(ASKED, said("robot", "a"), ASKED, ANSWER)), orjson.dumps({"text": "a"}), lines[3]]
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(lines))
    (report,) = recipe.json("check", "own.yaml", "--data", code=2)
    of_rows = [finding for finding in report["findings"] if finding["where"] == "rows.jsonl"]
    found = sorted((finding["rule"], finding["line"]) for finding in of_rows)
    ours = [("bad-row", 2), ("bad-row", 7), ("repeated-row", 5)]
    of_axolotl = [("bad-row", 4), ("nothing-learnt", 3), ("unknown-role", 6)]
    assert found == sorted([*ours, *of_axolotl])
    (refused,) = (finding for finding in of_rows if (finding["rule"], finding["line"]) == ("bad-row", 4))
    assert refused["problem"].startswith("2 rows (lines 4, 8): Axolotl cannot tokenize"), refused
    assert not any("skipped tokenizing" in finding["problem"] for finding in report["findings"])


def test_a_wrong_gpu_or_a_missing_second_file_hides_no_row(recipe, tmp_path, llama):
    data = [{"path": "rows.jsonl", "type": "alpaca"}, {"path": "gone.jsonl", "type": "alpaca"}]
    (tmp_path / "own.yaml").write_text(yamlfiles.write_yaml(llama | {"datasets": data, "bf16": True}))
    (tmp_path / "rows.jsonl").write_bytes(orjson.dumps(ROW) + b"\n" + orjson.dumps(ROW | {"output": ""}) + b"\n")
    (report,) = recipe.json("check", "own.yaml", "--data", "--gpu", "T4", code=2)
    rules = {finding["name"] for finding in report["findings"]}
    assert {"gpu-lacks:bf16", "missing-file:datasets.1.path", "nothing-learnt:datasets.0.path"} <= rules, rules


def test_reading_stops_after_twenty_rows_that_axolotl_refuses(llama, place):
    kind = {"type": "chat_template", "chat_template": "gemma", "eot_tokens": None}
    found = judged(llama, [chat(ASKED, ANSWER), *[chat(ASKED, ASKED, ANSWER)] * 50], **kind)
    assert found[:2] == [("error", "bad-row", 2), ("note", "not-checked", None)]


def test_run_asks_axolotl_before_it_starts_on_a_gpu(recipe, tmp_path, tiny_profile, monkeypatch):
    monkeypatch.setattr(gpus, "here", lambda: gpus.find("H100"))
    done = recipe.fails("run", "haider2024/code-llama-7b", "--profile", tiny_profile, "--set", "sequence_len=8")
    assert "[too-long:datasets.0.path]" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_the_command(recipe, tmp_path, llama):
    (tmp_path / "mine.yaml").write_text(yamlfiles.write_yaml(llama))
    done = recipe.ok("check", "mine.yaml", "--show-tokens", "2")
    assert "⟪Can we turn" in done.stdout
    assert done.stdout.count("</s>⟫") == 2
    elsewhere = ("--set", "datasets.0.path=x/y", "--set", "test_datasets.0.path=x/y")
    unknown = recipe.fails("check", NAME, *elsewhere, "--show-tokens", "1")
    assert "codellama/CodeLlama-7b-hf" in unknown.stderr
