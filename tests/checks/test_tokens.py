"""What `recipe check` shows of tokens is what the trainer gets, for a tokenizer like Llama's and for SmolLM2's."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import orjson
import pytest
from conftest import Recipe, config_with

from qlora_recipes.base import yamlfiles
from qlora_recipes.base.errors import UserError
from qlora_recipes.checks import check
from qlora_recipes.configs import compose, standin
from qlora_recipes.configs.compose import Request

NAME = "haider2024/code-llama-7b"


def trained(content: yamlfiles.Config, cache: Path) -> list[tuple[list[int], list[int]]]:
    """The ids and labels of the training data as Axolotl prepares it for its trainer."""
    from axolotl.common.datasets import load_datasets

    from qlora_recipes.checks.tokens import Tokenizer

    cfg = Tokenizer(content | {"dataset_prepared_path": str(cache)}).cfg
    cfg.dataset_num_proc = None  # no processes for few rows
    data = load_datasets(cfg=cfg).train_dataset
    return sorted(zip(map(list, data["input_ids"]), map(list, data["labels"]), strict=True))


def shown(content: yamlfiles.Config, count: int) -> list[dict[str, Any]]:
    from qlora_recipes.checks.tokens import by_token

    return by_token(content, count)


@pytest.fixture(scope="session")
def smollm2() -> yamlfiles.Config:
    """A recipe's rehearsal."""
    standin.model_folder()
    return compose.compose(Request(NAME, rehearse=True)).config


def test_the_stand_in_has_the_context_that_rehearsals_assume(smollm2: yamlfiles.Config) -> None:
    sizes = orjson.loads(Path(smollm2["base_model"], "config.json").read_bytes())
    assert sizes["max_position_embeddings"] == standin.CONTEXT


@pytest.fixture
def llama(tiny: Path, sample: Path) -> yamlfiles.Config:
    """A recipe with a tokenizer that puts BOS first and has no padding token."""
    data = {"path": str(sample / "train.jsonl"), "type": "alpaca"}
    change = {"base_model": str(tiny), "revision_of_model": None, "special_tokens": None, "test_datasets": None}
    return config_with(change | {"datasets": [data], "evals_per_epoch": None})


@pytest.mark.parametrize(("micro", "gpus_used", "found"), [(2, 1, []), (4, 32, ["no-batch:micro_batch_size"])])
def test_packed_rows_that_fill_no_batch_are_an_error(
    llama: yamlfiles.Config, tmp_path: Path, micro: int, gpus_used: int, found: list[str]
) -> None:
    llama |= {"sample_packing": True, "pad_to_sequence_len": True, "micro_batch_size": micro, "warmup_steps": 0}
    llama["gradient_accumulation_steps"] = 64
    (tmp_path / "mine.yaml").write_text(yamlfiles.write_yaml(llama))
    report = check.check(Request(str(tmp_path / "mine.yaml"), gpus=gpus_used), data=True)
    assert [finding.name for finding in report.findings if finding.level == "error"] == found


CHANGES: list[dict[str, Any]] = [
    {},
    {"train_on_inputs": True},
    {"special_tokens": {"pad_token": "</s>"}},
    {"type": "alpaca:chat"},
    {"type": {"field_instruction": "input", "field_output": "output", "format": "{instruction}\n=> "}},
    {"sequence_len": 300},  # some rows are longer
    {"sequence_len": 300, "excess_length_strategy": "truncate"},
]


@pytest.mark.parametrize("change", CHANGES, ids=map(str, CHANGES))
def test_shown_labels_are_the_trainers_for_a_llama_tokenizer(
    llama: yamlfiles.Config, tmp_path: Path, change: dict[str, Any]
) -> None:
    agree(llama, tmp_path, dict(change))


@pytest.mark.parametrize("change", [{}, {"train_on_inputs": True}, {"type": "chat_template"}], ids=str)
def test_shown_labels_are_the_trainers_for_smollm2(
    smollm2: yamlfiles.Config, tmp_path: Path, change: dict[str, Any]
) -> None:
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
        (
            [token["id"] for token in row["tokens"]],
            [token["id"] if token["loss"] else -100 for token in row["tokens"]],
        )
        for row in rows
        if not row["too_long"] or content["excess_length_strategy"] == "truncate"
    )
    limit = content["sequence_len"]
    cut = [(ids[:limit], labels[:limit]) for ids, labels in ours]
    theirs = trained(content, folder / "prepared")
    assert cut == theirs
    assert len(theirs) > 3
    assert any(row["too_long"] for row in rows) == (limit == 300)


