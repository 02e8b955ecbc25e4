"""`recipe analyze lora`: how many parameters LoRA trains, by layers and rank, and that its update is what it says."""

from pathlib import Path
from typing import Any

from . import models

RANKS = (4, 8, 16, 32, 64, 128)
TARGETS = {
    "q, v": ("q_proj", "v_proj"),
    "attention": models.ATTENTION,
    "all linear": models.LINEAR_LAYERS,
}


def trainable(architecture: dict[str, Any], targets: tuple[str, ...], rank: int) -> int:
    """Parameters of LoRA's two matrices, of rank x in and out x rank, on some layers of every decoder layer.

    Args:
        architecture: the content of a Llama's config.json.
        targets: names of linear layers.
        rank: r, of arXiv 2106.09685.
    """
    width, inner = architecture["hidden_size"], architecture["intermediate_size"]
    head = architecture.get("head_dim") or width // architecture["num_attention_heads"]
    queries, keys = head * architecture["num_attention_heads"], head * architecture["num_key_value_heads"]
    in_and_out = {
        "q_proj": width + queries,
        "k_proj": width + keys,
        "v_proj": width + keys,
        "o_proj": queries + width,
        "gate_proj": width + inner,
        "up_proj": width + inner,
        "down_proj": inner + width,
    }
    layers: int = architecture["num_hidden_layers"]
    return rank * layers * sum(in_and_out[name] for name in targets)


def total(architecture: dict[str, Any]) -> int:
    """All parameters of a Llama: embedding, head unless it is the embedding, linear layers, norms."""
    width, layers = architecture["hidden_size"], architecture["num_hidden_layers"]
    head = architecture.get("head_dim") or width // architecture["num_attention_heads"]
    queries, keys = head * architecture["num_attention_heads"], head * architecture["num_key_value_heads"]
    linear = 2 * width * queries + 2 * width * keys + 3 * width * architecture["intermediate_size"]
    embeddings = architecture["vocab_size"] * width * (1 if architecture.get("tie_word_embeddings") else 2)
    count: int = embeddings + layers * (linear + 2 * width) + width
    return count


def rows(names: list[str]) -> list[dict[str, Any]]:
    """Trainable parameters and their share of all, for each model, set of layers and rank.

    Raises:
        UserError: a model's sizes cannot be had.
    """
    found = []
    for name in names:
        architecture = models.architecture({"base_model": name})
        for label, targets in TARGETS.items():
            for rank in RANKS:
                count = trainable(architecture, targets, rank)
                found.append(
                    {
                        "model": name,
                        "layers": label,
                        "rank": rank,
                        "trainable": count,
                        "share": count / (count + total(architecture)),
                    }
                )
    return found


def table(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each model and set of layers, a column for each rank."""
    wide: dict[tuple[str, str], dict[str, Any]] = {}
    for row in found:
        line = wide.setdefault((row["model"], row["layers"]), {"model": row["model"], "layers": row["layers"]})
        line[f"r {row['rank']}"] = f"{row['trainable']:,} ({row['share']:.2%})"
    return list(wide.values())


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
    state = model.state_dict()
    a, b = (next(tensor for name, tensor in state.items() if f"lora_{which}" in name) for which in "AB")
    expected = inputs @ (weight + alpha / rank * b @ a).T
    with torch.no_grad():
        unmerged = model(inputs)
        merged = model.merge_and_unload()(inputs)
    largest = expected.abs().max()
    return {
        "unmerged": ((unmerged - expected).abs().max() / largest).item(),
        "merged": ((merged - expected).abs().max() / largest).item(),
    }


def draw(found: list[dict[str, Any]], file: Path) -> None:
    """The share of trainable parameters by rank, a line for each model and set of layers.

    Args:
        file: where to, as .png or .svg.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6), layout="constrained")
    axes = figure.subplots()
    styles = dict(zip(TARGETS, (":", "--", "-"), strict=True))
    names = list(dict.fromkeys(row["model"] for row in found))
    for i, name in enumerate(names):
        for label, style in styles.items():
            of_line = [row for row in found if (row["model"], row["layers"]) == (name, label)]
            ranks, shares = [row["rank"] for row in of_line], [100 * row["share"] for row in of_line]
            axes.plot(ranks, shares, style, marker=".", color=f"C{i}", label=f"{name}, {label}")
    axes.set(xscale="log", yscale="log", xlabel="rank", ylabel="trainable, in percent of all parameters")
    axes.set_xticks(RANKS, [str(rank) for rank in RANKS])
    figure.legend(loc="outside right upper", fontsize="small")
    figure.savefig(file)
