"""Rows of chats and segments: what is found of each, and that Axolotl fails and drops as is said."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import Recipe, config_with

from qlora_recipes.base import yamlfiles
from qlora_recipes.base.errors import UserError
from qlora_recipes.checks import rows, turns

Row = dict[str, Any]


def said(role: str, content: Any, **more: Any) -> Row:
    return {"role": role, "content": content} | more


ASKED, ANSWER, SYSTEM = said("user", "What is it?"), said("assistant", "A test."), said("system", "Be brief.")
CALLS = [{"type": "function", "function": {"name": "look", "arguments": {"at": "it"}}}]
PARTS = [{"type": "text", "text": "A test."}]


def chat(*messages: Any, **fields: Any) -> Row:
    return {"messages": list(messages)} | fields


def found(
    lines: list[Any], dataset: dict[str, Any] | None = None, template: str = "chatml", test: list[Any] | None = None
) -> list[str]:
    """The findings for a training file of some rows, without their file's name, and for evaluation rows."""
    config: dict[str, Any] = {"chat_template": template}
    for section, some in (("datasets", lines), ("test_datasets", test or [])):
        file = Path(f"{section}.jsonl")
        file.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in some))
        config[section] = [{"path": str(file), "type": "chat_template"} | (dataset or {})] if some else []
    return [str(finding).partition(".jsonl:")[2] for finding in rows.check(config)[0]]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"text": "a"}, "2: error: datasets.0.path: 1 row with no list in the field messages;"),
        ({"conversations": [ASKED]}, "no list in the field messages, but one in conversations: set field_messages"),
        ({"mesages": [ASKED]}, "no list in the field messages, but one in mesages: set field_messages"),
        (chat(), "1 row with no list in the field messages"),
        (chat(ASKED, "A test."), "1 row with a message in messages that is no mapping"),
        (chat({"content": "a"}, ANSWER), "1 row with nothing in role of a message"),
        (chat(said("user", None), ANSWER), "1 row with nothing in content of a message"),
        (chat({"role": "user", "contnet": "a"}, ANSWER), "nothing in content of a message, but with contnet"),
        (chat(said("user", 3), ANSWER), "1 row with no text in content of a message"),
        (chat({"from": "human", "value": "a"}), "but with from and value: set message_property_mappings"),
        (chat(ASKED, said("assistant", ["A test."])), "a content in parts that are no mappings"),
        (chat(ASKED, ANSWER, tools="look"), "1 row with no list in the field tools"),
        (chat(ASKED, {"role": "assistant", "tool_calls": CALLS}), "refuses: 'dict object' has no attribute 'content'"),
        (chat(ASKED, said("assistant", " \n")), "warning: datasets.0.path: 1 row with an empty turn of assistant"),
        (chat(ASKED, said("assistant", [])), "1 row with an empty turn of assistant"),
        (chat(ASKED), "warning: datasets.0.path: 1 row without any turn of assistant: nothing is learnt"),
        (chat(ASKED, ANSWER, ASKED), "1 row ending with a turn of user, of which nothing is learnt"),
        (chat(ASKED, SYSTEM, ANSWER), "1 row with a turn of system that is not the first"),
        (chat(SYSTEM, ANSWER, ASKED, ANSWER), "1 row with a turn of assistant before any other"),
        (chat(ASKED, ASKED, ANSWER), "1 row with two turns of user in a row"),
        (chat(ASKED, ANSWER, said("observer", "a"), ANSWER), "neither roles nor the template names (observer)"),
        (chat(ASKED, said("Assistant", "a"), ASKED, ANSWER), "the role Assistant; did you mean assistant?"),
        (chat(ASKED, ANSWER, sytem="Be brief."), "the field sytem, which is not read; did you mean system?"),
        (
            chat(ASKED, said("assistant", "a", tool_call=CALLS)),
            "tool_call in a message, which Axolotl does not read; did you mean tool_calls?",
        ),
        (chat(said("user", "a<|im_end|>"), ANSWER), "1 row with <|im_end|>, which the prompt uses itself"),
    ],
)
def test_a_chat_that_spoils_a_training_is_found_with_its_line(row: Row, says: str) -> None:
    (only,) = found([chat(said("user", "Fine?"), ANSWER), row])
    assert says in only
    assert only.startswith("2: ")


SHAREGPT = {"field_messages": "conversations", "message_property_mappings": {"role": "from", "content": "value"}}
OLDER = {"field_messages": "conversations", "message_field_role": "from", "message_field_content": "value"}
SHARED = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}


