"""Tokens that `recipe check` shows are the trainer's, for a tokenizer like Llama's and for SmolLM2's."""

from pathlib import Path
from typing import Any

import orjson
import pytest
from conftest import config_with

from qlora_recipes.base import yamlfiles
from qlora_recipes.base.errors import UserError
from qlora_recipes.base.files import write_rows
from qlora_recipes.config import compose, gpus, substitution
from qlora_recipes.config.compose import Request
from qlora_recipes.run.backends import local

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


def test_the_small_model_has_the_context_that_rehearsals_assume(smollm2):
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


def test_rows_in_the_order_of_the_file_are_padded_in_this_order():
    from axolotl.utils.dict import DictDefault

    from qlora_recipes.training.tokens import padding

    sizes = [64, 64, 128, 128]
    batches_of_two = {"micro_batch_size": 2, "seed": 1}
    assert padding(DictDefault(batches_of_two | {"curriculum_sampling": True}), sizes) == 0
    assert padding(DictDefault(batches_of_two), sizes) == 0.25


def test_lengths(llama, sample):
    from qlora_recipes.check.token_lengths import lengths

    findings, (measured,) = lengths(llama)
    sizes = [row["length"] for row in shown(llama, 200)]
    assert findings == []
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


def findings_of(content: yamlfiles.Config, rows: list[Any], **dataset: Any) -> list[str]:
    """Axolotl's findings in some training rows."""
    Path("rows.jsonl").write_bytes(b"\n".join(map(orjson.dumps, rows)) + b"\n")
    data = {"datasets": [{"path": "rows.jsonl", "type": "alpaca"} | dataset], "test_datasets": None}
    return findings_in(content | {"evals_per_epoch": None} | data)


def findings_in(content: yamlfiles.Config) -> list[str]:
    """Axolotl's findings in the rows of a config, with DATA for the first data set's key."""
    from qlora_recipes.check.token_lengths import lengths

    findings, _ = lengths(content)
    return [str(finding).replace("datasets.0", "DATA") for finding in findings]


def said(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content} | more


def chat(*messages: Any, **fields: Any) -> dict[str, Any]:
    return {"messages": list(messages)} | fields


ASKED, ANSWER, SYSTEM = said("user", "What is it?"), said("assistant", "A test."), said("system", "Be brief.")
PARTS = [{"type": "text", "text": "A test."}]
SEGMENTS = {"segments": [{"label": False, "text": "a"}, {"label": True, "text": "b</s>"}]}
ROW = {"instruction": "Say it.", "output": "x"}
UNLEARNT = (
    "{} without tokens to train on (empty answer, or wrong role); correct or drop these rows [nothing-learnt:DATA.path]"
)
UNKNOWN = (
    "rows.jsonl:3: warning: DATA.path: 1 row with the role {}, unknown to `roles` and the template{}; correct it, or "
    "add it to `roles` [unknown-role:DATA.path]"
)
FAILS = (
    "error: DATA.path: {}: Axolotl cannot tokenize these rows as {}; correct the rows, the type or the template "
    "[bad-row:DATA.path]"
)
NO_END = "inspect rows with --show-tokens; use a template that ends answers, or write the end into the rows"
MASKED = (
    ": error: DATA.type: no EOS or end-of-turn token is trained on: the model would not learn to stop; "
    f"{NO_END} [eos-masked:DATA.type]"
)
THIRD_UNLEARNT = f"rows.jsonl:3: warning: DATA.path: {UNLEARNT.format('1 row')}"


def fails(line: int, error: str, kind: str = "chat_template", rows: str = "1 row") -> str:
    return f"rows.jsonl:{line}: {FAILS.format(rows, f'{kind}: {error}')}"


ALTERNATE = "TemplateError: Conversation roles must alternate user/assistant/user/assistant/..."


