"""`recipe plan`: parameters, memory and work of a config, known before it runs.

Planning imports torch only where a step was not traced before: what a trace says is kept in the cache, under a hash
of all that it depends on.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from functools import cache, cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import orjson

from . import check, datafiles, models, paths, rules, study, traces
from .compose import Request, compose
from .config import Config
from .errors import UserError
from .files import read_json, write_atomically
from .gpus import Gpu, named
from .rundir import all_runs
from .traces import Shape, Step, Trace

GIB = 2**30
CONTEXT = 0.14 * GIB
"""What CUDA itself takes: 133 to 147 MiB, as fitcheck's published runs on a T4 tell process and allocator apart."""
USABLE = 14.5 / 16
"""The share of a card's memory that is planned with. Of 16 GB, torch finds 14.56 GiB on a T4 (its ECC takes the rest)
and 15.56 GiB on a Quadro RTX 5000; a display and what allocator and driver lose need room too."""
SIZES = (8, 12, 16, 24, 40, 48, 80)
"""Cards by their memory in GB, for a plan that names none."""
UTILIZATION = 0.3
"""The share of the peak rate that is assumed where nothing was measured."""
ROUND = 64
"""Axolotl pads batches to multiples of so many tokens, and so lengths are planned."""

_OPTIMIZERS = {
    "adamw_torch",
    "adamw_torch_fused",
    "adamw_8bit",
    "adamw_bnb_8bit",
    "paged_adamw_8bit",
    "paged_adamw_32bit",
    "adamw_bnb_32bit",
}
_TAKE_MORE = ("peft_use_dora", "lora_target_parameters", "unfrozen_parameters")
_FUSED_LOSSES = ("cut_cross_entropy", "liger_cross_entropy", "liger_fused_linear_cross_entropy")
_KERNELS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel")


def step_of(config: Config, architecture: dict[str, Any], capability: tuple[int, int]) -> tuple[Step, list[str]]:
    """The training step that Axolotl makes of a config, and what of it cannot be traced.

    Args:
        config: a config that `recipe check` finds no error in.
        architecture: the content of the model's config.json.
        capability: the GPU's compute capability.

    Raises:
        UserError: it is of a kind that this project cannot plan.
    """
    adapter = config.get("adapter")
    if adapter not in (None, "lora", "qlora"):
        raise UserError(f"adapter: {adapter} cannot be planned; lora, qlora and none can")
    if config.get("load_in_8bit") or "quantization_config" in architecture:
        raise UserError("a base in 8 bits, or quantized before, cannot be planned")
    if config.get("rl"):
        raise UserError("rl: preference training cannot be planned")
    notes = []
    dtype, autocast = _precision(config, capability)
    if not adapter and dtype == "float16":
        dtype = "float32"
        notes.append("weights in fp32: a gradient scaler refuses gradients in fp16")
    optimizer = str(config.get("optimizer") or "adamw_torch_fused")
    if optimizer not in _OPTIMIZERS:
        notes.append(f"optimizer {optimizer}: planned as adamw_torch_fused")
        optimizer = "adamw_torch_fused"
    attention = rules.Case(config, set()).attention or "sdpa"
    if attention not in ("sdpa", "eager", "flash_attention_2"):
        notes.append(f"{attention}: planned as flash_attention_2")
        attention = "flash_attention_2"
    notes += [f"{key}: not traced; it takes less" for key in (*_FUSED_LOSSES, *_KERNELS) if config.get(key)]
    notes += [f"{key}: not traced; it takes more" for key in _TAKE_MORE if config.get(key)]
    if config.get("gradient_checkpointing") == "offload" or config.get("activation_offloading"):
        notes.append("activation_offloading: not traced; it takes less")
    checkpointing = None
    if config.get("gradient_checkpointing"):
        reentrant = (config.get("gradient_checkpointing_kwargs") or {}).get("use_reentrant", False)
        checkpointing = "reentrant" if reentrant else "non-reentrant"
    rows, packed = int(config.get("micro_batch_size") or 1), bool(config.get("sample_packing"))
    pads, masks = rows > 1 or bool(config.get("pad_to_sequence_len")), attention != "flash_attention_2"
    if int(config.get("eval_batch_size") or rows) > rows:
        notes.append("eval_batch_size: evaluation is not traced, and with more rows than training may take more")
    quantization = config.get("bnb_config_kwargs") or {}
    targets = "all-linear" if config.get("lora_target_linear") else config.get("lora_target_modules") or ()
    step = Step(
        model=json.dumps(architecture, sort_keys=True),
        adapter=adapter,
        weights=dtype,
        autocast=autocast,
        rank=int(config.get("lora_r") or 8),
        targets="all-linear"
        if config.get("lora_target_linear")
        else targets
        if isinstance(targets, str)
        else tuple(targets),
        saved_modules=tuple(config.get("lora_modules_to_save") or ()),
        dropout=float(config.get("lora_dropout") or 0),
        quantization=quantization.get("bnb_4bit_quant_type", "nf4"),
        double_quantization=quantization.get("bnb_4bit_use_double_quant", True),
        checkpointing=checkpointing,
        attention=attention,
        padded=pads and masks and not packed,
        packed=packed and masks,
        accumulates=datafiles.effective_batch(config) > rows,
        optimizer=optimizer,
        chunked_loss=bool(config.get("chunked_cross_entropy")),
        capability=capability,
    )
    return step, notes


