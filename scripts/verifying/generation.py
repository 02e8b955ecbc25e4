"""Answers with a cache, beside passes of the same model without one. Imports torch."""

from collections.abc import Sequence
from typing import Any

import orjson
import torch

from ..base import yamlfiles
from ..base.files import sha256
from ..base.paths import find_recipe
from ..configs.precision import precision
from ..data.sample import usual_sample
from ..data.study import Decoding
from ..scores.engines.reference import Reference
from ..scores.evaluations import EvaluationSettings
from ..scores.prompter import Prompter
from .bench import RECIPE, Bench, Figure, Figures

ROWS, TOKENS = 4, 24


def generation(bench: Bench) -> Figures:
    """How far any written token is below the best one."""
    run = bench.result("training")
    attention = yamlfiles.read_yaml(find_recipe(RECIPE)[1])["attn_implementation"]
    cfg = yamlfiles.read_yaml(run / "config.yaml") | {"attn_implementation": attention}  # not that of the training
    data = usual_sample() / "valid.jsonl"
    settings = EvaluationSettings(
        base_model=cfg["base_model"],
        adapter=str(run / "output"),
        adapter_sha256=sha256(run / "output" / "adapter_model.safetensors"),
        data=str(data),
        data_sha256="",
        rows=ROWS,
        decoding=Decoding(max_new_tokens=TOKENS),
        batch_size=ROWS,
        quantized=True,
        dtype=precision(cfg, on_gpu=bench.gpu is not None).weights,
    )
    prompter = Prompter(settings, cfg, run / "output")
    reference = Reference(prompter)
    rows = list(map(orjson.loads, data.read_bytes().splitlines()))[:ROWS]
    prompts = [example.prompt for example in prompter.examples(rows)]
    return {"answers": Figure(shortfall(reference.model, prompts, reference.answers(prompts, 0)))}


@torch.inference_mode()
def shortfall(model: Any, prompts: Sequence[list[int]], answers: Sequence[list[int]]) -> float:
    """How far the logit of a written token is below the largest one, at most, in one pass without a cache.

    Args:
        model: what wrote them, greedily.
        prompts: tokens.
        answers: the tokens after each.
    """
    most = 0.0
    for prompt, answer in zip(prompts, answers, strict=True):
        tokens = torch.tensor([prompt + answer], device=model.device)
        logits = model(tokens, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
        written = logits.gather(1, tokens[0, len(prompt) :, None])[:, 0]
        most = max(most, (logits.max(dim=1).values - written).max().item())
    return most
