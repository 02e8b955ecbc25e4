"""Whether there is data that can be read and packed as the config asks."""

import re
from pathlib import Path

from ...configs import datafiles
from ...configs.precision import precision
from .. import schema
from .case import Case, Problems, rule


@rule
def no_data(case: Case) -> Problems:
    """Axolotl refuses such a config, after 15 s of imports."""
    if not case.is_set("datasets", "pretraining_dataset"):
        yield "error", "datasets", "the config names no data to train on", "list a data set with path and type"


@rule
def missing_file(case: Case) -> Problems:
    """Axolotl validates a DeepSpeed file's name only (seen); other files fail it once the model is loaded."""
    for key, dataset in datafiles.datasets(case.config):
        name = dataset.get("path")
        if not isinstance(name, str) or not name:
            yield "error", f"{key}.path", f"{name!r} names no data", "give a file, a folder or a data set of the hub"
        for file in datafiles.local_files(dataset):
            remedy = "`recipe data prepare` writes the study's data, --rehearse needs none"
            if not file.is_file():
                yield "error", f"{key}.path", f"{file.absolute()} does not exist", remedy
            elif not file.stat().st_size:
                yield "error", f"{key}.path", f"{file} is empty", remedy
    for key in ("deepspeed", "lora_model_dir", "resume_from_checkpoint"):
        name = case[key]
        if isinstance(name, str) and not Path(name).exists() and not (key == "lora_model_dir" and name.count("/") == 1):
            yield "error", key, f"{Path(name).absolute()} does not exist", "correct the path or delete the key"


@rule
def packing_leaks(case: Case) -> Problems:
    """Rows packed into one then attend to each other; Axolotl only warns (attn_decontaminates_packing).

    It also warns that sdpa keeps them apart in bf16 at the cost of losses of 0 before Hopper.
    """
    if case["sample_packing"] and case.attention not in KEEP_DOCUMENTS_APART:
        problem = f"with {case.attention or 'no attn_implementation'}, packed rows see each other"
        yield "error", "sample_packing", problem, "set flash_attention_2"
    before_hopper = case.gpu and case.gpu.capability < (9, 0)
    in_bf16 = precision(case.config, on_gpu=True).weights == "bfloat16"
    if case["sample_packing"] and case.attention == "sdpa" and in_bf16 and before_hopper:
        yield "warning", "sample_packing", f"with sdpa and bf16 losses can be 0 on {case.gpu}", "set flash_attention_2"


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
