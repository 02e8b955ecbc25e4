"""Paths, hosts and accounts in a config: the table of their keys, and the values that need consent."""

import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
from conftest import config_with, typed

from qlora_recipes.base import yamlfiles
from qlora_recipes.check import check, code_rules, schema
from qlora_recipes.config import consent
from qlora_recipes.config.compose import Request

TRUST = (Path(__file__).parents[2] / "docs/trust.md").read_text()
CALLED_SO = re.compile(r"(.*[._])?(dir|paths?|files?|outfile|datasets?|tasks|host|url|uri|id|entity|workspace|hub)")
"""Names that look like those of paths, hosts and accounts."""
IDS = {"comet_experiment_key", "wandb_run_id", "hatchery.project_id"}  # of a run or a project


def text_keys(node: dict[str, Any], key: str = "", is_open: bool = False) -> Iterator[tuple[str, bool]]:
    """Dotted keys of a schema that take any text, each with True if the schema leaves the names of the keys open."""
    while "$ref" in node:
        node = schema.load()["$defs"][node["$ref"].rpartition("/")[2]]
    for alternative in node.get("anyOf", []):
        yield from text_keys(alternative, key, is_open)
    for name, below in node.get("properties", {}).items():
        yield from text_keys(below, f"{key}.{name}" if key else name, is_open)
    more = node.get("additionalProperties", "properties" not in node)
    kind = node.get("type")
    if kind == "object" and more:
        yield from text_keys(more if isinstance(more, dict) else {}, f"{key}.x", is_open=True)
    elif kind == "array":
        yield from text_keys(node.get("items", {}), f"{key}.0", is_open)
    elif kind in ("string", None) and not node.keys() & {"enum", "anyOf", "properties", "const"}:
        yield key, is_open


TEXT_KEYS = dict(text_keys(schema.load()))


def is_named(key: str, is_open: bool) -> bool:
    """True if a list of harmless keys has this name; names that the schema leaves open can be patterns."""
    first, dot, rest = re.sub(r"\.\d+(?=\.|$)", "", key).partition(".")
    name = f"{code_rules._ALIASES.get(first, first)}{dot}{rest}"
    names = code_rules._PLAIN.split()
    return name in (*names, *code_rules._patterns()) or (is_open and any(fnmatchcase(name, one) for one in names))


def test_each_key_that_takes_text_is_listed_or_refused():
    unlisted = [key for key, is_open in TEXT_KEYS.items() if not (consent.entry_of(key) or is_named(key, is_open))]
    assert [key for key in unlisted if code_rules._is_harmless(key, "text")] == []


def test_the_schema_is_walked_to_its_leaves():
    assert len(TEXT_KEYS) > 250
    keys = {"mlflow_tracking_uri", "datasets.0.path", "dynamic_checkpoint.trigger_file_path", "trl.vllm_server_host"}
    assert keys < TEXT_KEYS.keys()


def test_each_key_in_the_table_is_one_of_the_schema_or_of_a_file():
    names = [re.sub(r"\.0(?=\.|$)", "", key) for key in TEXT_KEYS]
    for key in consent.table():
        top = key.partition(".")[0]
        assert key in names or top in ("adapter_config", "deepspeed", "comet_experiment_config"), key


def kinds_in_the_docs() -> dict[str, set[str]]:
    """Keys of each row of the table in docs/trust.md, by the kind in its first cell."""
    rows = [row.strip("|").split("|") for row in TRUST.partition("## Paths, hosts")[2].splitlines() if row[:1] == "|"]
    return {row[0].strip(): set(re.findall("`([^`]+)`", row[1])) for row in rows[2:]}


def test_the_docs_list_each_path_host_and_account():
    documented = kinds_in_the_docs()
    refused = documented.pop("code")
    expected: dict[str, set[str]] = {}
    for key, entry in consent.table().items():
        top, _, rest = key.partition(".")
        name = f"datasets.{rest}" if top in ("test_datasets", "pretraining_dataset") else key
        expected.setdefault(entry["kind"], set()).add(name)
    assert documented == expected
    assert [key for key in refused if code_rules._is_harmless(key, "x")] == []
    listed = {*consent.table(), *refused, *IDS}
    looks_so = {re.sub(r"\.0(?=\.|$)", "", key) for key in TEXT_KEYS if CALLED_SO.fullmatch(key)}
    assert looks_so - listed == set()


def needs_consent(key: str, value: Any) -> bool:
    return bool(consent.required(key, value))


@pytest.mark.parametrize(
    ("key", "free", "bound"),
    [
        ("datasets.3.path", ["/data/rows.jsonl", "s3://x/y", "owner/rows"], []),
        ("output_dir", ["/workspace/out", "./out"], []),
        ("dynamic_checkpoint.trigger_file_path", ["", "save.now"], ["/a", "../a", "..", "~", "a/b", ".", "a\n/b"]),
        ("mlflow_tracking_uri", ["databricks"], ["HTTP://x", "https://x", "sqlite:////home/x.db", "./mlruns"]),
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
    assert [value for value in free if needs_consent(key, value)] == []
    assert [value for value in bound if not needs_consent(key, value)] == []


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
        assert needs_consent(key, str(file)) is not is_free
        assert not needs_consent(key, text)  # as the text itself


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
    assert [name for name, _ in consent.remote_trackers(config)] == ["mlflow"] * is_remote