def _precision(config: Config, capability: tuple[int, int]) -> tuple[str, str | None]:
    """The dtype of weights, and of the forward pass, as axolotl/utils/config.py and core/builders/base.py set them."""
    bf16 = config.get("bf16", "auto")
    if bf16 == "auto":
        bf16 = not config.get("fp16")  # torch says of every GPU that it has bf16
    if bf16 or config.get("bfloat16"):
        return "bfloat16", "bfloat16"
    if config.get("fp16"):
        return "float16", "float16"
    return ("float16", None) if config.get("float16") else ("float32", None)


def shape_of(config: Config, step: Step) -> Shape:
    """The rows and tokens of a full micro batch: one long row where FlashAttention keeps packed documents apart."""
    rows, length = int(config.get("micro_batch_size") or 1), int(config.get("sequence_len") or 2048)
    if config.get("sample_packing") and not step.packed:
        return 1, rows * length
    return rows, length


class Planner:
    """The memory of one step, at any shape.

    Args:
        step: the step.
        shape: the shape that it is traced around.
    """

    def __init__(self, step: Step, shape: Shape):
        self.step, self.shape = step, shape
        self._file = paths.cache() / "plans" / f"{self._key()}.json"
        self._kept = read_json(self._file)

    @property
    def planned(self) -> bool:
        """Whether the step was planned before."""
        return bool(self._kept)

    def usage(self, shape: Shape | None = None) -> dict[str, Any]:
        """Peaks at a shape (by default the step's own): allocated and reserved bytes, and parts of the first."""
        rows, length = shape or self.shape
        of_shapes = self._kept.setdefault("usage", {})
        name = f"{rows}x{length}"
        if name not in of_shapes:
            of_shapes[name] = asdict(traces.usage(self._trace, (rows, length)))
        found: dict[str, Any] = of_shapes[name]
        return found

    @property
    def parameters(self) -> dict[str, dict[str, int]]:
        """Frozen and trainable parameters by kind of layer."""
        return self._trace.parameters

    @property
    def paged(self) -> int:
        """Bytes of optimizer state that can leave the GPU."""
        return self._trace.paged

    def need(self, shape: Shape | None = None) -> float:
        """Bytes that a GPU needs at a shape: what is reserved at the peak, and CUDA's own."""
        return float(self.usage(shape)["reserved"] + CONTEXT)

    def save(self) -> None:
        """Keep what was found, for the next time."""
        write_atomically(self._file, orjson.dumps(self._kept).decode())

    @cached_property
    def _trace(self) -> Trace:
        if "trace" not in self._kept:
            from .quiet import importing_axolotl

            with importing_axolotl():
                from .memory import trace

                try:
                    self._kept["trace"] = trace(self.step, self._shapes()).as_json()
                except Exception as error:  # any model's code runs in it
                    problem = f"its training step cannot be traced: {type(error).__name__}: {error}"
                    raise UserError(f"base_model: {problem}") from None
        return Trace.of_json(self._kept["trace"])

    def _shapes(self) -> list[Shape]:
        """What has to be traced for any other number of rows, or of tokens in a multiple of ROUND."""
        rows, length = self.shape
        half = max(length // 2 // ROUND, 1) * ROUND
        if half == length:
            half = length + 2 * ROUND
        quarter = half // 2 // ROUND * ROUND or length + ROUND
        several = [(2, length), (3, length)] if rows == 1 else [(rows + 1, length)]
        return [self.shape, *several, (rows, half), (rows, quarter)]

    def _key(self) -> str:
        """A hash of all that a trace depends on: the step, the shapes, the packages that run it, and this code."""
        sources = [Path(__file__).with_name(f"{name}.py").read_text() for name in ("allocator", "memory", "traces")]
        content = [asdict(self.step), self._shapes(), _packages(), sources]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:24]