def test_texts_add_up_to_the_row_and_mark_what_is_special(llama: yamlfiles.Config) -> None:
    row = shown(llama, 1)[0]
    texts = [token["text"] for token in row["tokens"]]
    assert (texts[0], texts[-1]) == ("<s>", "</s>")
    assert [token["special"] for token in row["tokens"]] == [True, *[False] * (len(texts) - 2), True]
    assert "".join(texts).startswith("<s>Below is an instruction")
    learnt = "".join(token["text"] for token in row["tokens"] if token["loss"])
    assert learnt.startswith("Can we turn this into a data provider?")
    assert (row["learnt"], row["length"]) == (sum(token["loss"] for token in row["tokens"]), len(texts))


def test_a_character_of_several_tokens_is_shown_whole(llama: yamlfiles.Config, tmp_path: Path) -> None:
    file = tmp_path / "odd.jsonl"
    file.write_text('{"instruction": "\U0001f600 \u4e2d", "output": "\u00e9\U0001f680"}\n')
    (row,) = shown(llama | {"datasets": [{"path": str(file), "type": "alpaca"}]}, 5)
    assert "\ufffd" not in "".join(token["text"] for token in row["tokens"])
    assert "".join(token["text"] for token in row["tokens"] if token["loss"]) == "\u00e9\U0001f680</s>"


def test_a_row_with_fields_that_the_first_lacks(llama: yamlfiles.Config, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"instruction": "a", "output": "b"}\n{"instruction": "a", "input": "SEEN", "output": "b"}\n')
    _, second = shown(llama | {"datasets": [{"path": str(file), "type": "alpaca"}]}, 2)
    assert "SEEN" in "".join(token["text"] for token in second["tokens"])


def test_a_field_of_several_types_is_an_error_of_the_data(llama: yamlfiles.Config, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"instruction": "a", "output": "b", "id": 1}\n{"instruction": "a", "output": "b", "id": "x"}\n')
    with pytest.raises(UserError, match=r"Axolotl cannot tokenize these rows as alpaca: .*Could not convert 'x'"):
        shown(llama | {"datasets": [{"path": str(file), "type": "alpaca"}]}, 2)


def test_a_long_row_is_measured_whole(llama: yamlfiles.Config, tmp_path: Path) -> None:
    from qlora_recipes.checks.tokens import lengths

    file = tmp_path / "rows.jsonl"
    file.write_bytes(orjson.dumps({"instruction": "a b c " * 3000, "output": "d e f " * 3000}) + b"\n")
    data = {"datasets": [{"path": str(file), "type": "alpaca"}]}
    _, (measured,) = lengths(llama | data)
    assert measured["percentiles"]["100"] > 2 * 2048
    _, (pieces,) = lengths(llama | {"datasets": [{"path": str(file), "type": "completion", "field": "instruction"}]})
    assert (pieces["percentiles"]["100"], pieces["longer_than_sequence_len"]) == (2048, 0)  # Axolotl makes rows of it


def test_lengths(llama: yamlfiles.Config, sample: Path) -> None:
    from qlora_recipes.checks.tokens import lengths

    found, (measured,) = lengths(llama)
    sizes = [row["length"] for row in shown(llama, 200)]
    assert found == []
    assert (measured["rows"], measured["tokens"]) == (109, sum(sizes))
    assert measured["percentiles"]["100"] == max(sizes)
    assert measured["percentiles"]["50"] == sorted(sizes)[54]
    assert measured["longer_than_sequence_len"] == 0
    assert 0 < measured["padding_share"] < 0.3
    _, (padded,) = lengths(llama | {"pad_to_sequence_len": True})
    assert padded["padding_share"] == pytest.approx(1 - sum(sizes) / 109 / 2048)
    assert lengths(llama | {"sample_packing": True})[1][0]["padding_share"] is None


