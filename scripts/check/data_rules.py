"""Rules about a config's data."""

from pathlib import Path

from ..base import paths
from ..config import datafiles, models
from ..config.finding import Case, Problems, rule
from ..config.numerics import AMPERE, precision, takes_varlen
from ..data import studies


@rule
def no_data(case: Case) -> Problems:
    """Axolotl also refuses a config without training rows, but only after its imports (15 s) or after tokenizing."""
    if case.is_set("pretraining_dataset"):
        problem = "its rows are streamed, so that they can be neither checked nor counted nor recorded"
        yield "error", "pretraining_dataset", problem, "list the data under datasets, with type: completion"
    elif not case.is_set("datasets"):
        yield "error", "datasets", "the config has no training data", "list a data set with path and type"
    if datafiles.training_rows(case.config) == 0:
        yield "error", "val_set_size", f"{case['val_set_size']} leaves no rows for training", "lower it"


@rule
def not_prepared(case: Case) -> Problems:
    """A run needs prepared data; checking only the config does not."""
    start = case["lora_model_dir"]
    if isinstance(start, str) and not Path(start).exists() and (remedy := studies.fetch_command(start)):
        yield "error", "lora_model_dir", f"{paths.shown(Path(start))} is not fetched yet", f"run {remedy}"
    rehearse = "; or add --rehearse, which does not need it" if case.launching else ""
    remedies = set[str]()
    for dataset in datafiles.datasets(case.config):
        for file in datafiles.local_files(dataset.entry):
            if file.is_file():
                continue
            remedy = studies.prepare_commands(str(file))
            if remedy and remedy not in remedies:  # it prepares all files of its study
                remedies.add(remedy)
                problem = f"{paths.shown(file)} is not prepared yet"
                yield "error", f"{dataset.key}.path", problem, f"run {remedy}{rehearse}"


@rule
def missing_file(case: Case) -> Problems:
    """A missing file would fail only after the model is loaded.

    Axolotl's validation does not check that a DeepSpeed file exists (seen).
    """
    for dataset in datafiles.datasets(case.config):
        key, name = f"{dataset.key}.path", dataset.entry.get("path")
        files = datafiles.local_files(dataset.entry)
        if not isinstance(name, str) or not name:
            yield "error", key, f"{name!r} is not a path", "give a file, a folder or a data set on the hub"
        elif Path(name).is_dir() and not files:
            yield "error", key, f"the folder {paths.shown(Path(name))} is empty", "put rows into it"
        for file in files:
            if file.is_file() and not file.stat().st_size:
                yield "error", key, f"{paths.shown(file)} is empty", "write rows to it, or name another file"
        for file in datafiles.missing_files(dataset.entry):
            problem = f"{paths.shown(file)} does not exist{paths.similar_paths(file)}"
            yield "error", key, problem, "correct the path; only data_files of a folder can be a pattern"
    for key in datafiles.missing_paths(case.config):
        path = Path(case[key])
        problem = f"{paths.shown(path)} does not exist{paths.similar_paths(path)}"
        yield "error", key, problem, "correct the path or delete the key"


@rule
def packing_leaks(case: Case) -> Problems:
    """Packed rows attend to each other unless the attention implementation separates them.

    Axolotl only warns about this (attn_decontaminates_packing).

    Axolotl also warns that sdpa with a mask can give a loss of 0 in bf16 on GPUs before Hopper.
    """
    if case["sample_packing"] and case.attention not in KEEP_DOCUMENTS_APART:
        problem = f"with {case.attention or 'no attn_implementation'}, packed rows attend to each other"
        yield "error", "sample_packing", problem, f"set {case.advised_attention}"
    before_hopper = case.gpu and AMPERE <= case.gpu.capability < (9, 0)  # bf16 is an error on older GPUs
    in_bf16 = precision(case.config, on_gpu=True).weights == "bfloat16"
    masked = case["sample_packing"] and case.attention == "sdpa" and not takes_varlen(case.config, case.architecture)
    if masked and in_bf16 and before_hopper:
        problem = f"sdpa with a mask in bf16 can give losses of 0 on {case.gpu}"
        yield "warning", "sample_packing", problem, f"set {case.advised_attention}"


KEEP_DOCUMENTS_APART = {
    *("flash_attention_2", "flash_attention_3", "flash_attention_4", "flash_attention_torch", "flex_attention"),
    *("xformers", "sage", "sdpa", "eager"),
    *("kernels-community/flash-attn2", "kernels-community/flash-attn3", "kernels-community/sage-attention"),
}


@rule
def chat_template(case: Case) -> Problems:
    """Axolotl uses a misspelt file name as the template itself.

    Every prompt then consists of that name, and no token carries loss (seen). Axolotl ignores a data set's
    chat_template_jinja if the data set has no chat_template (seen). The default is the template of the tokenizer. The
    tokenizers of pretrained models have no template, except Qwen's. A data set's chat_template overrides the config's
    (utils/chat_templates/base.py and schemas/datasets.py).
    """
    for dataset in datafiles.datasets(case.config):
        key, entry = dataset.key, dataset.entry
        if entry.get("type") != "chat_template":
            continue
        own = entry.get("chat_template")
        if entry.get("chat_template_jinja") and not own:
            problem = "Axolotl ignores this key if the data set has no chat_template"
            yield "error", f"{key}.chat_template_jinja", problem, "also set chat_template: jinja"
            continue
        written = entry.get("chat_template_jinja") if own else case["chat_template_jinja"]
        name = own or case["chat_template"] or ("jinja" if written else "tokenizer_default")
        where = f"{key}.chat_template" if own else "chat_template" if case["chat_template"] else f"{key}.type"
        if name == "jinja" and isinstance(written, str) and "{" not in models.read_template(written):
            yield "error", where, f"chat_template_jinja: {written[:80]} is neither a file nor a template", ""
        elif name == "tokenizer_default" and not case.model.chat_template:
            if case.model.tokenizer_here:
                problem = "the tokenizer of the base model has no chat template"
                yield "error", where, problem, "set chat_template, for example to chatml"
            elif case.model.chat is False and not str(case["base_model"]).startswith("Qwen/"):
                problem = "not a chat model: its tokenizer may lack a chat template"
                yield "warning", where, problem, "set chat_template, for example to chatml"


@rule
def unread_tools(case: Case) -> Problems:
    """Axolotl 0.21 does not pass field_tools to its row reader (prompt_strategies/chat_template.py; seen)."""
    for dataset in datafiles.datasets(case.config):
        if dataset.entry.get("field_tools") not in (None, "tools"):
            problem = "Axolotl ignores this key and reads the field `tools`"
            yield "error", f"{dataset.key}.field_tools", problem, "rename the field of the rows to `tools`"


@rule
def prompt_format(case: Case) -> Problems:
    """A format without its placeholder omits the row's text from the prompt (prompt_strategies/user_defined.py)."""
    fields = {"format": "{instruction}", "no_input_format": "{instruction}", "system_format": "{system}"}
    for dataset in datafiles.datasets(case.config):
        kind = dataset.entry.get("type")
        for name, field in fields.items():
            text = kind.get(name) if isinstance(kind, dict) else None
            if isinstance(text, str) and text and field not in text:
                problem = f"{field} is missing: prompts lack the rows' text"
                yield "error", f"{dataset.key}.type.{name}", problem, "add it"
