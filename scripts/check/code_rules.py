"""Rules about what somebody else's config can do: run code, write files, send data, and pass on a file's text.

The user accepts an error by passing the finding's name to --force. The rules read the config as written, with values
that break the schema: Axolotl would convert some of them, such as `trust_remote_code: 1`.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..base.files import read_bytes
from ..base.run_files import RunFile
from ..base.secrets import without_secrets
from ..base.yamlfiles import Config
from ..config import keys, models
from ..config.finding import Finding
from ..config.merging import flatten, top_key
from ..config.models import ModelFiles
from .rule import Case, Problems, rule, rule_findings

READ_IT = "read the code; to run it, pass the name in brackets to --force"


@rule(scope="code")
def foreign_code(case: Case) -> Problems:
    """A value that Axolotl hands to transformers, datasets, kernels, PEFT, DeepSpeed or torch, and that is on no list.

    Axolotl imports modules that a config names, and hands other keys on unread. A key is therefore harmless only if
    keys.yaml says so. A plugin or prompt strategy is imported even to validate a config or to tokenize rows. PEFT
    imports and unpickles what an adapter_config.json names.
    """
    written = _with_deepspeed(case.written)
    if isinstance(adapter := written.get("lora_model_dir"), str):
        written["adapter_config"] = ModelFiles.find(adapter, None, case.ask_hub).json(RunFile.ADAPTER_CONFIG)
    for key, value in leaves(written):
        if not _is_harmless(case, key, value):
            shown = without_secrets(value, key)
            yield "error", key, f"may run foreign code: {shown} is not on the list of what is harmless", READ_IT


def _with_deepspeed(config: Config) -> Config:
    """Config with the content of its DeepSpeed file."""
    deepspeed = config.get("deepspeed")
    if not isinstance(deepspeed, str):
        return dict(config)
    name = deepspeed if Path(deepspeed).is_file() else None  # a finding if not JSON: DeepSpeed reads more than JSON
    return config | {"deepspeed": ModelFiles([], lambda file: read_bytes(Path(file))).json(deepspeed) or name}


@rule()
def without_consent(case: Case) -> Problems:
    """A path, host or account that the user did not set.

    Axolotl deletes the file of dynamic_checkpoint, and saves any text as chat template beside the adapter (seen). It
    copies trackers' hosts into the variables that their clients read, who send the user's token (seen with MLflow).
    """
    for key, value in leaves(_with_deepspeed(case.written)):
        line = keys.find(key)
        if not line.does or not isinstance(value, str) or line.allows(value):
            continue
        if line.kind == "content" and _is_template(value):
            continue
        if not any(f"{key}.".startswith(f"{change.key}.") for change in case.changes):
            yield line.level, key, f"a training would {line.does} {value}", _REMEDIES[line.level]


def _is_template(written: str) -> bool:
    """True for text, which a rule checks, and for a .jinja file that uses the messages of a chat."""
    text = models.read_template(written)
    if text == written:
        return True
    return written.endswith((".jinja", ".jinja2")) and bool(re.search(r"\{[{%][^{}]*\bmessages\b", text))


_REMEDIES = {
    "error": "delete the key, or pass the name in brackets to --force",
    "note": "delete the key if this account is not yours",
}


def findings(case: Case) -> Iterator[Finding]:
    """Findings of the rules about code only."""
    return rule_findings(case, "code")


def private_files(case: Case) -> Iterator[Finding]:
    """Findings about files whose text goes into prompts and the output."""
    for level, key, problem, remedy in without_consent(case):
        if keys.find(key).kind == "content":
            yield Finding(level, "without-consent", key, problem, remedy)


def leaves(content: Any) -> Iterator[tuple[str, Any]]:
    """Dotted keys and values, also of the items of lists."""
    for key, value in flatten(content):
        if isinstance(value, list):
            yield from ((f"{key}.{i}", item) for i, item in enumerate(value))
        else:
            yield key, value


def _is_harmless(case: Case, key: str, value: Any) -> bool:
    """True if a config's value cannot name or allow code."""
    if value in (None, {}) and not key.startswith("plugins."):  # Axolotl also takes plugins from a mapping's keys
        return True
    line = keys.find(key)
    if line is not keys.WITHOUT_LINE or top_key(key) in _PASSED_ON:
        return line.is_harmless(value)
    return f"{key}.".startswith(tuple(case.unread))  # Axolotl's classes drop keys that they do not have


_PASSED_ON = ("adapter_config", "bnb_config_kwargs")
"""Mappings that are passed on with keys that the schema does not list."""


@rule(scope="code")
def pickled_weights(case: Case) -> Problems:
    """torch.load unpickles all weights but safetensors; a pickle can contain code.

    By default, recent versions of torch load only weights, but this restriction has had vulnerabilities."""
    for key, revision in (("base_model", models.revision(case.config)), ("lora_model_dir", None)):
        name = case[key]
        files = ModelFiles.find(name, revision, case.ask_hub).pickles() if isinstance(name, str) else []
        if files:
            problem = f"would load {files[0]}, which is not a safetensors file: loading it can run code"
            yield "error", key, problem, "use a safetensors copy; to load it, pass the name in brackets to --force"
