"""The table of Axolotl's keys, against the installed schema; and the values that need consent."""

import re
from collections.abc import Iterator
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import pytest
from conftest import config_with, typed
from pydantic import BaseModel, ConfigDict

from qlora_recipes.base import yamlfiles
from qlora_recipes.check import check, code_rules, schema
from qlora_recipes.check.rule import Case
from qlora_recipes.config import keys
from qlora_recipes.config.compose import Request

PATHS = (Path(__file__).parents[2] / "docs/how/paths.md").read_text()
CALLED_SO = re.compile(r"(.*[._])?(dir|paths?|files?|outfile|datasets?|tasks|host|url|uri|id|entity|workspace|hub)")
"""Names that look like those of paths, hosts and accounts."""
IDS = {"comet_experiment_key", "wandb_run_id", "hatchery.project_id"}  # of a run or a project
NOT_IN_THE_SCHEMA = ("*", "adapter_config", "task_file")  # any mapping; files of PEFT and the harness


class Line(BaseModel):
    """A line of the table, with the words that each column allows."""

    model_config = ConfigDict(extra="forbid")

    affects: Literal[
        *("model", "rows", "order", "evaluated", "packing", "batches", "training"),
        *("memory", "speed", "output", "upload", "tracking", "run", "unused"),
    ]
    kind: Literal["number", "plain", "code", "data", "read", "ignored", "content", "write", "host", "account"]
    does: str
    level: Literal["error", "note"]
    allowed: re.Pattern[str]
    starts: Literal["", "comet", "mlflow", "swanlab", "trackio", "wandb"]
    local: re.Pattern[str] | None
    one_model: bool
    untraced: Literal["", "less", "more"]
    like: Literal["", "datasets", "overrides_of_model_config", "overrides_of_model_kwargs"]


def leaves(node: dict[str, Any], key: str = "") -> Iterator[tuple[str, bool]]:
    """Keys of a schema, each with True if it takes text; * where the schema leaves the name open."""
    while "$ref" in node:
        node = schema.load()["$defs"][node["$ref"].rpartition("/")[2]]
    for alternative in node.get("anyOf", []):
        yield from leaves(alternative, key)
    for name, below in node.get("properties", {}).items():
        yield from leaves(below, f"{key}.{name}" if key else name)
    more = node.get("additionalProperties", "properties" not in node)
    kind = node.get("type")
    if kind == "object" and more:
        yield from leaves(more if isinstance(more, dict) else {}, f"{key}.*")
    elif kind == "array":
        yield from leaves(node.get("items", {}), key)
    elif not node.keys() & {"anyOf", "properties"} and kind != "null":
        yield key, kind in ("string", None)
        if not node.keys() & {"type", "enum", "const"}:  # any value
            yield f"{key}.*", True


def leaves_of(content: dict[str, Any]) -> dict[str, bool]:
    """Keys of a schema that take text, a number or a switch, each with True if it takes text."""
    result: dict[str, bool] = {}
    for key, takes_text in leaves(content):
        result[key] = takes_text or result.get(key, False)
    return result


LEAVES = leaves_of(schema.load())


def line_of(key: str) -> str:
    """Name of the line for a key of the schema: its own, or else that of the key that it is like."""
    first, dot, rest = key.partition(".")
    like = keys.table().get(first, keys.WITHOUT_LINE).like
    return f"{like}{dot}{rest}" if like and key not in keys.table() else key


def without_line(content: dict[str, Any]) -> list[str]:
    """Keys of a schema without a line; those that the schema leaves open need none."""
    names = {*content["properties"], *(key for key in leaves_of(content) if "*" not in key)}
    lacking = []
    for key in sorted(names):
        if key.partition(".")[0] not in keys.table() or (
            line_of(key) not in keys.table() and f"*.{key.rpartition('.')[2]}" not in keys.table()
        ):
            lacking.append(key)
    return lacking


def test_each_key_of_the_schema_has_a_line():
    assert len(LEAVES) > 800
    assert without_line(schema.load()) == []