@pytest.mark.parametrize(
    ("template", "row", "findings"),
    [
        ("chatml", chat(SYSTEM, ASKED, ANSWER, ASKED, ANSWER), []),
        ("chatml", chat(said("user", PARTS), said("assistant", PARTS)), []),
        ("chatml", chat(ASKED), [THIRD_UNLEARNT]),
        (
            "chatml",
            chat(said("User", "a"), said("Assistant", "b")),
            [
                THIRD_UNLEARNT,
                UNKNOWN.format("Assistant", "; did you mean assistant?"),
                UNKNOWN.format("User", "; did you mean user?"),
            ],
        ),
        ("chatml", chat(ASKED, ANSWER, said("observer", "a"), ANSWER), [UNKNOWN.format("observer", "")]),
        ("gemma", chat(ASKED, ASKED, ANSWER), [fails(3, ALTERNATE)]),
        ("gemma", chat(SYSTEM, ASKED, ANSWER), [fails(3, "TemplateError: System role not supported")]),
    ],
)
def test_axolotl_reads_a_chat_behind_good_ones(llama, place, template, row, findings):
    good = chat(said("user", "Fine?"), ANSWER)
    kind = {"type": "chat_template", "chat_template": template, "eot_tokens": None}
    rows = [good, good, row] if findings else [row]  # texts and parts cannot be in one file
    assert findings_of(llama, rows, **kind) == [*findings, MASKED]  # masked, as of a base model


@pytest.mark.parametrize(
    ("row", "findings"),
    [(SEGMENTS, []), ({"segments": [{"label": False, "text": "a"}]}, [THIRD_UNLEARNT])],
    ids=["good", "nothing learnt"],
)
def test_axolotl_reads_segments_behind_good_ones(llama, place, row, findings):
    assert findings_of(llama, [SEGMENTS, SEGMENTS, row], type="input_output") == findings


NO_MESSAGES = "chat_template: ValueError: Messages is null. Please check `field_messages`."
SECOND_UNLEARNT = f"2: warning: DATA.path: {UNLEARNT.format('1 row')}"


@pytest.mark.parametrize(
    ("name", "text", "kind", "finding"),
    [
        ("rows.csv", "instruction,output\na,b\nc,\n", "alpaca", SECOND_UNLEARNT),
        ("rows.csv", "instruction,output\na,b\n", "chat_template", f"1: {FAILS.format('1 row', NO_MESSAGES)}"),
        ("rows.json", '[{"instruction": "a", "output": "b"}, {"instruction": "c"}]', "alpaca", SECOND_UNLEARNT),
    ],
)
def test_axolotl_loads_other_formats(llama, place, name, text, kind, finding):
    Path(name).write_text(text)
    assert findings_of(llama | {"chat_template": "chatml"}, [], path=name, type=kind) == [f"{name}:{finding}"]


def test_rows_with_values_of_several_types_are_found_with_the_line(llama, place):
    mixed = [ROW | {"id": 1}] * 40 + [ROW | {"id": "x"}] * 2
    error = "ArrowInvalid: Could not convert 'x' with type str: tried to convert to int64"
    assert findings_of(llama, mixed) == [fails(41, error, "alpaca")]
    with pytest.raises(UserError) as raised:
        shown(llama | {"datasets": [{"path": "rows.jsonl", "type": "alpaca"}]}, 42)
    assert str(raised.value) == f"datasets.0: Axolotl cannot tokenize these rows as alpaca: {error}"


def test_rows_of_which_nothing_is_learnt_are_an_error_where_there_are_no_others(llama, place):
    kind = {"type": "chat_template", "chat_template": "chatml"}
    assert findings_of(llama, [chat(ASKED), chat(said("user", "And?"))], **kind) == [
        f"rows.jsonl:1: error: DATA.path: {UNLEARNT.format('2 rows (lines 1, 2)')}",
    ]


NO_BATCH = (
    ": error: micro_batch_size: no step: {} packed sequences of a micro batch per GPU; set micro_batch_size={}, a "
    "smaller sequence_len, or more rows (rehearsal: `--set DATA.split=train[:N]`) [no-batch:micro_batch_size]"
)


def test_rows_without_loss_fill_no_packed_sequence(llama, place):
    packed = {"sample_packing": True, "micro_batch_size": 2, "sequence_len": 32, "val_set_size": 0.1, "warmup_steps": 0}
    rows = [SEGMENTS] * 6 + [{"segments": [{"label": False, "text": "a"}]}] * 40
    assert findings_of(llama | packed, rows, type="input_output")[1:] == [NO_BATCH.format("5 rows fill 1 of the 2", 1)]


TOO_LONG = (
    ": {}: DATA.path: {} of 109 rows exceed sequence_len, {}; raise it, or shorten these rows: the longest has 496 "
    "tokens [too-long:DATA.path]"
)


