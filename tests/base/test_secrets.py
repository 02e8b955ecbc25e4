"""No secret that is planted in a config is written anywhere, or echoed."""

import pytest
from conftest import config_with

from qlora_recipes.base import yamlfiles
from qlora_recipes.base.progress import is_secret, masked

NAME = "haider2024/code-llama-7b"
TOKEN = "hf_" + "aB3" * 8
SWEEP = "sweep --rehearse --set lora_r=8,9"
VERBS = ["check", "check --json", "plan", "run --rehearse", "new x --from", SWEEP]
SECRETS = (TOKEN, "planted", "my-own-secret")
PLANTED: list[tuple[str, str]] = [
    ("model_kwargs.token", "planted-word"),
    ("tokenizer_kwargs.api-key", "planted-word"),
    ("optim_args", "betas=1,token=....planted-word"),
    ("hub_token", "planted-word"),
    ("wandb_name", TOKEN),
    ("mlflow_tracking_uri", "https://user:planted/word@example.org"),
]


@pytest.mark.parametrize(("key", "value"), PLANTED)
@pytest.mark.parametrize("verb", VERBS)
def test_a_planted_secret_is_refused_and_not_echoed(place, recipe, verb, key, value):
    words = verb.split()
    name = words.index("--from") + 1 if "--from" in words else 1
    words[name:name] = [NAME]
    option = ["--set", f"{key}={value}"]
    if verb == SWEEP:  # whose own --set takes several values
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
    ],
)
def test_names_and_values_that_only_look_alike_are_none(key, value):
    assert not is_secret(key, value)
    assert masked(value) == value


def test_what_is_refused_for_its_form_is_not_echoed(tmp_path, recipe):
    (tmp_path / "mine.yaml").write_text(yamlfiles.write_yaml(config_with({"wandb_api_key": ["planted-word"]})))
    done = recipe.fails("check", "mine.yaml")
    assert "planted" not in done.stdout + done.stderr