def test_long_rows_and_a_masked_end_are_findings(llama: yamlfiles.Config, tmp_path: Path) -> None:
    from qlora_recipes.checks.tokens import lengths

    def names(change: dict[str, Any]) -> list[tuple[str, str]]:
        return [(finding.level, finding.name) for finding in lengths(llama | change)[0]]

    assert names({"sequence_len": 300}) == [("warning", "too-long:datasets.0.path")]
    assert names({"sequence_len": 300, "excess_length_strategy": "raise"}) == [("error", "too-long:datasets.0.path")]
    assert names({"sequence_len": 20}) == [("error", "too-long:datasets.0.path")]  # nothing would be left
    file = tmp_path / "tokenized.jsonl"
    file.write_text('{"input_ids": [1, 5, 2], "attention_mask": [1, 1, 1], "labels": [-100, 5, -100]}\n')
    masked = {"datasets": [{"path": str(file), "type": ""}]}
    assert names(masked) == [("warning", "eos-masked:datasets.0.type")]
    # a pad token that equals EOS masks nothing: Axolotl pads labels, not ids
    assert names({"special_tokens": {"pad_token": "</s>"}}) == []


def test_an_unknown_token_that_ends_texts_is_an_end(tiny: Path) -> None:
    from transformers import AutoTokenizer

    from qlora_recipes.checks.tokens import taught_ends

    tokenizer = AutoTokenizer.from_pretrained(tiny, unk_token="</s>")
    assert taught_ends({"eot_tokens": ["<s>", "no token"]}, tokenizer) == {1, 2}
    tokenizer.eos_token = None
    assert taught_ends({}, tokenizer) == set()


def test_an_end_of_turn_that_is_taught_is_an_end(smollm2: yamlfiles.Config, tmp_path: Path) -> None:
    from qlora_recipes.checks.tokens import lengths

    chat = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "Yes."}]}
    (tmp_path / "chats.jsonl").write_bytes(orjson.dumps(chat) + b"\n")
    data = [{"path": str(tmp_path / "chats.jsonl"), "type": "chat_template"}]
    own = smollm2 | {"datasets": data, "test_datasets": None, "evals_per_epoch": None, "chat_template": "chatml"}
    own |= {"special_tokens": {"eos_token": "<|endoftext|>"}}  # as of a base model, which the template does not write
    assert [finding.name for finding in lengths(own)[0]] == ["eos-masked:datasets.0.type"]
    assert not lengths(own | {"eot_tokens": ["<|im_end|>"]})[0]


def test_the_command(recipe: Recipe, tmp_path: Path, tiny: Path, sample: Path) -> None:
    data = {"path": str(sample / "train.jsonl"), "type": "alpaca"}
    change = {"base_model": str(tiny), "revision_of_model": None, "special_tokens": None, "test_datasets": None}
    (tmp_path / "mine.yaml").write_text(
        yamlfiles.write_yaml(config_with(change | {"datasets": [data], "evals_per_epoch": None}))
    )
    done = recipe("check", "mine.yaml", "--show-tokens", "2")
    assert done.returncode == 0, done.stderr
    assert "datasets.0, row 2: " in done.stdout
    assert "### Response:\n⟪Can we turn this into a data provider?" in done.stdout
    assert done.stdout.count("</s>⟫") == 2
    unknown = recipe(
        "check", NAME, "--set", "datasets.0.path=x/y", "--set", "test_datasets.0.path=x/y", "--show-tokens", "1"
    )
    assert unknown.returncode == 2
    assert "the tokenizer of codellama/CodeLlama-7b-hf is not on this machine" in unknown.stderr


def test_in_colour() -> None:
    code = """
from qlora_recipes.terminal import tables
tokens = [
    {"id": 1, "text": "<s>", "special": True, "loss": False},
    {"id": 2, "text": "[b]a", "special": False, "loss": False},  # not rich's markup
    {"id": 3, "text": "ok", "special": False, "loss": True},
]
row = {"dataset": "datasets.0", "row": 1, "length": 3, "learnt": 1, "too_long": True, "tokens": tokens}
tables.print_tokens([row])
"""
    terminal = {"FORCE_COLOR": "1", "TERM": "xterm-256color", "PATH": os.environ["PATH"]}
    out = subprocess.run([sys.executable, "-c", code], env=terminal, capture_output=True, text=True, check=True).stdout
    assert "3 tokens, 1 with loss, longer than sequence_len" in out
    assert "[b]a" in out
    assert "\x1b[1;32mok" in out
    assert "\x1b[2;7m<s>" in out


def test_a_tokenizer_that_cannot_be_loaded_is_told(llama: yamlfiles.Config, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="its tokenizer cannot be loaded"):
        shown(llama | {"base_model": str(tmp_path)}, 1)