def test_a_key_that_a_new_schema_has_is_missed():
    content = schema.load()
    trl = content["$defs"]["TRLConfig"]
    below = trl["properties"] | {"judge": {"type": "string"}}
    defs = content["$defs"] | {"Planted": trl | {"properties": below}}
    planted = {"new_key": {"type": "boolean"}, "trl": {"$ref": "#/$defs/Planted"}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(content, "$defs", defs)
        lacking = without_line(content | {"properties": content["properties"] | planted})
    assert set(lacking) - {*without_line(content)} == {"new_key", "trl.judge"}


@pytest.mark.parametrize("key", ["new_key", "trl.judge", "overrides_of_model_kwargs.new", "deepspeed.new"])
def test_a_key_without_a_line_may_run_code(key):
    assert keys.find(key) == keys.WITHOUT_LINE
    assert not keys.find(key).allows("text")
    assert keys.find(key).kind == "code"


def test_a_key_without_a_line_affects_rows():
    assert keys.affects("new_key.below") == "rows"


def test_each_line_is_a_key_of_the_schema():
    resolved = {line_of(key) for key in LEAVES} | {*schema.load()["properties"]}
    opened = tuple(key.removesuffix("*") for key in resolved if key.endswith(".*"))
    for key in keys.table():
        is_open = key.startswith(opened) or key.partition(".")[0] in NOT_IN_THE_SCHEMA
        assert key in resolved or is_open, key


def test_text_has_a_kind():
    texts = {line_of(key) for key, takes_text in LEAVES.items() if takes_text and "*" not in key}
    assert [key for key in texts if key in keys.table() and keys.table()[key].kind == "number"] == []


def test_lines_are_sorted_and_of_closed_sets_of_words():
    assert list(keys.table()) == sorted(keys.table())
    for key, line in keys.table().items():
        Line.model_validate(asdict(line))
        assert bool(line.does) == (line.kind in ("content", "write", "host", "account")), key
        assert line.level == "error" or line.does, key
        assert line.affects == keys.Key.affects or "." not in key, key


def test_kinds_of_data_sets():
    """The types of data sets in the schema are those that Axolotl brings."""
    types = set()
    for name in ("SFTDataset", "DPODataset", "KTODataset"):
        types.update(schema.load()["$defs"][name]["properties"]["type"]["anyOf"][0]["enum"])
    assert [name for name in types if not keys.find("datasets.0.type").allows(name)] == []
    assert not keys.find("datasets.0.type").allows("my.module")


def kinds_in_the_docs() -> dict[str, set[str]]:
    """Keys of each row of the table in docs/how/paths.md, by the kind in its first cell."""
    rows = [row.strip("|").split("|") for row in PATHS.splitlines() if row[:1] == "|"]
    return {row[0].strip(): set(re.findall("`([^`]+)`", row[1])) for row in rows[2:]}


def test_the_docs_list_each_path_host_and_account():
    documented = kinds_in_the_docs()
    refused = documented.pop("code")
    expected: dict[str, set[str]] = {}
    for key, line in keys.table().items():
        if line.kind not in ("number", "plain", "code") and not key.startswith("pretraining_dataset"):
            expected.setdefault(line.kind, set()).add(key)
    assert documented == expected
    assert [key for key in refused if keys.find(key).is_harmless("x")] == []
    listed = {*chain(*expected.values()), *refused, *IDS}
    looks_so = {line_of(key) for key, takes_text in LEAVES.items() if takes_text and CALLED_SO.fullmatch(key)}
    assert looks_so - listed == {"pretraining_dataset.path"}


def without_consent(key: str, value: Any) -> list[str]:
    """Problems of the rule of this name in a config with one key."""
    for part in reversed(key.split(".")):
        value = [*({},) * int(part), value] if part.isdecimal() else {part: value}
    case = Case(written=value, config=value, wrong=set())
    return [problem for _, _, problem, _ in code_rules.without_consent(case)]


@pytest.mark.parametrize(
    ("key", "free", "bound"),
    [
        ("datasets.3.path", ["/data/rows.jsonl", "s3://x/y", "owner/rows"], []),
        ("output_dir", ["/workspace/out", "./out"], []),
        ("dynamic_checkpoint.trigger_file_path", ["", "save.now"], ["/a", "../a", "..", "~", "a/b", ".", "a\n/b"]),
        ("mlflow_tracking_uri", ["databricks", "./mlruns"], ["HTTP://x", "sqlite:////home/x.db", "../runs", "/x"]),
        ("swanlab_api_host", ["https://api.swanlab.cn/api", "HTTPS://SwanLab.cn"],
         ["https://swanlab.cn.x.org", "https://swanlab.cn@x.org", "http://swanlab.cn", "https://api.swanlab.cn:1@x/"]),
        ("trl.vllm_server_host", ["0.0.0.0", "LOCALHOST"], ["127.0.0.1.x.org", "10.0.0.1"]),
        ("otel_metrics_host", ["localhost"], ["0.0.0.0"]),
        ("trackio_space_id", ["mine"], ["theirs/space", "https://x.org"]),
        ("hub_model_id", ["mine"], ["theirs/model"]),
        ("wandb_entity", [""], ["team"]),
        ("wandb_project", ["theirs", "https://x.org"], []),
        ("deepspeed.zero_optimization.offload_param.nvme_path", [], ["/home/x", "nvme"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_what_needs_consent(key, free, bound):
    assert [value for value in free if without_consent(key, value)] == []
    assert [value for value in bound if not without_consent(key, value)] == []


def test_what_the_user_sets_needs_no_consent(place):
    theirs = {"mlflow_tracking_uri": "https://theirs.org", "wandb_entity": "theirs"}
    Path("theirs.yaml").write_text(yamlfiles.write_yaml(config_with(theirs)))
    Path("mine.yaml").write_text("wandb_entity: mine\n")
    profiles, overrides = ["mlflow", "mine.yaml"], typed("dynamic_checkpoint.trigger_file_path=/mine")

    def names(**more: Any) -> list[str]:
        report = check.check_request(Request("theirs.yaml", **more))
        return [f"{one.level} {one.name}" for one in report.findings if one.rule == "without-consent"]

    assert names() == ["error without-consent:mlflow_tracking_uri", "note without-consent:wandb_entity"]
    assert names(profiles=profiles, overrides=overrides) == []
    forced = names(force=["without-consent:mlflow_tracking_uri"])
    assert forced == ["warning without-consent:mlflow_tracking_uri", "note without-consent:wandb_entity"]


CHATML = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@pytest.mark.parametrize(
    ("name", "text", "is_free"),
    [
        ("chat.jinja", CHATML, True),
        ("chat.jinja2", "{{ bos_token }}{%- set turns =\n messages[1:] %}", True),
        ("chat.txt", CHATML, False),
        ("credentials.json", '{"token": "{{ messages }}"}', False),
        ("link.jinja", '{"messages": [{"token": "x"}], "note": "{{ x }}"}', False),
        ("link.jinja", "-----BEGIN OPENSSH PRIVATE KEY-----", False),
    ],
)
def test_the_file_of_a_chat_template_has_its_name_and_form(tmp_path, name, text, is_free):
    file = tmp_path / name
    file.write_text(text)
    for key in ("chat_template_jinja", "datasets.0.chat_template_jinja", "test_datasets.1.chat_template_jinja"):
        assert bool(without_consent(key, str(file))) is not is_free
        assert not without_consent(key, text)  # as the text itself


@pytest.mark.parametrize(
    ("uri", "is_remote"),
    [
        ("HTTP://127.0.0.1:1", True),
        ("https://x.org", True),
        ("databricks", True),
        ("postgresql://x.org/db", True),
        ("sqlite:///{runs}/mlflow.db", False),
        ("./mlruns", False),
    ],
)
def test_which_store_of_mlflow_is_a_server(uri, is_remote):
    config = {"use_mlflow": True, "mlflow_tracking_uri": uri}
    assert [name for name, _ in keys.remote_trackers(config)] == ["mlflow"] * is_remote
