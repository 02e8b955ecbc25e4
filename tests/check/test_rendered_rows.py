"""Mistakes that only the tokens of rows show, planted in the chat templates of published families."""

import json
from pathlib import Path
from typing import Any

import chat_models
import pytest
from datasets import Dataset

from qlora_recipes.base.files import write_rows
from qlora_recipes.check import token_lengths
from qlora_recipes.check.rows import check_rows
from qlora_recipes.config import substitution
from qlora_recipes.config.finding import Finding

Row = dict[str, Any]
KEY = "datasets.0.path"
TRUNCATE = {"sequence_len": 256, "excess_length_strategy": "truncate"}


def chat(*texts: str, **fields: Any) -> Row:
    """A chat of user and assistant in turns; fields are those of the first answer."""
    messages: list[Row] = [
        {"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(texts)
    ]
    messages[1] |= fields
    return {"messages": messages}


CHATS = [chat(f"Is {number} odd or even?", f"That is for {number} to know.") for number in range(4)]
REASONED = [chat("Why?", "<think>\nFirst idea\n</think>\n\nSo.", "And?", "<think>\nOther idea\n</think>\n\nThus.")]
LONG_ANSWER, LONG_PROMPT = chat("Why?", "words and words " * 60), chat("words and words " * 60, "So.")
CALL = {"type": "function", "function": {"name": "find", "arguments": {"text": "a", "limit": None}}}
TEXT_CALL = {"type": "function", "function": {"name": "find", "arguments": '{"text": "x \\u00e9"}'}}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {family: chat_models.save(folder / family, family) for family in chat_models.FAMILIES}


def findings_of(model: Path, rows: list[Row], settings: Row, dataset: Row) -> list[Finding]:
    write_rows(Path("rows.jsonl"), rows)
    content = {
        "base_model": str(model),
        "special_tokens": {"pad_token": "<unk>"},
        "adapter": "lora",
        "lora_target_modules": ["q_proj"],
        "datasets": [{"path": "rows.jsonl", "type": "chat_template"} | dataset],
        "sequence_len": 2048,
        "micro_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "num_epochs": 1,
        "learning_rate": 0.0001,
    }
    cfg = {key: value for key, value in (content | settings).items() if value is not None}
    return token_lengths.lengths(cfg, 200)[0]


def named(findings: list[Finding]) -> list[tuple[str, str]]:
    return [(finding.level, finding.name) for finding in findings]


NO_END = ("error", "eos-masked:datasets.0.type")
DATED = ("error", "dated-template:chat_template")
OTHER_PROMPT = ("warning", f"other-prompt:{KEY}")
TOOL = {"type": "function", "function": {"name": "find", "parameters": {"type": "object"}}}
TURNS = [chat("Is it?", "Yes.", "And?", "No.")]
PLANTED: dict[str, tuple[str, list[Row], Row, Row, list[tuple[str, str]]]] = {
    "llama3": ("llama3", CHATS, {}, {}, []),
    "mistral_v1": ("mistral_v1", CHATS, {}, {}, []),
    "alpaca": ("llama3", [{"instruction": "Add.", "output": "2"}], {}, {"type": "alpaca"}, []),
    "date": ("llama3_2_vision", CHATS, {}, {}, [DATED]),
    "date-without-argument": ("mistral_v7_tekken", CHATS, {}, {}, [DATED]),
    "gemma": ("gemma", CHATS, {}, {}, [NO_END]),
    "gemma3": ("gemma3", CHATS, {}, {}, [NO_END]),
    "phi_3": ("phi_3", CHATS, {}, {}, [NO_END]),
    "chatml": ("chatml", CHATS, {}, {}, [NO_END]),
    "no-generation-end": (
        "gemma",
        CHATS,
        {"eot_tokens": ["<end_of_turn>"]},
        {},
        [("warning", "end-no-stop:datasets.0.type")],
    ),
    "weight": (
        "llama3",
        [chat("Is it?", "WRONG", "And?", "Right.", weight=0)],
        {},
        {},
        [("error", f"ignored-mask:{KEY}"), ("note", f"unread-field:{KEY}")],
    ),
    "train": (
        "llama3",
        [chat("Is it?", "WRONG", "And?", "Right.", train=False)],
        {},
        {},
        [("error", f"ignored-mask:{KEY}"), ("note", f"unread-field:{KEY}")],
    ),
    "null-weight": (
        "llama3",
        [chat("Is it?", "Yes.", weight=None), chat("Is it?", "No.", weight=1)],
        {},
        {},
        [("note", f"unread-field:{KEY}")],
    ),
    "json-arguments": (
        "qwen3",
        [{"messages": chat("Find é.", "<think>Yes</think>", tool_calls=[TEXT_CALL])["messages"]}],
        {},
        {},
        [],
    ),
    "unread-tools": (
        "llama3",
        [row | {"tools": [TOOL]} for row in CHATS],
        {},
        {},
        [("warning", f"text-left-out:{KEY}")],
    ),
    "earlier-end": ("llama3", TURNS, {}, {"train_on_eos": "last"}, [("warning", f"end-masked:{KEY}")]),
    "lost-reasoning": ("qwen3", REASONED, {}, {}, [("warning", f"text-left-out:{KEY}")]),
    "empty-reasoning": ("qwen3", CHATS, {}, {}, [OTHER_PROMPT]),
    "null-argument": (
        "qwen3",
        [{"messages": [*chat("Find a.", "<think>Yes</think>", tool_calls=[CALL])["messages"]]}],
        {},
        {},
        [("warning", f"changed-row:{KEY}")],
    ),
    "two-bos": (
        "mistral_v1",
        [{"text": "<s>Once upon a time"}],
        {},
        {"type": "completion"},
        [("error", f"doubled-bos:{KEY}")],
    ),
    "cut-answers": (
        "llama3",
        [LONG_ANSWER, *CHATS],
        TRUNCATE,
        {},
        [("warning", f"too-long:{KEY}"), ("error", f"end-cut:{KEY}")],
    ),
    "cut-prompts": (
        "llama3",
        [LONG_PROMPT, *CHATS],
        TRUNCATE,
        {},
        [("warning", f"too-long:{KEY}"), ("error", f"end-cut:{KEY}")],
    ),
    "unset-length": (
        "llama3",
        [chat("Why?", "words and words " * 150), *CHATS],
        {"sequence_len": None},
        {},
        [("error", f"too-long:{KEY}")],
    ),
}


def test_a_cut_answer_is_told_from_a_lost_one(place, models):
    rows = [LONG_ANSWER, LONG_PROMPT, *CHATS]
    problems = [finding.problem for finding in findings_of(models["llama3"], rows, TRUNCATE, {}) if finding.line]
    assert problems == [
        "1 row: sequence_len truncates the end of the answer",
        "1 row: sequence_len truncates all of the answer",
    ]


PAIRS = [
    {
        "prompt": f"How many are {number} and one?",
        "chosen": f"{number + 1}",
        "rejected": f"{number}, as far as I can see",
    }
    for number in range(4)
]
AS_TEXT = {
    "field_prompt": "prompt",
    "prompt_format": "{prompt}\n",
    "chosen_format": "{chosen}",
    "rejected_format": "{rejected}",
}


@pytest.mark.parametrize(
    ("rows", "settings", "expected"),
    [
        (PAIRS, {}, []),  # a prompt is in the text of both answers
        ([{"answer": "Two."}], {}, []),  # `check_rows` reports such rows
        (
            PAIRS,
            {"sequence_len": 16, "excess_length_strategy": "truncate"},
            [
                "4 of 4 rows exceed sequence_len, 16: truncated",
                "4 rows (lines 1, 2, 3, 4): sequence_len truncates the end of the answer",
            ],
        ),
    ],
    ids=["sound", "unreadable", "truncated"],
)
def test_the_tokens_of_pairs_are_compared(place, models, rows, settings, expected):
    findings = findings_of(models["llama3"], rows, {"rl": "dpo"} | settings, {"type": AS_TEXT})
    assert [finding.problem for finding in findings] == expected


@pytest.mark.parametrize("case", PLANTED.values(), ids=PLANTED)
def test_a_planted_mistake_is_found(place, models, case):
    family, rows, settings, dataset, expected = case
    assert named(findings_of(models[family], rows, settings, dataset)) == expected


REMEDIES: dict[str, tuple[str, list[Row], Row, str]] = {
    "gemma": ("gemma", CHATS, {"eot_tokens": ["<end_of_turn>"]}, "set eot_tokens: [<end_of_turn>]"),
    "chatml": ("chatml", CHATS, {"eot_tokens": ["<|im_end|>"]}, "set eot_tokens: [<|im_end|>]"),
    "date": (
        "llama3_2_vision",
        CHATS,
        {"chat_template_kwargs": {"date_string": "26 Jul 2024"}},
        "set chat_template_kwargs: {date_string: 26 Jul 2024}",
    ),
    "reasoning": (
        "qwen3",
        CHATS,
        {"chat_template_kwargs": {"enable_thinking": False}},
        "set chat_template_kwargs: {enable_thinking: false}, and generate with it",
    ),
}


@pytest.mark.parametrize("case", REMEDIES.values(), ids=REMEDIES)
def test_a_remedy_removes_its_finding(place, models, case):
    family, rows, settings, remedy = case
    (before,) = findings_of(models[family], rows, {}, {})
    assert before.remedy == remedy
    after = findings_of(models[family], rows, settings, {})
    assert before.name not in [finding.name for finding in after]


def test_a_rehearsals_model_may_begin_turns_with_its_bos(place, models, monkeypatch):
    """SmolLM2's BOS is <|im_start|>: a ChatML text after a BOS, right for another model, has it twice."""
    family, rows, settings, dataset, _ = PLANTED["two-bos"]
    monkeypatch.setattr(substitution, "folder", lambda: models[family])
    assert findings_of(models[family], rows, settings, dataset) == []


def test_a_mask_is_read_under_the_name_of_the_remedy(place, models):
    error, _ = findings_of(models["llama3"], [chat("Is it?", "WRONG", "And?", "Right.", weight=0)], {}, {})
    assert error.remedy == "call it `train`, make it true or false, and set datasets.0.message_field_training: train"
    rows = [chat("Is it?", "WRONG", "And?", "Right.", train=False), *CHATS]
    assert findings_of(models["llama3"], rows, {}, {"message_field_training": "train"}) == []


def test_a_remedy_is_tried_on_a_row_with_the_fault(place):
    header = "{{ 'model' if add_generation_prompt and messages | length > 1 else 'assistant' }}"
    turn = TURN.replace("{{ message.role }}", "{{ message.role if message.role == 'user' else 'assistant' }}")
    end = END.replace("assistant", header)
    model = chat_models.save(Path("model"), "llama3", f"{BEGIN}{turn}{end}")
    finding, *_ = findings_of(model, [*CHATS, chat("Is it?", "Yes.", "And?", "No.")], {}, {})
    assert (finding.rule, finding.line) == ("other-prompt", 5)
    assert finding.remedy == "generate with the training prompt"


def test_text_between_answer_and_end_is_no_other_prompt(place):
    turn = TURN.replace("<|eot_id|>", "\n<|eot_id|>")
    model = chat_models.save(Path("model"), "llama3", f"{BEGIN}{turn}{END}")
    assert findings_of(model, CHATS, {}, {}) == []


BEGIN = "{{ bos_token }}{% for message in messages %}"
END = "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>{% endif %}"
TURN = "<|start_header_id|>{{ message.role }}<|end_header_id|>{{ message.content }}<|eot_id|>"
INVENTED = {  # templates, each with a mistake that no rule names
    "lower-case": (TURN.replace("message.content", "message.content | lower"), f"text-left-out:{KEY}"),
    "cut-text": (TURN.replace("message.content", "message.content[:9]"), f"text-left-out:{KEY}"),
    "no-questions": (f"{{% if message.role != 'user' %}}{TURN}{{% endif %}}", f"text-left-out:{KEY}"),
    "other-header": (TURN.replace("message.role ", "message.role[:4] "), f"other-prompt:{KEY}"),
    "open-chat": (TURN.replace("<|eot_id|>", "{{ '<|eot_id|>' if not loop.last }}"), "eos-masked:datasets.0.type"),
    "repeated-question": (f"{TURN}{{% if message.role == 'user' %}}{TURN}{{% endif %}}", f"repeated-text:{KEY}"),
    "silent-end": (TURN.replace("<|eot_id|>", ""), "eos-masked:datasets.0.type"),
    "year": (f"{{{{ strftime_now('%Y') if loop.first }}}}{TURN}", "dated-template:chat_template"),
}


@pytest.mark.parametrize("case", INVENTED.values(), ids=INVENTED)
def test_a_mistake_of_any_template_is_found(place, case):
    turn, name = case
    model = chat_models.save(Path("model"), "llama3", f"{BEGIN}{turn}{END}")
    assert name in [finding.name for finding in findings_of(model, CHATS, {}, {})]


def test_a_template_that_takes_no_prompt_without_a_question(place):
    """Such a chat is trained on, but no prompt can be compared."""
    refusal = "{% if add_generation_prompt and messages[-1].role != 'user' %}{{ raise_exception('ask') }}{% endif %}"
    model = chat_models.save(Path("model"), "llama3", f"{BEGIN}{TURN}{END}{refusal}")
    greeting = {"messages": [{"role": "system", "content": "Greet."}, {"role": "assistant", "content": "Hello."}]}
    assert findings_of(model, [greeting, *CHATS], {}, {}) == []


def write(name: str, rows: list[Row]) -> Row:
    """A data set in a new file."""
    table = Dataset.from_list(rows)
    match Path(name).suffix:
        case ".jsonl":
            write_rows(Path(name), rows)
        case ".json":
            Path(name).write_text(json.dumps(rows))
        case ".parquet":
            table.to_parquet(name)
        case ".csv":
            table.to_csv(name)
    return {"path": name, "type": "chat_template" if "messages" in rows[0] else "alpaca"}


@pytest.mark.parametrize("name", ["rows.jsonl", "data.json", "data.parquet"])
def test_rows_are_drawn_over_the_file(place, models, name):
    rows = [chat("Is it?", "Yes.") for _ in range(399)]
    rows[350] = chat("Is it?", "WRONG", weight=0)
    (error, _) = findings_of(models["llama3"], rows, {}, write(name, rows))
    assert (error.rule, error.where, error.line) == ("ignored-mask", name, 351)


QUESTIONS = [{"instruction": f"Double {number}.", "input": "", "output": f"It is {2 * number}."} for number in range(6)]


@pytest.mark.parametrize("training", ["rows.jsonl", "train.csv"])
@pytest.mark.parametrize("test", ["test.jsonl", "test.json", "test.parquet", "test.csv"])
def test_evaluation_rows_are_compared_with_training_rows_of_any_format(place, models, training, test):
    trained = write(training, QUESTIONS[:4])
    settings = {"test_datasets": [write(test, [QUESTIONS[5], QUESTIONS[2]]) | {"split": "train"}]}
    (warning,) = findings_of(models["llama3"], QUESTIONS[:4], settings, trained)
    assert str(warning) == (
        f"{test}:2: warning: test_datasets.0.path: 1 row also in the training data: scores mean little ({training}:3); "
        "drop them from it [leaked-row:test_datasets.0.path]"
    )


def test_a_row_of_a_table_that_axolotl_cannot_read_is_named_by_its_field(place, models):
    entry = write("rows.csv", [{"instruction": "Double 1.", "output": 2}, {"instruction": "Double 2.", "output": 4}])
    (error,) = findings_of(models["llama3"], [], {}, entry)
    assert str(error) == (
        "rows.csv:1: error: datasets.0.path: 2 rows (lines 1, 2): the field output is not text; correct the rows, the "
        "type or the template [bad-row:datasets.0.path]"
    )


def test_parts_of_a_file_are_compared_as_axolotl_takes_them(place, models):
    entry = write("rows.jsonl", QUESTIONS)
    settings = {"test_datasets": [entry | {"split": "train[4:]"}]}
    parts = [
        findings_of(models["llama3"], QUESTIONS, settings, entry | {"split": part})
        for part in ("train[:4]", "train[:5]")
    ]
    assert [list(map(str, findings)) for findings in parts] == [
        [],
        ["rows.jsonl:1: warning: test_datasets.0.path: 1 row also in the training data: scores mean little "
         "(rows.jsonl:5); drop them from it [leaked-row:test_datasets.0.path]"],
    ]  # fmt: skip
    assert check_rows({"datasets": [entry | {"split": "train[:4]"}], **settings})[0] == []
