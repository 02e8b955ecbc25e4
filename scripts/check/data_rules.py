"""Rules about a config's data."""

from pathlib import Path
from typing import Any

from ..base import paths
from ..base.yamlfiles import Config
from ..config import datafiles, gpus, models
from ..config.numerics import AMPERE, precision, takes_varlen
from ..data import studies
from ..training.row_types import OF_PAIRS
from .rule import Case, Problems, rule


@rule()
def no_data(case: Case) -> Problems:
    """Axolotl also refuses a config without training rows, but only after its imports (15 s) or after tokenizing."""
    if case.is_set("pretraining_dataset"):
        problem = "its rows are streamed, so that they can be neither checked nor counted nor recorded"
        yield "error", "pretraining_dataset", problem, "list the data under datasets, with type: completion"
    elif not case.is_set("datasets"):
        yield "error", "datasets", "the config has no training data", "list a data set with path and type"
    held_out = case["val_set_size"]
    if held_out == 1 or datafiles.training_rows(case.config) == 0:  # Axolotl takes 1 as the share of all rows
        remedy = "set a share below 1, or a lower number above 1"
        yield "error", "val_set_size", f"{held_out} leaves no rows for training", remedy


@rule(scope="data")
def not_prepared(case: Case) -> Problems:
    """A run needs prepared data; checking only the config does not."""
    adapter = case["lora_model_dir"]
    if isinstance(adapter, str) and not Path(adapter).exists() and (remedy := studies.fetch_command(adapter)):
        yield case.missing_data, "lora_model_dir", f"{paths.shown(Path(adapter))} is not fetched yet", f"run {remedy}"
    rehearse = "; or add --rehearse, which does not need it" if case.launching else ""
    remedies = set[str]()
    for dataset in datafiles.datasets(case.config):
        for file in datafiles.local_files(dataset.entry):
            remedy = "" if file.is_file() else studies.prepare_commands(str(file))
            if remedy and remedy not in remedies:  # it prepares all files of its study
                remedies.add(remedy)
                problem = f"{paths.shown(file)} is not prepared yet"
                yield case.missing_data, f"{dataset.key}.path", problem, f"run {remedy}{rehearse}"


@rule(scope="file")
def missing_file(case: Case) -> Problems:
    """A missing file would fail only after the model is loaded.

    Axolotl's validation does not check that a DeepSpeed file exists (seen).
    """
    for dataset in datafiles.datasets(case.config):
        yield from _file_problems(case, f"{dataset.key}.path", dataset.entry)
    for key in datafiles.missing_paths(case.config):
        path = Path(case[key])
        problem = f"{paths.shown(path)} {paths.absence(path)}"
        remedy = "correct the path or delete the key"
        if key == "deepspeed":
            remedy = f"correct the path, or delete the key and add --profile {_deepspeed_profile(case.config)}"
        yield case.absent(path), key, problem, remedy


def _deepspeed_profile(config: Config) -> str:
    """Built-in profile for the stage and the offloading in the name of a DeepSpeed file, such as zero3_bf16.json."""
    profile = gpus.parallelism_of(config).replace("-", "").lower()
    if profile == "zero3" and gpus.offloads({"deepspeed": config["deepspeed"]}):
        return "zero3-offload"
    return profile


def _file_problems(case: Case, key: str, entry: Config) -> Problems:
    """Problems with the files of a data set; the key is that of its path."""
    name = entry.get("path")
    files = datafiles.local_files(entry)
    if not name:
        yield case.missing_data, key, f"{name!r} is not a path", "give a file, a folder or a data set on the hub"
    elif Path(name).is_dir() and not files:
        yield "error", key, f"the folder {paths.shown(Path(name))} is empty", "put rows into it"
    for file in files:
        if file.is_file() and not file.stat().st_size:
            yield "error", key, f"{paths.shown(file)} is empty", "write rows to it, or name another file"
    for file in datafiles.missing_files(entry):
        problem = f"{paths.shown(file)} {paths.absence(file)}"
        remedy = "correct the path, put the file there, or pass other rows with `recipe new --data FILE`"
        yield case.missing_data, key, problem, f"{remedy}; only data_files of a folder can be a pattern"


@rule()
def trained_test_rows(case: Case) -> Problems:
    """A model that has learned its test rows scores too well; rows are compared only where they are on this machine."""
    for test in datafiles.test_sets(case.config):
        for trained in datafiles.training_sets(case.config):
            parts = {split for split in (test.split, trained.split) if "[" in split}
            if test.source == trained.source and len(parts) < 2:
                problem = f"has rows of {trained.key}, which are trained on: scores mean little"
                yield "warning", f"{test.key}.path", problem, "name other rows, or delete it and set val_set_size"


@rule()
def misread_test_rows(case: Case) -> Problems:
    """Axolotl reads the i-th test set with the fields of the i-th training set (prompt_strategies/dpo).

    Its validation turns a described type of test rows into one without fields, so that no format applies (seen).
    """
    if case["rl"] not in OF_PAIRS:
        return
    trained = datafiles.training_sets(case.config)
    for test in datafiles.test_sets(case.config):
        key = f"{test.key}.type"
        if isinstance(test.entry.get("type"), dict):
            yield "error", key, "Axolotl reads test rows without this format", "delete it, and set val_set_size"
        elif test.index >= len(trained) or _fields(test.entry) != _fields(trained[test.index].entry):
            problem = f"Axolotl reads these rows with type and fields of datasets.{test.index}, which differ"
            yield "error", key, problem, "name a training set with the same fields, or set val_set_size"


