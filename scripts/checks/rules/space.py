"""Whether the disks have room for what a run writes."""

import re
from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from ...base.files import existing_parent, free_bytes
from ...configs import models
from .case import Case, Problems, rule

_LIMIT = 4  # of checkpoints, unless save_total_limit says another (axolotl/core/builders/base.py)
_IN_16_BITS, _IN_32_BITS = 2, 4  # bytes of a saved parameter: of a model, and of an adapter (seen)


class _Need(NamedTuple):
    """A need for room: folder, bytes, content, and the key that decides about it."""

    folder: Path
    size: float
    what: str
    key: str


@rule
def no_room(case: Case) -> Problems:
    """A disk that fills ends a training, at a checkpoint as a rule, and so after hours.

    What is counted is what surely comes, of models whose sizes are known: checkpoints with the state of their
    optimizer, the adapter and, when the run starts, the base model's download.
    """
    on_disk: defaultdict[int, list[_Need]] = defaultdict(list)
    for need in _needs(case):
        if need.key == "base_model" and case.model.weights_here:
            continue
        with suppress(OSError):
            on_disk[existing_parent(need.folder).stat().st_dev].append(need)
    for needs in on_disk.values():
        folder = needs[0].folder
        needed, free = sum(need.size for need in needs), free_bytes(folder)
        if needed > free:
            parts = "; ".join(f"{need.what} {need.size / 1e9:.2g} GB" for need in needs)
            problem = f"{folder.absolute()}: {free / 1e9:.2g} GB are free on its disk, and a run writes about "
            problem += f"{needed / 1e9:.2g} GB ({parts})"
            yield "error" if case.launching else "warning", needs[0].key, problem, "make room, or take another disk"


def _needs(case: Case) -> list[_Need]:
    """What a run writes, as far as it is known."""
    model, trained = _parameters(case)
    weight = _IN_32_BITS if case["adapter"] else _IN_16_BITS
    checkpoints = _checkpoints(case)
    saved = checkpoints * trained * (weight + _state(case, weight))
    needs = [
        _Need(case.runs, trained * weight, "the adapter" if case["adapter"] else "the model", "output_dir"),
        _Need(case.runs, saved, f"checkpoints, {checkpoints} of them", "output_dir"),
    ]
    if case.launching and not models.is_path(str(case["base_model"])):
        from huggingface_hub.constants import HF_HUB_CACHE

        needs.append(_Need(Path(HF_HUB_CACHE), model * _IN_16_BITS, "the base model's download", "base_model"))
    return [need for need in needs if need.size]


def _parameters(case: Case) -> tuple[int, int]:
    """The parameters of a model of known sizes, and those that are surely trained (arXiv 2106.09685); else 0."""
    sizes = {key: value for key, value in case.architecture.items() if isinstance(value, int) and value > 0}
    names = models.LAYERS.get(str(case.architecture.get("model_type")), ())
    if not names or not sizes.keys() >= {*models.NEEDED[1:]}:
        return 0, 0
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
    layers, embedding = sizes["num_hidden_layers"], sizes["vocab_size"] * hidden
    model = layers * sum(i * o for i, o in map(shapes.__getitem__, names))
    model += embedding * (1 if case.architecture.get("tie_word_embeddings", True) else 2)
    if not case["adapter"]:
        return model, model
    targets = case["lora_target_modules"]
    named = targets if isinstance(targets, list) else ()  # which layers a regular expression means is not known
    adapted = [sum(shapes[name]) for name in names if case["lora_target_linear"] or name in named]
    rank = case["lora_r"] if isinstance(case["lora_r"], int) else 0
    whole = {"embed_tokens", "lm_head"} & set(case["lora_modules_to_save"] or ())
    return model, (0 if case["peft_layers_to_transform"] else layers * rank * sum(adapted)) + len(whole) * embedding


def _state(case: Case, weight: int) -> int:
    """Bytes of an optimizer's state for each parameter of some bytes: Adam has two values; 0 where it is not known."""
    name = str(case["optimizer"] or "adamw_torch_fused")  # Axolotl's default
    if case["save_only_model"] or "adam" not in name or re.search("galore|apollo|flash|4bit", name):
        return 0
    return 2 if re.search("8bit|fp8", name) else 2 * weight


def _checkpoints(case: Case) -> int:
    """How many there are at a time, at most: the oldest goes when a new one is saved."""
    if case["save_strategy"] == "no":
        return 0
    saves = (case["saves_per_epoch"] or 1) * (case["num_epochs"] or 1)
    if every := case["save_steps"]:
        saves = 1 / every if every < 1 else (case.steps or every) / every
    return max(min(int(saves), (case["save_total_limit"] or _LIMIT) + 1), 1)