@cache
def _packages() -> dict[str, str]:
    names = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "axolotl")
    return {name: version(name) for name in names}


def largest(fits: Callable[[int], bool], most: int, unit: int = 1) -> int:
    """The largest multiple of a unit up to `most` that fits, given that smaller ones fit too; 0 where none does."""
    low, high = 0, 1
    while high * unit < most and fits(high * unit):
        low, high = high, high * 2
    high = min(high, most // unit)
    if high > low and fits(high * unit):
        return high * unit
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * unit) else (low, middle)
    return low * unit


def of_request(
    request: Request,
    gpu: Gpu | None = None,
    gpus: int = 1,
    data: bool = False,
    price: float | None = None,
    runs: Path = paths.RUNS,
) -> dict[str, Any]:
    """`plan` and `work` of a recipe or file, and what is laid over it.

    Args:
        data: tokenize the training data, to count its tokens and to plan for its longest row.

    Raises:
        UserError: it is wrong in a way that leaves nothing to plan, or cannot be planned.
    """
    composed = compose(request)
    found = check.examine(composed).findings
    check.refuse([finding for finding in found if finding.rule in _NOTHING_TO_PLAN], [])
    measured = check.lengths(composed) if data else []
    planned = plan(composed.config, gpu, gpus)
    if measured:
        longest = max(one["longest_trained_on"] for one in measured)
        planned["longest_batch"] = longest_batch(composed.config, gpu, (planned["micro_batch"]["rows"], longest))
    tokens = sum(one["tokens"] for one in measured) or None
    planned["work"] = work(composed.config, composed.recipe, gpu, gpus, tokens, price, runs)
    return planned


_NOTHING_TO_PLAN = ("value", "unknown-key", "no-lora-targets", "unknown-lora-target", "no-lora-rank", "not-quantized")


def plan(config: Config, gpu: Gpu | None = None, gpus: int = 1) -> dict[str, Any]:
    """What a config needs, in bytes: parameters, memory at a full micro batch, which cards hold it.

    Args:
        config: a config that `recipe check` finds no error in.
        gpu: the card that it is meant for; None for a table of cards by their memory.
        gpus: on how many of them.

    Raises:
        UserError: it cannot be planned.
    """
    architecture = models.architecture(config)
    capability = gpu.capability if gpu else _least_capability(config)
    step, notes = step_of(config, architecture, capability)
    shape = shape_of(config, step)
    planner = Planner(step, shape)
    cards = [gpu] if gpu and gpu.memory else [Gpu(f"{size} GB", capability, size) for size in SIZES]
    context = architecture.get("max_position_embeddings") or 2**20
    result = {
        "model": config["base_model"],
        "adapter": step.adapter,
        "loop": "Axolotl's",
        "micro_batch": {"rows": shape[0], "tokens": shape[1]},
        "parameters": planner.parameters,
        **_totals(planner.parameters),
        "memory": planner.usage() | {"paged": planner.paged, "context": CONTEXT, "needed": planner.need()},
        "cards": [_verdict(planner, card, context) for card in cards],
        "changes": _changes(config, architecture, planner, gpu) if gpu and gpu.memory else [],
        "per_gpu": _divided(planner, gpus) if gpus > 1 else {},
        "notes": notes,
    }
    planner.save()
    return result


