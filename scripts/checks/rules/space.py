"""Whether the disks have room for what a run writes."""

import re
from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from ...base import disks, paths
from ...base.errors import UserError
from ...base.yamlfiles import Config
from ...configs import datafiles, models
from ...runs import handover
from .case import Case, Problems, rule

_LIMIT = 4  # of checkpoints, unless save_total_limit says another (axolotl/core/builders/base.py)
_PREPARED = 4  # bytes of prepared rows for each of JSON: 13 a token; 4.8 and 5 seen
_DOWNLOAD = "the base model's download"
_WEIGHT = {"adapter": 4, "model": 2}  # bytes of a saved parameter: adapters are in fp32 (seen)


class _Need(NamedTuple):
    """What a run writes: where, bytes, what it is, and the key that it is about."""

    folder: Path
    size: float
    what: str
    key: str


@rule
def no_room(case: Case) -> Problems:
    """A disk that fills ends a training, at a checkpoint as a rule, and so after hours.

    What is counted is what surely comes, of models whose sizes are known: checkpoints with the state of their
    optimizer, the adapter and, when the run starts, the base model's download and prepared rows.
    """
    on_disk: defaultdict[int, list[_Need]] = defaultdict(list)
    for need in _needs(case):
        if need.what == _DOWNLOAD and case.model.weights_here:
            continue
        with suppress(OSError):
            on_disk[disks.nearest(need.folder).stat().st_dev].append(need)
    for needs in on_disk.values():
        folder = needs[0].folder
        needed, free = sum(need.size for need in needs), disks.free(folder)
        if needed > free:
            parts = "; ".join(f"{need.what} {need.size / 1e9:.2g} GB" for need in needs)
            problem = f"{folder.absolute()}: {free / 1e9:.2g} GB are free on its disk, and a run writes about "
            problem += f"{needed / 1e9:.2g} GB ({parts})"
            yield "error" if case.launching else "warning", needs[0].key, problem, "make room, or take another disk"


def _needs(case: Case) -> list[_Need]:
    """What a run writes, as far as it is known."""
    needs: list[_Need] = []
    model: dict[str, Any] = {}
    with suppress(UserError):
        model = models.architecture(case.config, download=False)
    sizes = {key: value for key, value in model.items() if isinstance(value, int) and value > 0}
    if linear := _linear(model.get("model_type"), sizes):
        kind = "adapter" if case["adapter"] else "model"
        every = sizes["num_hidden_layers"] * sum(i * o for i, o in linear.values())
        every += sizes["vocab_size"] * sizes["hidden_size"] * (1 if model.get("tie_word_embeddings", True) else 2)
        trained = _trained(case, sizes, linear) if case["adapter"] else every
        checkpoints = _checkpoints(case)
        saved = checkpoints * trained * (_WEIGHT[kind] + _state(case, _WEIGHT[kind]))
        needs.append(_Need(case.runs, trained * _WEIGHT[kind], f"the {kind}", "output_dir"))
        needs.append(_Need(case.runs, saved, f"checkpoints, {checkpoints} of them", "output_dir"))
        if case.launching and not models.is_path(str(case["base_model"])):
            from huggingface_hub.constants import HF_HUB_CACHE

            download = every * _WEIGHT["model"]
            needs.append(_Need(Path(HF_HUB_CACHE), download, _DOWNLOAD, "base_model"))
    if case.launching:
        needs.append(_Need(paths.cache(), _rows(case.config), "prepared rows", "datasets"))
    return [need for need in needs if need.size]


def _rows(config: Config) -> int:
    """Bytes of the rows that are prepared of whole JSONL files; 0 where the cache has rows of the same files, for which
    all of them are hashed where room is scarce."""
    with suppress(UserError, OSError):
        whole = (dataset for _, dataset in datafiles.datasets(config) if dataset.get("split") in (None, "train"))
        files = (file for dataset in whole for file in datafiles.jsonl_files(dataset))
        size = _PREPARED * sum(file.stat().st_size for file in files)
        scarce = size > disks.free(paths.cache()) / 10
        there = scarce and any(handover.prepared_folder(datafiles.record(config)).glob("*/dataset_info.json"))
        return 0 if there else size
    return 0


def _state(case: Case, weight: int) -> int:
    """Bytes of an optimizer's state for each parameter of some bytes: Adam has two values; 0 where it is not known."""
    name = str(case["optimizer"] or "adamw_torch_fused")  # Axolotl's default
    if case["save_only_model"] or "adam" not in name or re.search("galore|apollo|flash|4bit", name):
        return 0
    return 2 if re.search("8bit|fp8", name) else 2 * weight


def _linear(kind: Any, sizes: dict[str, int]) -> dict[str, tuple[int, int]]:
    """The inputs and outputs of each linear layer of a decoder layer; empty for a model of which too little is known.

    Args:
        kind: the model's type.
        sizes: those in its config.json.
    """
    if not sizes.keys() >= {*models.NEEDED[1:]}:
        return {}
    hidden, mlp, heads = (sizes[key] for key in ("hidden_size", "intermediate_size", "num_attention_heads"))
    head = sizes.get("head_dim") or hidden // heads
    queries, keys = heads * head, (sizes.get("num_key_value_heads") or heads) * head
    shapes = {
        "q_proj": (hidden, queries),
        "k_proj": (hidden, keys),
        "v_proj": (hidden, keys),
        "qkv_proj": (hidden, queries + 2 * keys),
        "o_proj": (queries, hidden),
        "gate_proj": (hidden, mlp),
        "up_proj": (hidden, mlp),
        "gate_up_proj": (hidden, 2 * mlp),
        "down_proj": (mlp, hidden),
    }
    return {name: shapes[name] for name in models.LAYERS.get(str(kind), ())}


def _trained(case: Case, sizes: dict[str, int], linear: dict[str, tuple[int, int]]) -> int:
    """The parameters that LoRA surely trains (arXiv 2106.09685), with the embeddings that are trained whole."""
    targets = case["lora_target_modules"]
    named = targets if isinstance(targets, list) else ()  # which layers a regular expression means is not known
    adapted = [shape for name, shape in linear.items() if case["lora_target_linear"] or name in named]
    rank = case["lora_r"] if isinstance(case["lora_r"], int) else 0
    whole = {"embed_tokens", "lm_head"} & set(case["lora_modules_to_save"] or ())
    layers = 0 if case["peft_layers_to_transform"] else sizes["num_hidden_layers"]
    return layers * rank * sum(map(sum, adapted)) + len(whole) * sizes["vocab_size"] * sizes["hidden_size"]


def _checkpoints(case: Case) -> int:
    """How many there are at a time, at most: the oldest goes when a new one is saved."""
    epochs = case["num_epochs"] or 1
    if case["save_strategy"] == "no":
        return 0
    if case["save_steps"]:
        every = case["save_steps"]
        saves = 1 / every if every < 1 else case.steps / every if case.steps else _LIMIT + 1
    else:
        saves = (case["saves_per_epoch"] or 1) * epochs
    return max(min(int(saves), (case["save_total_limit"] or _LIMIT) + 1), 1)
