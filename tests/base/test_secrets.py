"""No secret that is planted in a config is written anywhere, or echoed."""

import time

import pytest
from conftest import config_with, typed

from qlora_recipes.base import yamlfiles
from qlora_recipes.base.secrets import MASK, is_secret, masked, masked_comments, without_secrets
from qlora_recipes.check import check
from qlora_recipes.config import compose, finding
from qlora_recipes.run import run

NAME = "haider2024/code-llama-7b"
TOKEN = "hf_" + "aB3" * 8
SWEEP = "sweep --rehearse --set lora_r=8,9"
COMMANDS = ["check", "check --json", "plan", "run --rehearse", "new x --from", SWEEP]
SECRETS = (TOKEN, "planted", "my-own-secret")
PLANTED: list[tuple[str, str]] = [
    ("model_kwargs.token", "planted-word"),
    ("tokenizer_kwargs.api-key", "planted-word"),
    ("optim_args", '"betas=1,token=....planted-word"'),
    ("hub_token", "planted-word"),
    ("wandb_name", TOKEN),
    ("mlflow_tracking_uri", "https://user:planted/word@example.org"),
    ("model_kwargs.headers.Authorization", "planted-word"),
    ("model_kwargs.credentials.user", "planted-word"),
    ("mlflow_tracking_uri", "https://example.org/?X-Amz-Signature=planted-word"),
]


@pytest.mark.parametrize(("key", "value"), PLANTED)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_planted_secret_is_refused_and_not_echoed(place, recipe, command, key, value):
    words = command.split()
    name = words.index("--from") + 1 if "--from" in words else 1
    words[name:name] = [NAME]
    option = ["--set", f"{key}={value}"]
    if command == SWEEP:  # whose own --set takes several values
        parent, _, last = key.rpartition(".")
        (place / "more.yaml").write_text(yamlfiles.write_yaml({parent: {last: value}} if parent else {last: value}))
        option = ["--profile", "more.yaml"]
    done = recipe(*words, *option)
    said = done.stdout + done.stderr
    assert done.returncode in (1, 2)
    assert f"secret:{key}" in said
    files = [file for file in place.rglob("*") if file.is_file() and file.name != "more.yaml"]
    written = "".join(file.read_text(errors="replace") for file in files)
    assert not any(secret in said + written for secret in SECRETS)


@pytest.mark.parametrize("key", ["base_model", "optimizer", "lr_scheduler", "chat_template"])
@pytest.mark.parametrize("value", [TOKEN, "https://user:planted-word@example.org", "my-own-secret"])
@pytest.mark.parametrize("form", [(), ("--json",)])
def test_check_does_not_print_the_secret_that_it_complains_about(recipe, monkeypatch, key, value, form):
    monkeypatch.setenv("HF_TOKEN", "my-own-secret")
    done = recipe.fails("check", NAME, "--set", f"{key}={value}", *form)
    assert not any(secret in done.stdout + done.stderr for secret in SECRETS)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("special_tokens.pad_token", "<|pad|>"),
        ("tokenizer_kwargs.eos_token", "</s>"),
        ("base_model", "hf-internal-testing/tiny-random-LlamaForCausalLM"),
        ("datasets.0.path", "pk_fields_2024_of_the_table"),
        ("datasets.0.path", "https://example.org:80/rows@v1"),
        ("datasets.0.type.format", 'Return {"password": "...", "token": "{instruction}"}'),
        ("datasets.0.path", "https://example.org/rows.jsonl?download=1&revision=refs/pr/1&path=a%20b#rows"),
        ("datasets.0.path", "s3://bucket/rows-?.jsonl"),
        ("datasets.0.type.system_prompt", "The bearer certificates of the token: never show them."),
        ("of", "tiktoken==0.14.0, eval_loss_per_token=0.3, hf_use_auth_token=true, sacrebleu_signature: nrefs:1"),
    ],
)
def test_names_and_values_that_only_look_alike_are_none(key, value):
    assert not is_secret(key, value)
    assert masked(value) == value


def test_what_is_refused_for_its_form_is_not_echoed(tmp_path, recipe):
    (tmp_path / "mine.yaml").write_text(yamlfiles.write_yaml(config_with({"wandb_api_key": ["planted-word"]})))
    done = recipe.fails("check", "mine.yaml")
    assert "planted" not in done.stdout + done.stderr


PRESIGNED = "X-Amz-Credential=planted%2F2026&X-Amz-Security-Token=planted&X-Amz-Signature=planted"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"https://b.s3.example/r.jsonl?download=1&{PRESIGNED}",
         "https://b.s3.example/r.jsonl?download=1&X-Amz-Credential=***&X-Amz-Security-Token=***&X-Amz-Signature=***"),
        ("(see https://a.blob.example/c/r?sv=2024&sig=pla%2Fnted%3D).", "(see https://a.blob.example/c/r?sv=***&sig=***)."),
        ("https://x.org/r?ref=main;access_token=planted: 404", "https://x.org/r?ref=main;access_token=***: 404"),
        ("https://x.org/r?planted=", "https://x.org/r?***"),
        ("https://x.org/r?planted", "https://x.org/r?***"),
        ("https://x.org/r?path=https%3A%2F%2Fy.org%3Fsig%3Dplanted", "https://x.org/r?path=***"),
        ("https://x.org/#access_token=planted&raw=1", "https://x.org/#access_token=***&raw=1"),
        ("https://planted@x.org/r", "https://***@x.org/r"),
        ("b.s3.example/r.jsonl?X-Amz-Signature=planted", "b.s3.example/r.jsonl?X-Amz-Signature=***"),
        ("curl -H 'Authorization: Bearer planted-1word'", "curl -H 'Authorization: ***"),
        ("sent Bearer planted.word-2 to x", "sent Bearer *** to x"),
        ('{\\"api_key\\": \\"planted planted\\"}', '{\\"api_key\\": ***}'),
        ("WANDB_API_KEY=planted PASSWORD=$(pass show x)", "WANDB_API_KEY=*** PASSWORD=$(pass show x)"),
        ("-----BEGIN RSA PRIVATE KEY-----\nplanted\n-----END RSA PRIVATE KEY-----", "*** RSA PRIVATE KEY-----"),
    ],
)  # fmt: skip
def test_a_secret_in_a_text_is_masked_once(text, shown):
    assert masked(text) == shown
    assert masked(masked(text)) == shown


