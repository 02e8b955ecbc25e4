"""`recipe analyze lora`: how many parameters LoRA trains, by layers and rank, and that its update is what it says."""

from itertools import groupby, product
from operator import itemgetter
from pathlib import Path
from typing import Any

from ..base.errors import UserError
from ..base.yamlfiles import Config
from ..configs import models
from .drawing import drawing

RANKS = (4, 8, 16, 32, 64, 128)
TARGETS = {
    "q, v": ("q_proj", "v_proj"),
    "attention": models.ATTENTION,
    "all linear": models.LINEAR_LAYERS,
}


def linear_layers(architecture: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of each linear layer in a decoder layer of a Llama.

    Args:
        architecture: the content of the model's config.json.

    Raises:
        UserError: it is another kind of model.
    """
    kind = architecture.get("model_type")
    if kind not in ("llama", "mistral"):
        raise UserError(f"base_model: model type {kind}, and only Llama's layers are counted here; `recipe plan` does")
    for size in ("hidden_size", "num_attention_heads", "intermediate_size", "num_hidden_layers", "vocab_size"):
        if size not in architecture:
            raise UserError(f"base_model: its config.json lacks {size}; `recipe plan` takes the default")
    width = architecture["hidden_size"]
    inner = architecture["intermediate_size"]
    heads = architecture["num_attention_heads"]
    head = architecture.get("head_dim") or width // heads
    keys = head * (architecture.get("num_key_value_heads") or heads)
    return {
        "q_proj": (width, heads * head),
        "k_proj": (width, keys),
        "v_proj": (width, keys),
        "o_proj": (heads * head, width),
        "gate_proj": (width, inner),
        "up_proj": (width, inner),
        "down_proj": (inner, width),
    }


def trainable(architecture: dict[str, Any], targets: tuple[str, ...], rank: int) -> int:
    """Parameters of LoRA's two matrices, of rank x inputs and outputs x rank, on some layers of every decoder layer.

    Args:
        architecture: as for `linear_layers`.
        targets: names of linear layers.
        rank: r, of arXiv 2106.09685.
    """
    layers = linear_layers(architecture)
    return rank * architecture["num_hidden_layers"] * sum(sum(layers[name]) for name in targets)


def total(architecture: dict[str, Any]) -> int:
    """All parameters: embedding, head unless it is the embedding, linear layers, norms."""
    linear = sum(inputs * outputs for inputs, outputs in linear_layers(architecture).values())
    width = architecture["hidden_size"]
    embeddings = architecture["vocab_size"] * width * (1 if architecture.get("tie_word_embeddings") else 2)
    return embeddings + architecture["num_hidden_layers"] * (linear + 2 * width) + width


def share(recipe: Config) -> float | None:
    """The share of all parameters that a config trains; None where it does not name linear layers.

    Raises:
        UserError: the model's sizes are not on this machine.
    """
    targets = (
        models.LINEAR_LAYERS if recipe.get("lora_target_linear") else tuple(recipe.get("lora_target_modules") or ())
    )
    if not (targets and recipe.get("lora_r") and set(targets) <= set(models.LINEAR_LAYERS)):
        return None
    return _count(models.architecture(recipe, download=False), targets, int(recipe["lora_r"]))["share"]


def rows(recipes: dict[str, Config], download: bool = True) -> list[dict[str, Any]]:
    """Trainable parameters and their share of all, for each model, set of layers and rank.

    Args:
        recipes: a config for each model's name.
        download: whether a model's config.json may be fetched from the hub.

    Raises:
        UserError: a model's sizes are not available.
    """
    architectures = {name: models.architecture(recipe, download) for name, recipe in recipes.items()}
    return [
        {"model": name, "layers": label, "rank": rank, **_count(architecture, targets, rank)}
        for (name, architecture), (label, targets), rank in product(architectures.items(), TARGETS.items(), RANKS)
    ]


def _count(architecture: dict[str, Any], targets: tuple[str, ...], rank: int) -> dict[str, Any]:
    count = trainable(architecture, targets, rank)
    return {"trainable": count, "share": count / (count + total(architecture))}


def table(counts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each model and set of layers, a column for each rank."""
    return [
        {"model": model, "layers": layers}
        | {f"r {row['rank']}": f"{row['trainable']:,} ({row['share']:.2%})" for row in line}
        for (model, layers), line in groupby(counts, itemgetter("model", "layers"))
    ]


def update_error(rank: int = 32, alpha: int = 16, width: int = 576) -> dict[str, float]:
    """How far PEFT's LoRA, unmerged and merged, is from W' = W + (alpha / rank) B A, in fp64. Imports torch and PEFT.

    Returns:
        The largest difference in the outputs, as a share of the largest output.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    inputs = torch.randn(64, width, dtype=torch.float64)
    layer = torch.nn.Linear(width, width, bias=False, dtype=torch.float64)
    weight = layer.weight.detach().clone()
    lora = LoraConfig(r=rank, lora_alpha=alpha, target_modules=["0"], init_lora_weights=False)
    model: Any = get_peft_model(torch.nn.Sequential(layer), lora)
    a, b = (next(value for name, value in model.state_dict().items() if f"lora_{matrix}" in name) for matrix in "AB")
    expected = inputs @ (weight + alpha / rank * b @ a).T
    with torch.no_grad():
        outputs = {"unmerged": model(inputs), "merged": model.merge_and_unload()(inputs)}
    return {how: ((output - expected).abs().max() / expected.abs().max()).item() for how, output in outputs.items()}


def draw(counts: list[dict[str, Any]], file: Path) -> None:
    """The share of trainable parameters by rank, a line for each model and set of layers.

    Args:
        file: where to, as .png or .svg.
    """
    names = list(dict.fromkeys(row["model"] for row in counts))
    styles = dict(zip(TARGETS, (":", "--", "-"), strict=True))
    with drawing(file, (11, 6)) as axes:
        for (model, layers), line in groupby(counts, itemgetter("model", "layers")):
            ranks, shares = zip(*((row["rank"], 100 * row["share"]) for row in line), strict=True)
            colour = f"C{names.index(model)}"
            axes.plot(ranks, shares, styles[layers], marker=".", color=colour, label=f"{model}, {layers}")
        axes.set(xscale="log", yscale="log", xlabel="rank", ylabel="trainable, in percent of all parameters")
        axes.set_xticks(RANKS, [str(rank) for rank in RANKS])