def needed_gib(config: Config, capability: tuple[int, int] | None = None, anew: bool = False) -> float | None:
    """GiB that a config needs on a GPU, by default the oldest that has what it asks for.

    Args:
        anew: plan it where no plan is kept; else that gives None.

    Raises:
        UserError: it cannot be planned.
    """
    step, _ = step_of(config, models.architecture(config), capability or _least_capability(config))
    planner = Planner(step, shape_of(config, step))
    if not (planner.planned or anew):
        return None
    needed = planner.need() / GIB
    planner.save()
    return needed


def longest_batch(config: Config, gpu: Gpu | None, shape: Shape) -> dict[str, Any]:
    """Memory at the longest batch that data really gives."""
    step, _ = step_of(config, models.architecture(config), gpu.capability if gpu else _least_capability(config))
    planner = Planner(step, shape_of(config, step))
    rounded = -(-shape[1] // ROUND) * ROUND
    needed = planner.need((shape[0], rounded))
    planner.save()
    return {"rows": shape[0], "tokens": shape[1], "needed": needed}


def _least_capability(config: Config) -> tuple[int, int]:
    """The oldest GPUs that have what a config asks for: Turing, or Ampere for bf16 and FlashAttention."""
    attention = rules.Case(config, set()).attention
    return (8, 0) if _precision(config, (8, 0))[0] == "bfloat16" or attention == "flash_attention_2" else (7, 5)


def _totals(parameters: dict[str, dict[str, int]]) -> dict[str, Any]:
    frozen = sum(count["frozen"] for count in parameters.values())
    trainable = sum(count["trainable"] for count in parameters.values())
    return {"frozen": frozen, "trainable": trainable, "trainable_share": trainable / (frozen + trainable)}


def _verdict(planner: Planner, card: Gpu, context: int) -> dict[str, Any]:
    """Whether a card holds a step, and how far rows and tokens could grow."""
    usable = (card.memory or 0) * GIB * USABLE
    rows, length = planner.shape
    return {
        "card": card.name,
        "usable": usable,
        "fits": planner.need() <= usable,
        "free": usable - planner.need(),
        "largest_micro_batch": largest(lambda n: planner.need((n, length)) <= usable, 1024),
        "longest_row": largest(lambda n: planner.need((rows, n)) <= usable, context, ROUND),
    }


def _changes(config: Config, architecture: dict[str, Any], planner: Planner, gpu: Gpu) -> list[dict[str, Any]]:
    """What to change where a step does not fit, the mildest first, one upon the other until it does."""
    usable = (gpu.memory or 0) * GIB * USABLE
    if planner.need() <= usable:
        return []
    rows, length = planner.shape
    accumulation = max(int(datafiles.effective_batch(config)), rows)
    optimizer = str(config.get("optimizer"))
    paged = "paged_adamw_8bit" if "8bit" in optimizer else "paged_adamw_32bit"
    steps: list[tuple[Config, str, bool]] = [
        ({"gradient_checkpointing": True}, "the same gradients, a third more time", not planner.step.checkpointing),
        (
            {"chunked_cross_entropy": True},
            "the same loss, of an eighth of the tokens at a time",
            gpu.capability >= (8, 0) and not planner.step.chunked_loss,  # compiled with Triton, which asks for 8.0
        ),
        (
            {"optimizer": paged},
            "the same steps; its state leaves the GPU when that is full",
            optimizer in _OPTIMIZERS and "paged" not in optimizer,
        ),
        (
            {"micro_batch_size": 1, "gradient_accumulation_steps": accumulation, "batch_size": None},
            "the same rows a step, one at a time",
            rows > 1,
        ),
        ({"adapter": "qlora", "load_in_4bit": True}, "a base in 4 bits", planner.step.adapter != "qlora"),
    ]
    found, changed = [], config
    for settings, effect, applies in steps:
        if not applies:
            continue
        settings = {key: value for key, value in settings.items() if value is not None or key in config}
        changed = {key: value for key, value in (changed | settings).items() if value is not None}
        step, _ = step_of(changed, architecture, gpu.capability)
        tried = Planner(step, shape_of(changed, step))
        found.append({"set": settings, "effect": effect, "needed": tried.need(), "fits": tried.need() <= usable})
        tried.save()
        if found[-1]["fits"]:
            return found
    longest = largest(lambda n: tried.need((tried.shape[0], n)) <= usable, length, ROUND)
    if longest:
        effect = "longer rows are lost"
        found.append({"set": {"sequence_len": longest}, "effect": effect, "needed": None, "fits": True})
    return found


def _divided(planner: Planner, gpus: int) -> dict[str, float]:
    """Bytes that each of several GPUs needs.

    ZeRO (arXiv 1910.02054) divides among N ranks the optimizer state (stage 1), the gradients too (2), and the
    weights (3, and FSDP), of which it gathers a layer at a time. Activations and logits stay. Communication buffers
    are not counted.
    """
    parts = planner.usage()["parts"]
    saved = 1 - 1 / gpus
    layers = json.loads(planner.step.model)["num_hidden_layers"]
    weights = sum(parts.get(kind, 0) for kind in ("base weights", "quantization constants", "adapters"))
    embeddings = parts.get("embeddings and head", 0)
    gathered = max(weights / layers, embeddings)
    one = planner.need() - parts.get("optimizer", 0) * saved
    two = one - parts.get("gradients", 0) * saved
    return {
        "DDP": planner.need(),
        "ZeRO-1": one,
        "ZeRO-2": two,
        "ZeRO-3 or FSDP": two - (weights + embeddings - gathered) * saved,
    }


def compare(request: Request, gpu: Gpu | None = None) -> list[dict[str, Any]]:
    """Full fine-tuning, LoRA and QLoRA of a config's model side by side."""
    config = compose(request).config
    architecture = models.architecture(config)
    rows = []
    for adapter in (None, "lora", "qlora"):
        changed = {key: value for key, value in config.items() if key not in ("adapter", "load_in_4bit")}
        changed |= {"adapter": adapter} if adapter else {}
        capability = gpu.capability if gpu else _least_capability(config)
        step, _ = step_of(changed, architecture, capability)
        planner = Planner(step, shape_of(changed, step))
        parts = planner.usage()["parts"]
        weights = [parts.get(kind, 0) for kind in ("base weights", "quantization constants", "embeddings and head")]
        rows.append(
            {
                "method": {None: "full", "lora": "LoRA", "qlora": "QLoRA"}[adapter],
                **_totals(planner.parameters),
                "weights": sum(weights) + parts.get("adapters", 0),
                "gradients": parts.get("gradients", 0),
                "optimizer": parts.get("optimizer", 0) + planner.paged,
                "activations": parts.get("activations", 0) + parts.get("logits", 0),
                "needed": planner.need(),
            }
        )
        planner.save()
    return rows


def work(
    config: Config,
    recipe: str,
    gpu: Gpu | None = None,
    gpus: int = 1,
    tokens: int | None = None,
    price: float | None = None,
    runs: Path = paths.RUNS,
) -> dict[str, Any]:
    """What a training takes: rows, tokens, optimizer steps, operations, and on a known card time and cost.

    The time is from the tokens a second of the newest run of this recipe on such a card, else from the card's peak
    rate and UTILIZATION.

    Args:
        tokens: of the training data; None takes every row for a full one.
        price: of a card, an hour.
    """
    architecture = models.architecture(config)
    step, _ = step_of(config, architecture, gpu.capability if gpu else _least_capability(config))
    shape = shape_of(config, step)
    planner = Planner(step, shape)
    per_token = flops_of_token(architecture, planner.parameters, step, shape[1])
    rows, of_study = datafiles.training_rows(config), study.of(recipe)
    source = "the config's data"
    if rows is None and of_study:
        rows, source = of_study.data.files["msg-train.jsonl"].rows, "the study's data"
    measured = _measured_rate(recipe, gpu, runs) if gpu else None
    rate, of_rate = measured, "measured in an earlier run"
    if gpu and gpu.tflops and not measured:
        rate, of_rate = gpu.tflops * 1e12 * UTILIZATION * gpus / per_token, f"{UTILIZATION:.0%} of the card's peak"
    upper_bound = tokens is None
    if tokens is None and rows:
        tokens = rows * shape[1]
    tokens = round(tokens * float(config.get("num_epochs") or 1)) if tokens else None
    hours = tokens / rate / 3600 if tokens and rate else None
    return {
        "rows": rows,
        "rows_are": source if rows else None,
        "tokens": tokens,
        "tokens_are": "at most: every row counted as a full one" if upper_bound else "counted",
        "steps": datafiles.steps_of(config, rows, gpus) if rows else None,
        "flops_per_token": per_token,
        "flops": tokens * per_token if tokens else None,
        "tokens_per_second": rate,
        "rate_is": of_rate if rate else None,
        "hours": hours,
        "cost": hours * gpus * price if hours and price is not None else None,
    }


def _measured_rate(recipe: str, gpu: Gpu, runs: Path) -> float | None:
    """Tokens a second, padding not counted, of the newest finished run of a recipe on a card."""
    for folder in reversed(all_runs(runs)):
        run = folder.read()
        used = run.provenance.get("gpus") or [{}]
        same = named(str(used[0].get("name"))) in (gpu, named(gpu.name)) and run.recipe == recipe
        if same and run.state == "finished" and not run.rehearsal and run.summary.tokens_per_second:
            return run.summary.tokens_per_second
    return None


def flops_of_token(
    architecture: dict[str, Any], parameters: dict[str, dict[str, int]], step: Step, length: int
) -> float:
    """Floating-point operations that a training step spends on one token.

    Forward: 2 for each weight of a matrix, the head's too and the embedding's not, and in each layer for scores and
    values 4 times heads times head size times the tokens before it, on average half the length. Backward: as much
    for the gradients of activations, and of matrices again where they are trained; with checkpointing another
    forward. LoRA's matrices: 2 forward, 4 backward, 2 when computed anew.
    """
    width = architecture["num_attention_heads"] * (
        architecture.get("head_dim") or architecture["hidden_size"] // architecture["num_attention_heads"]
    )
    of_matrices = [count for kind, count in parameters.items() if kind not in ("norm", "embed_tokens")]
    matrices = sum(count["frozen"] if step.adapter else count["trainable"] for count in of_matrices)
    if "lm_head" not in parameters:
        matrices += architecture["vocab_size"] * architecture["hidden_size"]
    attention = 4 * width * length / 2 * architecture["num_hidden_layers"]
    again = bool(step.checkpointing)
    forward = 2 * matrices + attention
    lora = sum(count["trainable"] for count in parameters.values()) if step.adapter else 0
    return forward * (2 + again) + (0 if step.adapter else 2 * matrices) + lora * (6 + 2 * again)


def show(planned: dict[str, Any]) -> None:
    """A plan on stdout."""
    from . import tables

    of_batch = "{rows} x {tokens} tokens".format(**planned["micro_batch"])
    print(f"{planned['model']}, {planned['adapter'] or 'all weights'}, {of_batch} a micro batch\n")
    tables.print_table(parameter_rows(planned))
    print(f"{planned['trainable_share']:.3%} trainable\n")
    tables.print_table(memory_rows(planned))
    if longest := planned.get("longest_batch"):
        of_batch = "{rows} x {tokens} tokens".format(**longest)
        print(f"{_gib(longest['needed']):.2f} GiB at the longest batch of the data, {of_batch}")
    print()
    tables.print_table(card_rows(planned))
    for change in planned["changes"]:
        settings = " ".join(f"--set {key}={json.dumps(value)}" for key, value in change["set"].items())
        needed = f": {_gib(change['needed']):.2f} GiB" if change["needed"] else ""
        print(f"{'then it fits' if change['fits'] else 'not enough'}{needed}: {settings} ({change['effect']})")
    print()
    tables.print_table(work_rows(planned["work"]))
    for note in planned["notes"]:
        print(f"note: {note}")


def work_rows(work: dict[str, Any]) -> list[dict[str, Any]]:
    """The table of work."""
    rate, cost = work["tokens_per_second"], work["cost"]
    lines = [
        ("rows", f"{work['rows']:,} ({work['rows_are']})" if work["rows"] else None),
        ("tokens in all epochs", f"{work['tokens']:,} ({work['tokens_are']})" if work["tokens"] else None),
        ("optimizer steps", f"{work['steps']:,}" if work["steps"] else None),
        ("operations a token", f"{work['flops_per_token']:.3g}"),
        ("operations", f"{work['flops']:.3g}" if work["flops"] else None),
        ("tokens a second", f"{rate:,.0f} ({work['rate_is']})" if rate else None),
        ("hours", f"{work['hours']:,.1f}" if work["hours"] else None),
        ("cost", f"{cost:,.2f} USD" if cost else None),
    ]
    return [{"work": name, "": text} for name, text in lines if text]


def _gib(value: float | None) -> float | None:
    return None if value is None else value / GIB


def parameter_rows(planned: dict[str, Any]) -> list[dict[str, Any]]:
    """The table of parameters, a row for each kind of layer."""
    counts = planned["parameters"] | {"all": {key: planned[key] for key in ("frozen", "trainable")}}
    return [
        {"parameters": kind, "frozen": f"{count['frozen']:,}", "trainable": f"{count['trainable']:,}"}
        for kind, count in counts.items()
    ]


def memory_rows(planned: dict[str, Any]) -> list[dict[str, Any]]:
    """The table of memory: what is allocated at the peak, and what that comes to on the card."""
    memory = planned["memory"]
    lines = sorted(memory["parts"].items(), key=lambda part: -part[1])
    lines += [
        ("allocated at the peak", memory["allocated"]),
        ("held back by the allocator", memory["reserved"] - memory["allocated"]),
        ("CUDA's own", memory["context"]),
        ("needed", memory["needed"]),
        *([("paged optimizer state, beside", memory["paged"])] if memory["paged"] else []),
        *((f"needed on each GPU with {method}", size) for method, size in planned["per_gpu"].items()),
    ]
    return [{"memory": name, "GiB": _gib(size)} for name, size in lines if size]


def card_rows(planned: dict[str, Any]) -> list[dict[str, Any]]:
    """The table of cards."""
    return [
        {
            "card": card["card"],
            "usable GiB": _gib(card["usable"]),
            "fits": "yes" if card["fits"] else "no",
            "free GiB": _gib(card["free"]),
            "largest micro batch": card["largest_micro_batch"],
            "longest row": card["longest_row"],
        }
        for card in planned["cards"]
    ]


def summary_row(name: str, planned: dict[str, Any]) -> dict[str, Any]:
    """A plan in a row of a table of several."""
    memory = planned["memory"]
    cards = planned["cards"]
    if len(cards) == 1:
        verdict = {f"fits {cards[0]['card']}": "yes" if cards[0]["fits"] else "no", "free GiB": _gib(cards[0]["free"])}
    else:
        verdict = {"smallest card": next((card["card"] for card in cards if card["fits"]), "none")}
    return {
        "recipe": name,
        "trainable": f"{planned['trainable']:,}",
        "share": f"{planned['trainable_share']:.2%}",
        "micro batch": "{rows} x {tokens}".format(**planned["micro_batch"]),
        "logits GiB": _gib(memory["parts"].get("logits", 0)),
        "allocated GiB": _gib(memory["allocated"]),
        "reserved GiB": _gib(memory["reserved"]),
        "needed GiB": _gib(memory["needed"]),
        **verdict,
    }


def comparison_rows(compared: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The table of methods."""
    sizes = ("weights", "gradients", "optimizer", "activations", "needed")
    return [
        {
            "method": row["method"],
            "trainable": f"{row['trainable']:,}",
            "share": f"{row['trainable_share']:.2%}",
            **{f"{name} GiB": _gib(row[name]) for name in sizes},
        }
        for row in compared
    ]