@pytest.mark.parametrize(
    ("row", "dataset"),
    [
        (chat(SYSTEM, ASKED, ANSWER, ASKED, ANSWER), {}),
        (chat(said("human", "a"), said("gpt", "b")), {}),
        (chat(said("user", PARTS), said("assistant", PARTS)), {}),
        (chat(ASKED, said("assistant", "", tool_calls=CALLS), said("tool", "a"), said("tool", "b"), ANSWER), {}),
        (chat(ASKED, ANSWER, tools=[{"type": "function", "function": {"name": "look"}}]), {}),
        ({"messages": json.dumps([ASKED, ANSWER])}, {}),
        (SHARED, SHAREGPT),
        (SHARED, OLDER),
        (chat(said("q", "a"), said("a", "b")), {"roles": {"user": ["q"], "assistant": ["a"]}}),
        (chat(ASKED, ANSWER, ASKED), {"roles_to_train": ["user"]}),
        (chat(ASKED, ANSWER | {"train": False}, ASKED | {"train": True}), {"message_field_training": "train"}),
        (chat(ASKED, ANSWER, more="x", id=3), {}),
        (chat(said("user", "[INST] ### Response: <|user|> <image>"), ANSWER), {}),
    ],
)
def test_chats_that_are_right_give_no_finding(row: Row, dataset: dict[str, Any]) -> None:
    assert found([row], dataset) == []


def test_a_template_that_wants_an_order_refuses_another() -> None:
    assert found([chat(ASKED, ANSWER)], template="gemma") == []
    (system,) = found([chat(ASKED, ANSWER), chat(SYSTEM, ASKED, ANSWER)], template="gemma")
    assert "2: error: datasets.0.path: 1 row that the chat template refuses: System role not supported" in system
    (order,) = found([chat(ASKED, ASKED, ANSWER)], template="mistral_v1")
    assert "refuses: After the optional system message, conversation roles must alternate" in order


def test_markers_are_those_of_the_template_that_is_used() -> None:
    row = chat(said("user", "a [/INST] <|im_end|> <end_of_turn> <|image|>"), ANSWER)
    for template, marker in (("mistral_v1", "[/INST]"), ("chatml", "<|im_end|>"), ("gemma", "<end_of_turn>")):
        (only,) = found([row], template=template)
        assert f"1 row with {marker}, which" in only
    (own,) = found([chat(said("user", "a ## q"), ANSWER, b="<|q|>"), chat(said("user", "<|q|>"), ANSWER)], JINJA)
    assert own.startswith("2: ")


JINJA = {"chat_template": "jinja", "chat_template_jinja": "{% for m in messages %}<|q|>{{ m.content }}{% endfor %}"}


def test_the_same_chat_is_found_whatever_its_spelling() -> None:
    turned = {"messages": [dict(reversed(turn.items())) for turn in (ASKED, ANSWER)]}
    spaced = json.dumps(chat(ASKED, ANSWER), indent=None, separators=(" , ", " : "))
    other = chat(ASKED, said("assistant", "An exam."))
    (repeated,) = found([chat(ASKED, ANSWER), turned, spaced, other])
    assert "2: warning: datasets.0.path: 2 rows seen before (datasets.jsonl:1) [repeated-row" in repeated
    (leaked,) = found([chat(ASKED, ANSWER)], test=[other, turned])
    assert "2: warning: test_datasets.0.path: 1 row that the training data has too" in leaked


def test_a_system_text_that_only_some_rows_have_is_an_error() -> None:
    plain, with_system = chat(ASKED, ANSWER), chat(said("user", "And?"), ANSWER, system="Be brief.")
    (only,) = found([plain, with_system])
    assert "1: error: datasets.0.path: 1 row without text in system, which other rows have" in only
    assert found([chat(SYSTEM, ASKED, ANSWER), with_system]) == []


def test_a_file_of_which_nothing_is_learnt_is_an_error() -> None:
    (only,) = found([chat(ASKED), chat(said("user", "And?"))])
    assert "1: error: datasets.0.path: 2 rows without any turn of assistant" in only


@pytest.mark.parametrize(
    ("segments", "says"),
    [
        (None, "error: datasets.0.path: 1 row with no list in the field segments"),
        (["a"], "1 row with a segment that is no mapping"),
        ([{"text": "a"}], "1 row with a segment with nothing in label"),
        ([{"lable": True, "text": "a"}], "a segment with nothing in label, but with lable"),
        ([{"label": "false", "text": "a"}], "a segment with neither true nor false in label"),
        ([{"label": True, "text": 3}], "a segment with no text in text"),
        ([{"label": False, "text": "a"}], "1 row without any text whose label is true: nothing is learnt"),
        ([{"label": True, "text": "good"}], "1 row seen before"),
    ],
)
def test_segments_that_spoil_a_training_are_found(segments: Any, says: str) -> None:
    good = {"segments": [{"label": True, "text": "good"}]}
    (only,) = found([good, {"segments": segments}], {"type": "input_output"})
    assert says in only
    assert only.startswith("2: ")


