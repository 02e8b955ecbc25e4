"""Whether there is data that can be read and packed as the config asks."""

import re
import string
from pathlib import Path

from ...base import paths
from ...base.errors import did_you_mean
from ...configs import datafiles
from ...configs.precision import precision, takes_varlen
from ...data import study
from .. import schema, turns
from .case import Case, Problems, rule


@rule
def no_data(case: Case) -> Problems:
    """Axolotl refuses such a config, after 15 s of imports."""
    if not case.is_set("datasets", "pretraining_dataset"):
        yield "error", "datasets", "the config names no data to train on", "list a data set with path and type"


@rule
def not_prepared(case: Case) -> Problems:
    """The study's data, which come in two steps; a check of the config itself does not need them yet."""
    missing: dict[str, list[Path]] = {}
    keys: dict[str, str] = {}
    for key, dataset in datafiles.datasets(case.config):
        for file in datafiles.local_files(dataset):
            if not file.is_file() and (remedy := study.preparation(str(file))):
                missing.setdefault(remedy, []).append(file)
                keys.setdefault(remedy, f"{key}.path")
    start = case["lora_model_dir"]
    if isinstance(start, str) and not Path(start).exists() and (remedy := study.fetching(start)):
        yield "error", "lora_model_dir", f"{paths.shown(Path(start))} is not fetched yet", f"run {remedy}"
    for remedy, files in missing.items():
        first, *more = files
        names = " and ".join([paths.shown(first), *(file.name for file in more)])
        problem = f"{names} {'are' if more else 'is'} not prepared yet"
        rehearse = "; --rehearse needs none" if case.launching else ""
        yield "error", keys[remedy], problem, f"run {remedy}{rehearse}"


@rule
def missing_file(case: Case) -> Problems:
    """Axolotl validates a DeepSpeed file's name only (seen); other files fail it once the model is loaded."""
    for key, dataset in datafiles.datasets(case.config):
        name = dataset.get("path")
        if not isinstance(name, str) or not name:
            yield "error", f"{key}.path", f"{name!r} names no data", "give a file, a folder or a data set of the hub"
        elif "\0" not in name and Path(name).is_dir() and not datafiles.local_files(dataset):
            yield "error", f"{key}.path", f"the folder {paths.shown(Path(name))} is empty", "put rows into it"
        for file in datafiles.local_files(dataset):
            made_by = study.preparation(str(file))
            if file.exists() and not file.is_file():
                yield "error", f"{key}.path", f"{paths.shown(file)} is no regular file", "write its rows to one"
            elif not file.is_file() and not made_by:
                meant, remedy = _instead_of(file)
                yield "error", f"{key}.path", f"{paths.shown(file)} does not exist{meant}", remedy
            elif file.is_file() and not file.stat().st_size:
                remedy = f"run {made_by}" if made_by else "write rows to it, or name another file"
                yield "error", f"{key}.path", f"{paths.shown(file)} is empty", remedy
    for key in ("deepspeed", "lora_model_dir", "resume_from_checkpoint"):
        name = case[key]
        if not isinstance(name, str) or Path(name).exists() or study.fetching(name):
            continue
        if not (key == "lora_model_dir" and name.count("/") == 1):  # of a hub
            problem = f"{paths.shown(Path(name))} does not exist{_instead_of(Path(name))[0]}"
            yield "error", key, problem, "correct the path or delete the key"


def _instead_of(missing: Path) -> tuple[str, str]:
    """What may have been meant by a path that does not exist, and what to do: a name like it that is there, else what
    lies where it should be."""
    folder = missing.parent
    if not folder.is_dir():
        near = did_you_mean(folder.name, [beside.name for beside in folder.parent.glob("*/")])
        return f": there is no folder {paths.shown(folder)}{near}", "" if near else "correct the path"
    files = sorted(file for file in folder.glob("[!.]*") if file.suffix == missing.suffix)
    alike = [file.name for file in files if did_you_mean(missing.stem, [file.stem])]
    if near := did_you_mean(missing.name, alike):
        return near, ""
    there = ", ".join(file.name for file in files[:_MOST_NAMES]) + (", …" if len(files) > _MOST_NAMES else "")
    return f"; beside it there is {there}" if there else "", "correct the path"


_MOST_NAMES = 4  # of files in a message


@rule
def packing_leaks(case: Case) -> Problems:
    """Rows packed into one then attend to each other; Axolotl only warns (attn_decontaminates_packing).

    It also warns that sdpa with a mask, in bf16 and before Hopper, can give losses of 0; varlen_attn has no mask.
    """
    if case["sample_packing"] and case.attention not in KEEP_DOCUMENTS_APART:
        problem = f"with {case.attention or 'no attn_implementation'}, packed rows see each other"
        yield "error", "sample_packing", problem, "set flash_attention_2"
    before_hopper = case.gpu and case.gpu.capability < (9, 0)
    in_bf16 = precision(case.config, on_gpu=True).weights == "bfloat16"
    masked = case["sample_packing"] and case.attention == "sdpa" and not takes_varlen(case.config, case.architecture)
    if masked and in_bf16 and before_hopper:
        problem = f"with a mask in sdpa, and bf16, losses can be 0 on {case.gpu}"
        yield "warning", "sample_packing", problem, "set flash_attention_2"


