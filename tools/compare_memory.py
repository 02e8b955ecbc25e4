"""Published memory figures beside what a plan says of the same step, and what fitcheck-llm does: `make compare-memory`.

memory_figures.csv has the figures, each with its source. Those of the plain loop are of transformers and PEFT on a T4
and name their protocol whole. The others are of frameworks with loops, losses and kernels of their own (chunked losses,
norms in bf16, logits shifted by a copy in fp32): they show how far a plan of Axolotl's loop is from them.
"""

import csv
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from markdown_table import print_markdown

from qlora_recipes.config import gpus, models
from qlora_recipes.plan import allocator
from qlora_recipes.plan.fake_step import trace
from qlora_recipes.plan.steps import Step

FIGURES = Path(__file__).with_name("memory_figures.csv")
MIB = 2**20

_SIZES = ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"]
_OTHER_MODELS = {  # from their config.json: the sizes above, the vocabulary, and whether head and embedding are one
    "llama-160m": ("llama", 768, 3072, 12, 12, 12, 32000, False),
    "llama-2-13b": ("llama", 5120, 13824, 40, 40, 40, 32000, False),
    "tinyllama-1.1b": ("llama", 2048, 5632, 22, 32, 4, 32000, False),
    "smollm2-135m": ("llama", 576, 1536, 30, 9, 3, 49152, True),
    "smollm2-1.7b": ("llama", 2048, 8192, 24, 32, 32, 49152, True),
    "qwen2.5-0.5b": ("qwen2", 896, 4864, 24, 14, 2, 151936, True),
    "qwen2.5-1.5b": ("qwen2", 1536, 8960, 28, 12, 2, 151936, True),
}
_STUDY_MODELS = {
    "llama-2-7b": "meta-llama/Llama-2-7b-hf",
    "llama-3-8b": "meta-llama/Meta-Llama-3-8B",
    "llama-3.2-3b": "meta-llama/Llama-3.2-3B-Instruct",
}
_TRAINER = ("Trainer, by Unsloth", "LLaMA-Factory", "Unsloth")


def architecture(name: str) -> dict[str, Any]:
    """The sizes in a model's config.json that memory depends on."""
    if name in _STUDY_MODELS:
        return models.architecture({"base_model": _STUDY_MODELS[name]})
    kind, *sizes, vocabulary, tied = _OTHER_MODELS[name]
    return {
        "model_type": kind,
        **dict(zip(_SIZES, sizes, strict=True)),
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
    }


def figures() -> list[dict[str, str]]:
    """The published figures."""
    with FIGURES.open() as stream:
        return list(csv.DictReader(stream))


def step_of(figure: dict[str, str]) -> Step:
    """The step that a figure is of, in the loop that comes nearest."""
    dtype = {"fp16": "float16", "bf16": "bfloat16"}[figure["dtype"]]
    trainer = figure["framework"] in _TRAINER
    card = (8, 0) if figure["card"].endswith(" GB") else gpus.find_gpu(figure["card"]).capability
    projections = [f"{name}_proj" for name in figure["targets"].split()]
    return Step(
        model=json.dumps(architecture(figure["model"])),
        adapter={"full": None}.get(figure["method"], figure["method"]),
        weights=dtype,
        autocast=dtype if trainer else None,
        rank=int(figure["rank"] or 8),
        targets=tuple(projections),
        saved_modules=(),
        dora=False,
        fp32_adapters=True,
        dropout=0.0,
        quantization="nf4",
        double_quantization=figure["double_quantization"] == "yes",
        checkpointing=None if figure["checkpointing"] == "no" else figure["checkpointing"],
        attention=figure["attention"],
        padded=False,
        packed=False,
        flat=False,
        chunked_loss=False,
        optimizer=figure["optimizer"],
        accumulates=trainer,
        axolotl=trainer,
        capability=card,
    )


def planned(figure: dict[str, str]) -> float:
    """MiB that a plan gives for a figure, of the same kind: allocated, reserved, or with CUDA's own."""
    from qlora_recipes.plan.step_plan import CONTEXT

    shape = int(figure["rows"]), int(figure["tokens"])
    used = allocator.usage(trace(step_of(figure), shape))
    size = used.allocated if figure["kind"] == "allocated" else used.reserved
    return (size + (CONTEXT if figure["kind"] in ("card", "process") else 0)) / MIB


def fitcheck(figure: dict[str, str], cache: Path) -> float:
    """MiB that fitcheck-llm predicts: the total, without its overhead where the figure is of allocated memory."""
    model = f"figures/{figure['model']}"
    folder = cache / "hub" / f"models--{model.replace('/', '--')}"
    for file, text in (("refs/main", "0"), ("snapshots/0/config.json", json.dumps(architecture(figure["model"])))):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(text)
    optimizer = "adam8bit" if "8bit" in figure["optimizer"] else "adamw"
    words = ["--json", "--vram-mib", "81920", "--precision", figure["dtype"], "--optimizer", optimizer]
    words += ["--batch-size", figure["rows"], "--seq-len", figure["tokens"]]
    if figure["rank"]:
        words += ["--lora-r", figure["rank"], "--lora-targets", figure["targets"].replace(" ", ",")]
    flags = {
        "--no-lora": figure["method"] == "full",
        "--quant=nf4": figure["method"] == "qlora",
        "--double-quant": figure["double_quantization"] == "yes",
        "--grad-checkpoint": figure["checkpointing"] != "no",
        "--flash-attn": figure["attention"] != "eager",
    }
    words += [flag for flag, is_set in flags.items() if is_set]
    command = [Path(sys.executable).with_name("fitcheck"), model, *words]
    environment = os.environ | {"HF_HOME": str(cache), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    memory = json.loads(done.stdout)["memory_mib"]
    return float(memory["total"] - (memory["overhead"] if figure["kind"] == "allocated" else 0))


def main() -> None:
    """Print the comparison as Markdown, and its mean and worst errors for the plain loop."""
    errors, rows = {"plan": [], "fitcheck-llm": []}, []
    with tempfile.TemporaryDirectory() as cache:
        for figure in figures():
            published, ours, theirs = float(figure["mib"]), planned(figure), fitcheck(figure, Path(cache))
            error, other = ours / published - 1, theirs / published - 1
            if figure["framework"] == "plain loop":
                errors["plan"].append(abs(error))
                errors["fitcheck-llm"].append(abs(other))
            rows.append(
                {
                    "figure": f"{figure['framework']} {figure['id']}",
                    "step": f"{figure['model']}, {figure['method']}, {figure['rows']} x {figure['tokens']}",
                    "kind": figure["kind"],
                    "published MiB": round(published),
                    "plan MiB": round(ours),
                    "error": f"{error:+.1%}",
                    "fitcheck-llm": f"{other:+.1%}",
                }
            )
    print_markdown(rows)
    for name, of in errors.items():
        print(f"{name}: plain loop, n = {len(of)}: mean error {sum(of) / len(of):.2%}, worst {max(of):.2%}")


if __name__ == "__main__":
    main()