def test_special_tokens_of_segments_are_meant() -> None:
    good = {"segments": [{"label": False, "text": "<s>a"}, {"label": True, "text": "b</s>"}], "more": 1}
    Path("rows.jsonl").write_text(json.dumps(good) + "\n")
    data = {"path": "rows.jsonl", "type": "input_output"}
    assert rows.check({"base_model": "meta-llama/Llama-2-7b-hf", "datasets": [data]})[0] == []


# what Axolotl itself makes of rows: it fails, drops the row since nothing is learnt, or learns something
OUTCOMES: list[tuple[str, Any, str]] = [
    ("chat_template", chat(ASKED, ANSWER), "learns"),
    ("chat_template", {"text": "a"}, "fails"),
    ("chat_template", chat(), "fails"),
    ("chat_template", chat({"content": "a"}, ANSWER), "fails"),
    ("chat_template", chat(ASKED, {"role": "assistant"}), "fails"),
    ("chat_template", chat(ASKED, {"role": "assistant", "tool_calls": CALLS}), "fails"),
    ("chat_template", chat(said("user", PARTS), said("assistant", PARTS)), "learns"),
    ("chat_template", chat(ASKED, said("assistant", "")), "drops"),
    ("chat_template", chat(said("user", ["a"]), said("assistant", ["b"])), "drops"),
    ("chat_template", chat(ASKED), "drops"),
    ("chat_template", chat(said("User", "a"), said("Assistant", "b")), "drops"),
    ("chat_template", chat(ASKED, ASKED, ANSWER), "learns"),
    ("chat_template", chat(ANSWER, ASKED), "learns"),
    ("gemma", chat(ASKED, ASKED, ANSWER), "fails"),
    ("gemma", chat(SYSTEM, ASKED, ANSWER), "fails"),
    ("input_output", {"segments": [{"label": False, "text": "a"}, {"label": True, "text": "b"}]}, "learns"),
    ("input_output", {"segments": [{"text": "a"}]}, "fails"),
    ("input_output", {"segments": [{"label": False, "text": "a"}]}, "drops"),
]


@pytest.mark.parametrize(("kind", "row", "outcome"), OUTCOMES)
def test_axolotl_fails_and_drops_as_is_said(kind: str, row: Row, outcome: str, tiny: Path) -> None:
    from axolotl.utils.dict import DictDefault
    from transformers import AutoTokenizer

    from qlora_recipes.checks.tokens import tokenize

    template, kind = (kind, "chat_template") if kind == "gemma" else ("chatml", kind)
    dataset = {"path": "x", "type": kind, "chat_template": template, "message_property_mappings": {}}
    cfg = DictDefault(sequence_len=512, train_on_inputs=False, chat_template=template)
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    try:
        (only,) = tokenize("x", cfg, DictDefault(dataset), tokenizer, [row], 512)
        got = "learns" if only.learnt else "drops"
    except UserError:
        got = "fails"
    assert got == outcome
    says = " ".join(found([row], {"type": kind}, template))
    if outcome == "fails":
        assert "error: " in says
    else:
        nothing = "nothing is learnt" in says or "bad-row" in says
        assert nothing == (outcome == "drops" or row["messages" if "messages" in row else "segments"][-1] == ASKED)


def test_a_run_does_not_start_with_a_chat_that_would_fail_it(recipe: Recipe, tiny: Path, tmp_path: Path) -> None:
    data = [{"path": "rows.jsonl", "type": "chat_template"}]
    change = {"base_model": str(tiny), "revision_of_model": None, "chat_template": "gemma"}
    own = config_with(change | {"datasets": data, "test_datasets": None, "val_set_size": 0.5})
    (tmp_path / "own.yaml").write_text(yamlfiles.write_yaml(own))
    lines = [chat(ASKED, ANSWER), chat(SYSTEM, ASKED, ANSWER)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    done = recipe("run", "own.yaml")
    assert done.returncode == 2
    assert "rows.jsonl:2: error: datasets.0.path: 1 row that the chat template refuses: System role" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_templates_are_axolotls() -> None:
    from axolotl.utils import chat_templates

    own = {name: file.read_text() for name, file in turns.template_files().items()}
    assert own == chat_templates.base._CHAT_TEMPLATES
    assert all(turns.compiled(text) for text in own.values())


@pytest.mark.parametrize("name", ["alpaca", "chatml", "gemma", "llama3", "mistral_v1", "phi_3", "qwen3", "deepseek_v2"])
def test_a_rendered_chat_has_the_markers_of_its_template(name: str) -> None:
    text = turns.template_files()[name].read_text()
    special = {"bos_token": "", "eos_token": ""}
    rendered = turns.compiled(text).render(messages=[ASKED, ANSWER], add_generation_prompt=False, **special)
    markers = turns.markers_in(text)
    assert sum(marker in rendered for marker in markers) >= 2
