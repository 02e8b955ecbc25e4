"""What of a config is run as code that came with it: others' plugins, modules and models, and pickled weights.

These are errors, so that nothing of it is imported before its user has read it and names the finding with --force.
"""

import re
from pathlib import Path

from ...base.yamlfiles import Config
from ...configs import datafiles, models
from ...configs.config import flatten
from .. import schema
from .case import Case, Problems, rule

_READ_IT = "read it first; --force with the name in brackets runs it"
_OURS = ("axolotl.integrations.", "qlora_recipes.")
_NAMES_CODE = ("trainer_cls", "trl.reward_funcs", "trl.rollout_func")
_KINDS = ("SFT", "DPO", "KTO")
_OF_KERNELS = "kernels-community/"  # of the hub's own maintainers


@rule
def remote_code(case: Case) -> Problems:
    """transformers and datasets import the Python files that a model or a data set comes with."""
    for key, value in flatten(case.config):
        if key.rpartition(".")[2] == "trust_remote_code" and value:
            yield "error", key, "runs the Python code that comes with it", _READ_IT


@rule
def foreign_code(case: Case) -> Problems:
    """Axolotl imports the modules that these keys name, plugins and prompt strategies even to validate or tokenize;
    transformers those of an attention that is a repository of the hub."""
    for key, name in _named_code(case.config):
        yield "error", key, f"runs the code of {name}, which is neither Axolotl's nor this project's", _READ_IT


def _named_code(config: Config) -> list[tuple[str, str]]:
    types = {name: schema.load()["$defs"][f"{name}Dataset"]["properties"]["type"]["anyOf"] for name in _KINDS}
    of_module = types["SFT"][1]["pattern"]
    own_types = {kind for of_kind in types.values() for kind in of_kind[0]["enum"]}
    plugins = config.get("plugins")
    found = [(f"plugins.{i}", name) for i, name in enumerate(plugins if isinstance(plugins, list) else [])]
    found = [(key, name) for key, name in found if not str(name).startswith(_OURS)]
    for key, entry in datafiles.datasets(config):
        kind = entry.get("type")
        if isinstance(kind, str) and re.match(of_module, kind) and kind not in own_types:
            found.append((f"{key}.type", kind))
    found += [(key, value) for key, value in flatten(config) if value and key in _NAMES_CODE]
    attention = str(config.get("attn_implementation") or "")
    if "/" in attention and not attention.startswith(_OF_KERNELS):
        found.append(("attn_implementation", attention))
    return [(key, str(name)) for key, name in found if name]


@rule
def pickled_weights(case: Case) -> Problems:
    """torch.load unpickles .bin and .pt files. It refuses what is not weights, in the versions without a known hole;
    safetensors cannot hold code at all."""
    adapter = case["lora_model_dir"]
    folders = {"base_model": models.folder_of(case.config), "lora_model_dir": Path(str(adapter)) if adapter else None}
    for key, folder in folders.items():
        files = [file.name for file in folder.iterdir()] if folder and folder.is_dir() else []
        pickled = sorted(name for name in files if re.search(r"(model|weights).*\.(bin|pth?)$|\.pt$", name))
        if pickled and not any(name.endswith((".safetensors", ".gguf")) for name in files):
            problem = f"{pickled[0]} is pickled, which can hold code that runs when it is loaded"
            yield "error", key, problem, "take a copy in safetensors; --force with the name in brackets loads it"