def test_values_are_masked_by_key_at_any_depth():
    content = {"comet_api_key": 1234, "headers": {"authorization": ["planted"]}, "special_tokens": {"pad_token": "<p>"}}
    shown = {"comet_api_key": MASK, "headers": {"authorization": MASK}, "special_tokens": {"pad_token": "<p>"}}
    assert without_secrets(content) == shown
    assert without_secrets({"rows": [content], "hf_use_auth_token": True}) == {
        "rows": [shown],
        "hf_use_auth_token": True,
    }


@pytest.mark.parametrize("name", ["WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "HF_TOKEN"])
def test_a_secret_of_the_environment_is_masked(monkeypatch, name):
    monkeypatch.setenv(name, "planted word")
    assert masked("a planted word here") == "a *** here"


def test_long_texts_are_masked_in_linear_time():
    for part in (
        "a-",
        "://",
        "https://",
        "token",
        "?a=",
        "-----BEGIN PRIVATE KEY-----",
        "eyJ",
        "eyJ-",
        "sk-",
        "://a:",
        "Bearer ",
    ):
        start = time.process_time()
        masked(part * (200_000 // len(part)))
        assert time.process_time() - start < 2, part


@pytest.mark.parametrize("part", ["#", "-", "# ", "#-", "a-", "a.", "#a.", "token", "#token: x "])
def test_long_comments_are_masked_in_linear_time(part):
    start = time.process_time()
    masked_comments("#" + part * (200_000 // len(part)))
    assert time.process_time() - start < 2


OF_A_RECIPE = """\
# token: planted-0
comet_api_key: planted-1  # ours
hub_token: planted-2
model_kwargs: {api_key: "planted-3 planted-3"}
swanlab_lark_webhook_url: |
  planted-4
  planted-5
special_tokens: {pad_token: <p>}
mlflow_tracking_uri: https://x.org/?sig=planted-6
"""


def test_no_verb_prints_secrets_of_a_recipe(place, recipe):
    (place / "mine.yaml").write_text(yamlfiles.write_yaml(config_with({"special_tokens": None})) + OF_A_RECIPE)
    (place / "plain.yaml").write_text(yamlfiles.write_yaml(config_with({})))
    for words in (
        ("show", "mine.yaml"),
        ("show", "mine.yaml", "--json"),
        ("diff", "mine.yaml", "plain.yaml"),
        ("diff", "plain.yaml", "mine.yaml", "--json"),
    ):
        done = recipe.ok(*words)
        assert "planted" not in done.stdout + done.stderr, words
        assert MASK in done.stdout
    shown = recipe.ok("show", "mine.yaml").stdout
    assert "comet_api_key: ***  # ours" in shown
    assert "pad_token: <p>" in shown


def test_a_secret_that_an_override_deletes_is_not_recorded(place, recipe):
    """The run's config has no secret, but its differences name the recipe's value."""
    (place / "mine.yaml").write_text(yamlfiles.write_yaml(config_with({"comet_api_key": "planted-word"})))
    done = recipe("run", "mine.yaml", "--rehearse", "--dry-run", "--set", "comet_api_key=null")
    assert done.returncode == 0, done.stderr
    request = compose.Request("mine.yaml", overrides=typed("comet_api_key=null", "learning_rate=1e-4"))
    record = run.record_of(compose.compose(request), request).model_dump_json()
    assert "planted" not in done.stdout + done.stderr + record
    assert '"key":"comet_api_key","recipe":"***"' in record


URL = "https://example.org/rows.jsonl?id=planted"


def test_a_url_trains_with_its_parameters_only_by_consent(place):
    """The config of the run keeps the parameter; all else masks it."""
    request = compose.Request("mine.yaml", overrides=typed(f"datasets.0.path={URL}"))
    (place / "mine.yaml").write_text(yamlfiles.write_yaml(config_with({})))
    composed = compose.compose(request)
    findings = [finding for finding in check.check_config(composed).findings if finding.rule == "url-parameter"]
    assert [(finding.level, finding.name) for finding in findings] == [("error", "url-parameter:datasets.0.path")]
    assert "planted" not in "".join(map(masked, map(str, findings)))
    finding.override_errors(findings, ["url-parameter:datasets.0.path"])
    assert findings[0].level == "warning"
    folder = run.create(composed, request)
    assert yamlfiles.read_yaml(folder.config_file)["datasets"][0]["path"] == URL
    assert "planted" not in (folder.path / "run.json").read_text()