KEEP_DOCUMENTS_APART = {
    *("flash_attention_2", "flash_attention_3", "flash_attention_4", "flash_attention_torch", "flex_attention"),
    *("xformers", "sage", "sdpa", "eager"),
    *("kernels-community/flash-attn2", "kernels-community/flash-attn3", "kernels-community/sage-attention"),
}


@rule
def prompt_strategy(case: Case) -> Problems:
    """Axolotl looks a data set's type up once training has begun: among its own, by whether it is preference data, and
    for one with a dot also among the modules that can be imported."""
    definitions = schema.load()["$defs"]
    types = {name: definitions[f"{name}Dataset"]["properties"]["type"]["anyOf"] for name in ("SFT", "DPO", "KTO")}
    own_module = types["SFT"][1]["pattern"]
    preference = {kind for name in ("DPO", "KTO") for kind in types[name][0]["enum"]} - set(types["SFT"][0]["enum"])
    for key, dataset in datafiles.datasets(case.config):
        kind = dataset.get("type")
        if case["rl"] or not isinstance(kind, str):
            continue
        module = kind.partition(".")[0]
        if kind in preference:
            yield "error", f"{key}.type", f"{kind} is for preference training", "set rl, or a type such as alpaca"
        elif re.match(own_module, kind) and not case.can_import(module):
            yield "error", f"{key}.type", f"there is no module {module}", "put it on PYTHONPATH"


@rule
def chat_template(case: Case) -> Problems:
    """Axolotl fails on a template that is not there once the tokenizer is loaded; seen: a misspelt name of a template's
    file is taken for the template itself, so that every prompt is that name, and no row has anything to learn.

    The template of the tokenizer is the default. Base models have none, but for Qwen's.
    """
    known = [*turns.template_files(), "tokenizer_default", "jinja"]
    for key, dataset in datafiles.datasets(case.config):
        if dataset.get("type") != "chat_template":
            continue
        if dataset.get("chat_template_jinja") and not dataset.get("chat_template"):
            problem = "Axolotl does not use it where the data set names no chat_template"
            yield "error", f"{key}.chat_template_jinja", problem, "set chat_template: jinja beside it"
            continue
        name, written = turns.chosen_template(case.config, dataset)
        where = f"{key}.type"
        if dataset.get("chat_template") or case["chat_template"]:
            where = f"{key}.chat_template" if dataset.get("chat_template") else "chat_template"
        given = name.removeprefix(turns.FALLBACK)
        model = case.model
        if name == "jinja":
            if problem := _wrong_template(written):
                yield "error", where, problem, "write a template, or the name of a file that holds one"
        elif given not in known and len(known) > 2:
            near = did_you_mean(given, known)
            yield "error", where, f"Axolotl has no chat template {given}{near}", "" if near else "chatml is one"
        elif name == "tokenizer_default" and not model.chat_template:
            remedy = "set chat_template, as chatml"
            if model.tokenizer_here:
                yield "error", where, "the tokenizer of the base model has no chat template", remedy
            elif model.chat is False and not str(case["base_model"]).startswith("Qwen/"):
                problem = "the tokenizer of this model, which is no chat model, may have no chat template"
                yield "warning", where, problem, remedy


@rule
def unread_tools(case: Case) -> Problems:
    """Axolotl 0.21 does not pass field_tools on to what reads the rows (prompt_strategies/chat_template.py; seen)."""
    for key, dataset in datafiles.datasets(case.config):
        if dataset.get("field_tools") not in (None, "tools"):
            problem = "Axolotl ignores this key, and reads the field tools"
            yield "error", f"{key}.field_tools", problem, "call the field tools in the rows"


def _wrong_template(written: object) -> str:
    """What is wrong with a chat template that is written out, or with the file that it names."""
    if not isinstance(written, str) or not written:
        return "jinja, and chat_template_jinja is not set"
    if "{" not in (text := turns.read_template(written)):
        return f"chat_template_jinja: {written[:80]} is neither a file nor a template"
    from jinja2 import TemplateSyntaxError

    try:
        turns.compiled(text)
    except TemplateSyntaxError as error:
        return f"chat_template_jinja: line {error.lineno} is no Jinja: {error.message}"
    return ""


@rule
def prompt_format(case: Case) -> Problems:
    """Axolotl fills these in with str.format, once it tokenizes the rows (prompt_strategies/user_defined.py)."""
    names = {"format": ["instruction", "input"], "no_input_format": ["instruction"], "system_format": ["system"]}
    for key, dataset in datafiles.datasets(case.config):
        kind = dataset.get("type")
        for name, allowed in names.items():
            text = kind.get(name) if isinstance(kind, dict) else None
            if not isinstance(text, str) or not text:
                continue
            where = f"{key}.type.{name}"
            try:
                used = [field for _, field, _, _ in string.Formatter().parse(text) if field is not None]
            except ValueError as error:
                yield "error", where, f"cannot be filled in: {error}", "write {{ and }} for braces in the text"
                continue
            for field in (field for field in used if field not in allowed):
                near = did_you_mean(field, allowed)
                known = " and ".join(f"{{{one}}}" for one in allowed)
                yield "error", where, f"{{{field}}} stands for nothing{near}", f"it takes {known}"
            if allowed[0] not in used:
                yield "error", where, f"{{{allowed[0]}}} is not in it: no row's text would be", "add it"