@pytest.mark.parametrize(
    ("change", "findings"),
    [
        ({}, []),
        ({"sequence_len": 300}, [TOO_LONG.format("warning", 67, "300: dropped")]),
        (
            {"sequence_len": 300, "excess_length_strategy": "raise"},
            [TOO_LONG.format("error", 67, "300: an error")],
        ),
        ({"sequence_len": 20}, [TOO_LONG.format("error", 109, "20: dropped")]),  # nothing would be left
        # a pad token that equals EOS masks nothing: Axolotl pads labels, not ids
        ({"special_tokens": {"pad_token": "</s>"}}, []),
        (
            {"sample_packing": True, "micro_batch_size": 200, "gradient_accumulation_steps": 64, "warmup_steps": 0},
            [NO_BATCH.format("109 rows fill 18 of the 200", 18)],
        ),
    ],
)
def test_long_rows_and_too_few_packed_ones(llama, change, findings):
    assert findings_in(llama | change) == findings


def test_truncated_rows_lose_their_end(llama):
    too_long, lost, cut = findings_in(llama | {"sequence_len": 300, "excess_length_strategy": "truncate"})
    assert too_long == TOO_LONG.format("warning", 67, "300: truncated")
    remedy = "; set a larger sequence_len, or excess_length_strategy: drop [end-cut:DATA.path]"
    assert lost.endswith(f": sequence_len truncates all of the answer{remedy}")
    assert cut.endswith(f": sequence_len truncates the end of the answer{remedy}")


def test_an_end_that_is_not_taught(llama, smollm2, place):
    masked = {"input_ids": [1, 5, 2], "attention_mask": [1, 1, 1], "labels": [-100, 5, -100]}
    assert findings_of(llama, [masked], type="") == [MASKED]
    base = {"special_tokens": {"eos_token": "<|endoftext|>"}}  # as of a base model, which the template does not write
    chats = {"type": "chat_template", "chat_template": "chatml"}
    advice = MASKED.replace(NO_END, "set eot_tokens: [<|im_end|>]")
    assert findings_of(smollm2 | base, [chat(ASKED, ANSWER)], **chats) == [advice]
    assert findings_of(smollm2 | base | {"eot_tokens": ["<|im_end|>"]}, [chat(ASKED, ANSWER)], **chats) == []


def test_rows_are_judged_by_the_rehearsals_tokenizer_if_asked(recipe, tmp_path):
    data = [{"path": "rows.jsonl", "type": "chat_template"}]
    change = {"chat_template": "gemma", "datasets": data, "warmup_steps": 0}
    change |= {"test_datasets": None, "evals_per_epoch": None}
    (tmp_path / "own.yaml").write_text(yamlfiles.write_yaml(config_with(change)))
    lines = [chat(ASKED, ANSWER), chat(ASKED), chat(said("user", "Why?")), chat(SYSTEM, ASKED, ANSWER)]
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(map(orjson.dumps, lines)))
    (unread,) = recipe.json("check", "own.yaml", "--all-rows")
    assert unread["findings"][-1]["name"] == "not-checked:base_model"
    assert "tokens" not in unread["data"][0]
    (report,) = recipe.json("check", "own.yaml", "--all-rows", "--rehearse", code=2)
    by_rule = {finding["rule"]: finding for finding in report["findings"]}
    assert by_rule["bad-row"]["where"] == "rows.jsonl"
    assert by_rule["bad-row"]["line"] == 4
    assert by_rule["nothing-learnt"]["line"] == 2
    assert report["data"][0]["rows"] == 3


def test_faults_of_the_text_and_of_the_tokens_are_reported_together(recipe, tmp_path, llama):
    data = [{"path": "rows.jsonl", "type": "chat_template", "chat_template": "gemma"}]
    (tmp_path / "own.yaml").write_text(yamlfiles.write_yaml(llama | {"datasets": data, "eot_tokens": None}))
    fine = orjson.dumps(chat(ASKED, ANSWER))
    lines = [fine, b"{", orjson.dumps(chat(ASKED)), orjson.dumps(chat(SYSTEM, ASKED, ANSWER)), fine]
    lines += [orjson.dumps(chat(ASKED, said("robot", "a"), ASKED, ANSWER)), orjson.dumps({"text": "a"}), lines[3]]
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(lines))
    (report,) = recipe.json("check", "own.yaml", "--all-rows", code=2)
    places = [(finding["rule"], finding["line"]) for finding in report["findings"] if finding["where"] == "rows.jsonl"]
    text_mistakes = [("bad-row", 2), ("bad-row", 7), ("repeated-row", 5)]
    token_mistakes = [("bad-row", 4), ("nothing-learnt", 3), ("unknown-role", 6)]
    assert sorted(places) == sorted(text_mistakes + token_mistakes)