def _fields(entry: Config) -> list[Any]:
    """Type and fields of a data set of preference pairs."""
    return [entry.get(key) for key in ("type", "field_messages", "field_chosen", "field_rejected")]


@rule()
def unpinned(case: Case) -> Problems:
    """Without a commit, a later run trains on what the hub then has; the hub's cache knows the commit of today."""
    for source in datafiles.hub_commits(case.config):
        if not source.is_pinned:
            problem = f"not pinned to a commit; this machine has {source.commit}"
            yield "note", source.key, problem, f"set {source.revision_key}: {source.commit}"


@rule()
def packing_leaks(case: Case) -> Problems:
    """Packed rows attend to each other unless the attention implementation separates them.

    Axolotl only warns about this (attn_decontaminates_packing).

    Axolotl also warns that sdpa with a mask can give a loss of 0 in bf16 on GPUs before Hopper.
    """
    if not case["sample_packing"]:
        return
    if case.attention not in KEEP_DOCUMENTS_APART:
        problem = f"with {case.attention or 'no attn_implementation'}, packed rows attend to each other"
        yield "warning", "sample_packing", problem, f"set {case.advised_attention}"
    if case.gpu is None or not AMPERE <= case.gpu.capability < (9, 0):  # bf16 is an error on older GPUs
        return
    is_masked = case.attention == "sdpa" and not takes_varlen(case.config, case.architecture)
    if is_masked and precision(case.config, on_gpu=True).weights == "bfloat16":
        problem = f"sdpa with a mask in bf16 can give losses of 0 on {case.gpu}"
        yield "warning", "sample_packing", problem, f"set {case.advised_attention}"


KEEP_DOCUMENTS_APART = {
    *("flash_attention_2", "flash_attention_3", "flash_attention_4", "flash_attention_torch", "flex_attention"),
    *("xformers", "sage", "sdpa", "eager"),
    *("kernels-community/flash-attn2", "kernels-community/flash-attn3", "kernels-community/sage-attention"),
}


@rule()
def chat_template(case: Case) -> Problems:
    """Axolotl uses a misspelt file name as the template itself.

    Every prompt then consists of that name, and no token is trained on (seen). Axolotl ignores a data set's
    chat_template_jinja if the data set has no chat_template (seen). The default is the template of the tokenizer. The
    tokenizers of pretrained models have no template, except Qwen's. A data set's chat_template overrides the config's
    (utils/chat_templates/base.py and schemas/datasets.py).
    """
    for dataset in datafiles.datasets(case.config):
        entry = dataset.entry
        if str(entry.get("type")).partition(".")[0] != "chat_template":  # pairs: chat_template.argilla_chat
            continue
        if entry.get("chat_template"):
            key = f"{dataset.key}.chat_template"
            yield from _template_problems(case, key, entry["chat_template"], entry.get("chat_template_jinja"))
        elif entry.get("chat_template_jinja"):
            problem = "Axolotl ignores this key if the data set has no chat_template"
            yield "error", f"{dataset.key}.chat_template_jinja", problem, "also set chat_template: jinja"
        elif case["chat_template"]:
            yield from _template_problems(case, "chat_template", case["chat_template"], case["chat_template_jinja"])
        else:
            name = "jinja" if case["chat_template_jinja"] else "tokenizer_default"
            yield from _template_problems(case, f"{dataset.key}.type", name, case["chat_template_jinja"])


def _template_problems(case: Case, key: str, name: str, jinja: Any) -> Problems:
    """Problems with a chat template.

    Args:
        key: the key that selects the template.
        name: the template's name.
        jinja: the template or its file, if the name is jinja.
    """
    remedy = "set chat_template, for example to chatml"
    if name == "jinja":
        if isinstance(jinja, str) and "{" not in models.read_template(jinja):
            yield "error", key, f"chat_template_jinja: {jinja[:80]} is neither a file nor a template", ""
        return
    if name != "tokenizer_default" or case.model.chat_template:  # Axolotl's own, or the model's
        return
    if case.model.tokenizer_here:
        yield "error", key, "the tokenizer of the base model has no chat template", remedy
    elif case.model.chat is False and not str(case["base_model"]).startswith("Qwen/"):
        yield "warning", key, "not a chat model: its tokenizer may lack a chat template", remedy


@rule()
def unread_tools(case: Case) -> Problems:
    """Axolotl 0.21 does not pass field_tools to its row reader (prompt_strategies/chat_template.py; seen)."""
    for dataset in datafiles.datasets(case.config):
        if dataset.entry.get("field_tools") not in (None, "tools"):
            problem = "Axolotl ignores this key and reads the field `tools`"
            yield "error", f"{dataset.key}.field_tools", problem, "rename the field of the rows to `tools`"


@rule()
def prompt_format(case: Case) -> Problems:
    """A format without its placeholder omits the row's text from the prompt (prompt_strategies/user_defined.py)."""
    fields = {"format": "{instruction}", "no_input_format": "{instruction}", "system_format": "{system}"}
    for dataset in datafiles.datasets(case.config):
        kind = dataset.entry.get("type")
        if not isinstance(kind, dict):
            continue
        for name, field in fields.items():
            text = kind.get(name)
            if text and field not in text:
                problem = f"{field} is missing: prompts lack the rows' text"
                yield "error", f"{dataset.key}.type.{name}", problem, "add it"
