"""`recipe analyze lora`: the parameters that LoRA trains, by layers and rank."""

from collections import Counter
from itertools import groupby, product
from operator import itemgetter
from pathlib import Path
from textwrap import shorten
from typing import Any

from ..base.errors import UserError
from ..base.files import read_json
from ..base.hub import importing_axolotl
from ..base.yamlfiles import Config
from ..configs import models
from . import cache
from .layers import alike, having
from .plan_tables import drawing

RANKS = (4, 8, 16, 32, 64, 128)
SPARE = ("r 128", "r 4", "r 64", "r 16", "r 8")  # columns that a narrow table leaves out
STYLES = {"attention": "--", "all linear": "-"}  # of lines by their set of layers; a first set has others
_OTHERS = (
    *("lora_modules_to_save", "lora_rank_pattern", "lora_exclude_modules", "lora_target_parameters"),
    *("peft_layers_to_transform", "peft_use_dora", "unfrozen_parameters"),
)
"""Keys with which a config trains something else than LoRA of one rank on every layer of its targets' names."""


def total(architecture: dict[str, Any], anew: bool = True) -> int:
    """All parameters of a model, those of tied embeddings once.

    Args:
        architecture: the content of the model's config.json.
        anew: whether to count them, which imports torch, where they were not counted before.

    Raises:
        UserError: transformers or PEFT cannot build it, or it was not counted before.
    """
    return int(_counted(architecture, anew)["total"])


def share(recipe: Config, anew: bool = True) -> float | None:
    """The share of all parameters that a config trains; None where it is not LoRA of one rank on named layers.

    Args:
        anew: see `total`.

    Raises:
        UserError: the model's config.json is not on this machine; also as `total`.
    """
    targets = recipe.get("lora_target_modules")
    if any(recipe.get(key) for key in _OTHERS) or isinstance(targets, str) or not recipe.get("lora_r"):
        return None
    counted = _counted(models.architecture(recipe, download=False), anew)
    ends = tuple(f".{name}" for name in targets or ())
    of_layers = [
        count
        for layer, count in counted["trained"].items()
        if recipe.get("lora_target_linear") or f".{layer}".endswith(ends)
    ]
    return _of_rank(sum(of_layers), counted["total"], int(recipe["lora_r"]))["share"] if of_layers else None


def rows(recipes: dict[str, Config], download: bool = True, anew: bool = True) -> list[dict[str, Any]]:
    """Trainable parameters and their share of all, for each model, set of layers and rank.

    Args:
        recipes: a config for each model's name.
        download: whether a model's config.json may be fetched from the hub.
        anew: see `total`.

    Raises:
        UserError: a model's config.json is not available; also as `total`.
    """
    found = []
    for name, recipe in recipes.items():
        counted = _counted(models.architecture(recipe, download), anew)
        for (label, layers), rank in product(_sets(list(counted["trained"])).items(), RANKS):
            trained = sum(counted["trained"][layer] for layer in layers)
            found.append({"model": name, "layers": label, "rank": rank, **_of_rank(trained, counted["total"], rank)})
    return found


def _of_rank(trained: int, frozen: int, rank: int) -> dict[str, Any]:
    """What LoRA of a rank trains, from what it trains at rank 1: its matrices have rank x inputs and outputs x rank
    values (arXiv 2106.09685)."""
    return {"trainable": rank * trained, "share": rank * trained / (rank * trained + frozen)}


def _sets(layers: list[str]) -> dict[str, list[str]]:
    """Sets of a model's linear layers: those that make queries and values, all of attention, all.

    Where one layer makes queries, keys and values, as Phi-3's qkv_proj does, it is the first set, which has its name.
    """
    of_attention = [layer for layer in layers if "attn" in layer or "attention" in layer]
    ends = {layer: layer.rpartition(".")[2] for layer in layers}
    queries = {"q, v": [layer for layer in of_attention if ends[layer] in ("q_proj", "v_proj")]}
    if not queries["q, v"]:
        queries = {ends[layer]: [layer] for layer in of_attention if "qkv" in layer or "query_key_value" in layer}
    return {label: of for label, of in (queries | {"attention": of_attention, "all linear": layers}).items() if of}


def _counted(architecture: dict[str, Any], anew: bool) -> dict[str, Any]:
    """All parameters of a model, and what LoRA of rank 1 trains on each kind of linear layer, cached once counted."""
    file = cache.file("parameters", architecture)
    counted = read_json(file)
    if not {"total", "trained"} <= counted.keys():
        if not anew:
            raise UserError("base_model: its parameters were not counted yet; `recipe analyze lora` counts them")
        with importing_axolotl():
            try:
                counted = _count(architecture)
            except Exception as error:  # any model's code runs in it
                problem = shorten(f"{type(error).__name__}: {error}", 200)
                raise UserError(f"base_model: its parameters cannot be counted: {problem}") from None
        cache.keep(file, counted)
    return counted


def _count(architecture: dict[str, Any]) -> dict[str, Any]:
    """The same, where layers are alike from one and two of them; each more adds as much. Imports torch."""
    if (number := alike(architecture)) <= 2:
        return _count_all(architecture)
    one, two = (_count_all(having(architecture, n)) for n in (1, 2))
    of_one, of_two = ({"total": count["total"]} | count["trained"] for count in (one, two))
    grown = {key: of_one[key] + (number - 1) * (of_two[key] - of_one[key]) for key in of_two}
    return {"total": grown.pop("total"), "trained": grown}


def _count_all(architecture: dict[str, Any]) -> dict[str, Any]:
    """The same, of the model as transformers builds it and PEFT adapts it, on torch's meta device, which stores no
    values."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    auto: Any = AutoModelForCausalLM
    with torch.device("meta"), no_init_weights():
        model = auto.from_config(AutoConfig.for_model(**architecture))
        model.tie_weights()
        frozen = model.num_parameters()
        model = get_peft_model(model, LoraConfig(r=1, target_modules="all-linear", task_type="CAUSAL_LM"))
    trained: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            layer = name.partition(".lora_")[0].split(".")
            trained[".".join(layer[-2:])] += parameter.numel()
    return {"total": frozen, "trained": trained}


def table(counts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each model and set of layers, a column for each rank."""
    return [
        {"model": model, "layers": layers}
        | {f"r {row['rank']}": f"{row['trainable']:,} ({row['share']:.2%})" for row in line}
        for (model, layers), line in groupby(counts, itemgetter("model", "layers"))
    ]


def draw(counts: list[dict[str, Any]], file: Path) -> None:
    """The share of trainable parameters by rank, a line for each model and set of layers.

    Args:
        file: where to, as .png or .svg.
    """
    names = list(dict.fromkeys(row["model"] for row in counts))
    with drawing(file, (11, 6)) as axes:
        for (model, layers), line in groupby(counts, itemgetter("model", "layers")):
            ranks, shares = zip(*((row["rank"], 100 * row["share"]) for row in line), strict=True)
            colour = f"C{names.index(model)}"
            style = STYLES.get(layers, ":")
            axes.plot(ranks, shares, style, marker=".", color=colour, label=f"{model}, {layers}")
        axes.set(xscale="log", yscale="log", xlabel="rank", ylabel="trainable, in percent of all parameters")
        axes.set_xticks(RANKS, [str(rank) for rank in RANKS])