def test_a_wrong_gpu_or_a_missing_second_file_hides_no_row(recipe, tmp_path, llama):
    data = [{"path": "rows.jsonl", "type": "alpaca"}, {"path": "gone.jsonl", "type": "alpaca"}]
    (tmp_path / "own.yaml").write_text(yamlfiles.write_yaml(llama | {"datasets": data, "bf16": True}))
    (tmp_path / "rows.jsonl").write_bytes(orjson.dumps(ROW) + b"\n" + orjson.dumps(ROW | {"output": ""}) + b"\n")
    (report,) = recipe.json("check", "own.yaml", "--all-rows", "--gpu", "T4", code=2)
    rules = {finding["name"] for finding in report["findings"]}
    assert {"gpu-lacks:bf16", "missing-file:datasets.1.path", "nothing-learnt:datasets.0.path"} <= rules, rules


def test_reading_stops_after_twenty_rows_that_axolotl_refuses(llama, place):
    kind = {"type": "chat_template", "chat_template": "gemma", "eot_tokens": None}
    assert findings_of(llama, [chat(ASKED, ANSWER), *[chat(ASKED, ASKED, ANSWER)] * 50], **kind) == [
        fails(2, ALTERNATE, rows="20 rows (lines 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, …)"),
        ": note: DATA.path: stopped after 20 rows that Axolotl cannot read [not-checked:DATA.path]",
        MASKED,
    ]


def test_run_asks_axolotl_before_it_starts_on_a_gpu(recipe, tmp_path, tiny_profile, monkeypatch):
    monkeypatch.setattr(local, "here", lambda: gpus.find_gpu("H100"))
    done = recipe.fails("run", "haider2024/code-llama-7b", "--profile", tiny_profile, "--set", "sequence_len=8")
    assert "[too-long:datasets.0.path]" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_the_command(recipe, tmp_path, llama):
    (tmp_path / "mine.yaml").write_text(yamlfiles.write_yaml(llama))
    done = recipe.ok("check", "mine.yaml", "--show-tokens", "2")
    assert "⟪Can we turn" in done.stdout
    assert done.stdout.count("</s>⟫") == 2
    rows = recipe.json("check", "mine.yaml", "--show-tokens", "2")
    assert [row["text"].count("</s>⟫") for row in rows] == [1, 1]
    elsewhere = ("--set", "datasets.0.path=x/y", "--set", "test_datasets.0.path=x/y")
    unknown = recipe.fails("check", NAME, *elsewhere, "--show-tokens", "1")
    assert "codellama/CodeLlama-7b-hf" in unknown.stderr


@pytest.mark.parametrize(
    ("base_model", "tokenizer_type"),
    [
        ("NousResearch/Llama-2-7b-hf", "LlamaTokenizer"),
        ("mistralai/Mistral-7B-v0.1", "LlamaTokenizer"),
        ("codellama/CodeLlama-7b-hf", "CodeLlamaTokenizer"),
    ],
)
def test_a_rehearsal_of_an_import_of_2023_has_the_small_models_tokens(recipe, tmp_path, base_model, tokenizer_type):
    write_rows(tmp_path / "rows.jsonl", [{"instruction": "Add them.", "input": "2 and 3", "output": "The sum is 5."}])
    model = {"base_model": base_model, "tokenizer_type": tokenizer_type, "model_type": "LlamaForCausalLM"}
    settings = {"adapter": "qlora", "load_in_4bit": True, "lora_r": 32, "lora_alpha": 16, "lora_target_linear": True}
    training = {"sequence_len": 512, "micro_batch_size": 1, "num_epochs": 1, "learning_rate": 0.0002, "bf16": True}
    data = {"datasets": [{"path": "rows.jsonl", "type": "alpaca"}]}
    (tmp_path / "old.yml").write_text(yamlfiles.write_yaml(model | settings | training | data))
    (row,) = recipe.json("check", "old.yml", "--rehearse", "--quick", "--show-tokens", "1")
    assert row["text"].startswith("Below is an instruction that describes a task, paired with an input")
    assert row["text"].endswith("### Response:\n⟪The sum is 5.<|im_end|>⟫")
