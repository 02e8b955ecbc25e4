"""`recipe analyze lora`: how many parameters LoRA trains, by layers and rank, and that its update is what it says."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..base.errors import UserError
from ..base.yamlfiles import Config
from ..configs import models

RANKS = (4, 8, 16, 32, 64, 128)
TARGETS = {
    "q, v": ("q_proj", "v_proj"),
    "attention": models.ATTENTION,
    "all linear": models.LINEAR_LAYERS,
}


@dataclass(frozen=True)
class Llama:
    """The sizes of a model whose decoder layers are Llama's, from its config.json."""

    width: int
    inner: int
    layers: int
    queries: int
    keys: int
    vocabulary: int
    tied: bool

    def linear(self) -> dict[str, tuple[int, int]]:
        """Each linear layer's inputs and outputs."""
        attention = {name: (self.width, self.keys) for name in ("k_proj", "v_proj")}
        mlp = {name: (self.width, self.inner) for name in ("gate_proj", "up_proj")}
        square = {"q_proj": (self.width, self.queries), "o_proj": (self.queries, self.width)}
        return attention | mlp | square | {"down_proj": (self.inner, self.width)}


def sizes(architecture: dict[str, Any]) -> Llama:
    """The sizes in a config.json.

    Raises:
        UserError: it is of another kind of model.
    """
    if architecture.get("model_type") not in ("llama", "mistral"):
        kind = architecture.get("model_type")
        raise UserError(
            f"base_model: of model type {kind}, and only Llama's layers are counted here; `recipe plan` does"
        )
    try:
        width, heads = architecture["hidden_size"], architecture["num_attention_heads"]
        head = architecture.get("head_dim") or width // heads
        keys = architecture.get("num_key_value_heads") or heads
        inner, layers = architecture["intermediate_size"], architecture["num_hidden_layers"]
        vocabulary, tied = architecture["vocab_size"], bool(architecture.get("tie_word_embeddings"))
    except KeyError as error:
        raise UserError(
            f"base_model: its config.json says nothing of {error}; `recipe plan` takes the default"
        ) from None
    return Llama(width, inner, layers, heads * head, keys * head, vocabulary, tied)


def trainable(model: Llama, targets: tuple[str, ...], rank: int) -> int:
    """Parameters of LoRA's two matrices, of rank x inputs and outputs x rank, on some layers of every decoder layer.

    Args:
        model: the model's sizes.
        targets: names of linear layers.
        rank: r, of arXiv 2106.09685.
    """
    linear = model.linear()
    return rank * model.layers * sum(sum(linear[name]) for name in targets)


def total(model: Llama) -> int:
    """All parameters: embedding, head unless it is the embedding, linear layers, norms."""
    linear = sum(inputs * outputs for inputs, outputs in model.linear().values())
    embeddings = model.vocabulary * model.width * (1 if model.tied else 2)
    return embeddings + model.layers * (linear + 2 * model.width) + model.width


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
    model = sizes(models.architecture(recipe, download=False))
    count = trainable(model, targets, int(recipe["lora_r"]))
    return count / (count + total(model))


def rows(recipes: dict[str, Config], download: bool = True) -> list[dict[str, Any]]:
    """Trainable parameters and their share of all, for each model, set of layers and rank.

    Args:
        recipes: a config for each model's name.
        download: whether a model's config.json may be fetched from the hub.

    Raises:
        UserError: a model's sizes cannot be had.
    """
    found = []
    for name, recipe in recipes.items():
        model = sizes(models.architecture(recipe, download))
        for label, targets in TARGETS.items():
            for rank in RANKS:
                count = trainable(model, targets, rank)
                share = count / (count + total(model))
                found.append({"model": name, "layers": label, "rank": rank, "trainable": count, "share": share})
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
