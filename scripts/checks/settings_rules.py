"""Rules about settings: whether they are complete, fit each other, and suit the GPUs and installed packages."""

import re

from ..base.machine import torch_cuda
from ..base.progress import is_secret
from ..configs import substitution
from ..configs.config import flatten
from ..configs.numerics import AMPERE, OLD_KEYS, precision, quantized, takes_varlen
from .finding import Case, Level, Problems, rule


@rule
def two_precisions(case: Case) -> Problems:
    """bf16 wins and fp16 or float16 is dropped without a message; float16 needs bf16: false, because the default, auto,
    is on for every GPU (see `precision`). transformers' TrainingArguments refuses fp16 beside bfloat16."""
    ignored = next((key for key in ("fp16", "float16") if case[key]), None)
    if not ignored or precision(case.config, on_gpu=True).weights != "bfloat16":
        return
    taken = "bfloat16" if case["bfloat16"] else "bf16"
    problem = (
        f"{ignored} is true, and {taken} is {str(case.config.get(taken, 'auto')).lower()}: Axolotl would take {taken}"
    )
    yield "error", ignored, problem, f"set {ignored} or {taken} to false"


@rule
def gpu_lacks(case: Case) -> Problems:
    """Features that a GPU has no hardware for.

    torch for CUDA 13 is built from compute capability 7.5 on. bf16 came with 8.0; below, torch emulates it slowly and
    reports it as supported, so that Axolotl's bf16: auto, its default, turns it on (seen). FlashAttention 2 and
    SageAttention need 8.0, FlashAttention 3 is for 9.0 alone, 4 for 9.0 and newer (their READMEs); torch's varlen_attn,
    which Axolotl takes for packed rows (loaders/patch_manager.py), is a FlashAttention; transformers refuses tf32 below
    8.0; Triton, in which Liger, cut cross entropy and the MLP's LoRA kernel are written (SwiGLU and GEGLU), supports
    cards from 8.0 on (its README).
    """
    if not case.gpu:
        return
    has = case.gpu.capability
    name = str(case.gpu)
    if has < (7, 5) and (torch_cuda() or "").startswith("13."):
        remedy = "take a GPU from Turing (7.5) on, or torch's build for CUDA 12.6: `make setup CUDA=12.6`"
        yield "error", "base_model", f"torch for CUDA 13 does not run on {name}", remedy
    if has < AMPERE and precision(case.config, on_gpu=True).weights == "bfloat16":
        default = "" if case["bf16"] is True or case["bfloat16"] else " (auto, the default, turns it on all the same)"
        problem = f"{name} emulates bf16, slowly{default}"
        yield "error", "bf16", problem, "set fp16: true and bf16: false"
    if has < AMPERE and case["tf32"] is True:
        yield "error", "tf32", f"{name} has no tf32", "set it to false"
    least, most = _ATTENTION_RUNS_ON.get(case.attention, ((0, 0), (99, 0)))
    if not least <= has <= most:
        yield "error", "attn_implementation", f"{case.attention} does not run on {name}", "set sdpa"
    if has < AMPERE and takes_varlen(case.config, case.architecture):
        problem = f"for packed rows Axolotl takes torch's varlen_attn, which does not run on {name}"
        yield "error", "sample_packing", problem, "set sdpa_varlen: false, or take the profile packed"
    for key, value in case.config.items() if has < AMPERE else ():
        if value and re.fullmatch("liger_.*|cut_cross_entropy|lora_mlp_kernel", key):
            yield "warning", key, f"Triton, in which its kernels are written, does not support {name}", "delete it"


_HUB = "kernels-community/"
_ATTENTION_RUNS_ON = {  # from and to which compute capability
    **dict.fromkeys(("flash_attention_2", f"{_HUB}flash-attn2"), ((8, 0), (99, 0))),
    **dict.fromkeys(("flash_attention_3", f"{_HUB}flash-attn3", f"{_HUB}vllm-flash-attn3"), ((9, 0), (9, 0))),
    **dict.fromkeys(("flash_attention_4", f"{_HUB}flash-attn4"), ((9, 0), (99, 0))),
    **dict.fromkeys(("sage", f"{_HUB}sage-attention"), ((8, 0), (12, 0))),
    "fp8": ((9, 0), (99, 0)),
}


@rule
def missing_package(case: Case) -> Problems:
    """Axolotl and transformers ask for these once the model is loaded; on a laptop that checks for another machine
    their absence is no error.

    Instead of a missing flash-attn transformers takes a kernel of the hub, with the package kernels
    (`_check_and_adjust_attn_implementation` in modeling_utils.py); Axolotl refuses that where the hub has no build for
    the installed torch. Axolotl also turns on a tracker whose project is named (axolotl/utils/mlflow_.py and its like).
    """
    level: Level = "error" if case.launching else "warning"
    asked = {package: next(filter(case.__getitem__, keys), None) for package, keys in _PACKAGES.items()}
    asked |= {package: "plugins" for plugin, package in _PLUGIN_NEEDS.items() if plugin in case.plugins}
    package, kernel = _ATTENTION_NEEDS.get(case.attention, ("", case.attention if "/" in case.attention else ""))
    of_attention = next((old for old in OLD_KEYS if case[old]), "attn_implementation")
    if not (kernel and case.is_installed("kernels")):
        asked[package or "kernels"] = of_attention if package or kernel else None
    for package, key in asked.items():
        if key and not case.is_installed(package):
            remedy = f"install it{_FROM.get(package, '')}, or delete {key}"
            yield level, key, f"the package {package} is not installed", remedy


_PACKAGES = {  # the keys that ask for it
    "tensorboard": ("use_tensorboard",),
    "trackio": ("use_trackio", "trackio_project_name"),
    "mlflow": ("use_mlflow", "mlflow_experiment_name"),
    "wandb": ("use_wandb", "wandb_project"),
    "comet-ml": ("use_comet", "comet_project_name"),
    "swanlab": ("use_swanlab", "swanlab_project"),
}
_PLUGIN_NEEDS = {
    "LigerPlugin": "liger-kernel",
    "CutCrossEntropyPlugin": "cut-cross-entropy",
    "DenseMixerPlugin": "densemixer",
}
_ATTENTION_NEEDS = {  # a package, and the hub's kernel that transformers takes without it
    "flash_attention_2": ("flash-attn", f"{_HUB}flash-attn2"),
    "flash_attention_3": ("flash-attn-3", f"{_HUB}vllm-flash-attn3"),
    "flash_attention_4": ("flash-attn-4", f"{_HUB}flash-attn4"),
    "xformers": ("xformers", ""),
    "sage": ("sageattention", ""),
    "fp8": ("torchao", ""),
}
_FROM = {  # where the registry does not have it, or not the one that is needed
    "cut-cross-entropy": " from git+https://github.com/axolotl-ai-cloud/ml-cross-entropy.git@v0.1.1, Axolotl's fork",
    "flash-attn-3": " from the folder hopper of github.com/Dao-AILab/flash-attention",
    "sageattention": " from github.com/thu-ml/SageAttention",
}


@rule
def no_gpu(case: Case) -> Problems:
    """A CPU does not train in fp16, into which Axolotl also turns bf16: auto, its default, there; transformers says so
    once the model is loaded. What else it lacks is in `substitution`, where a rehearsal does without it."""
    if not case.launching or case.gpu:
        return
    for change, reason in substitution.lacking(case.config):
        keys = [key for key in change if key not in ("fp16", "float16")]
        if keys:
            key = next(filter(case.__getitem__, keys), keys[0])
            yield "error", key, f"no NVIDIA GPU was found: {reason}", "--rehearse does without it"
    if precision(case.config, on_gpu=False).autocast == "float16":
        key = "fp16" if case["fp16"] else "bf16"
        default = "" if case["fp16"] else ", which bf16: auto, the default, becomes there"
        problem = f"no NVIDIA GPU was found, and a CPU does not train in fp16{default}"
        yield "error", key, problem, f"--rehearse tries the recipe with a small model, --set {key}=false trains in fp32"


@rule
def optimizer_and_engine(case: Case) -> Problems:
    """bitsandbytes' optimizers do not support FSDP2's DTensors; Axolotl refuses only two of them. Where DeepSpeed keeps
    the optimizer's state in main memory, accelerate puts DeepSpeed's own Adam in the optimizer's place, which decays
    weights as AdamW does only where it stands for one of 32 bits (map_pytorch_optim_to_deepspeed).
    """
    optimizer = str(case["optimizer"] or "")
    of_bnb = re.search(r"paged|bnb|^(adamw|ademamix|lion|rmsprop)_(8|32)bit$", optimizer)
    if case["fsdp_config"] and of_bnb:
        yield "error", "optimizer", f"{optimizer} does not work with FSDP2", "set adamw_torch_8bit or adamw_torch_fused"
    deepspeed = dict(flatten(case["deepspeed"] or {}))
    offloaded = deepspeed.get("zero_optimization.offload_optimizer.device", "none") != "none"
    replaced = offloaded and deepspeed.get("zero_force_ds_cpu_optimizer", True)
    if replaced and not re.fullmatch("|adamw_torch|adamw_torch_fused|paged_adamw_32bit", optimizer):
        problem = f"with offload_optimizer, Adam without AdamW's weight decay takes the place of {optimizer}"
        yield "error", "optimizer", problem, "set adamw_torch, or take the profile zero3-offload"


@rule
def packed_weights_cast(case: Case) -> Problems:
    """Axolotl stores packed 4-bit codes in bfloat16 tensors unless told otherwise (loaders/model.py). DeepSpeed casts
    each floating-point parameter to the dtype of the training (runtime/engine.py, _cast_module_mixed_precision), FSDP2
    at each all-gather, and `axolotl inference` casts the whole model: codes are then converted as if they were
    numbers (seen: loss 4.4 becomes 21.3)."""
    engine = case["deepspeed"] or case["fsdp_config"]
    of_config = precision(case.config, on_gpu=True)
    trained = of_config.autocast if engine else of_config.weights  # engines cast under autocast only
    storage = (case["bnb_config_kwargs"] or {}).get("bnb_4bit_quant_storage", "bfloat16")
    in_four_bits = case["load_in_4bit"] and quantized(case.config) and "quantization_config" not in case.architecture
    if not in_four_bits or storage in (trained, "uint8", "int8") or trained is None:
        return
    who = "DeepSpeed" if case["deepspeed"] else "FSDP2" if engine else "`axolotl inference`"
    problem = f"4-bit weights are stored as {storage}, which {who} casts to {trained}: that destroys them"
    level: Level = "error" if engine else "note"
    yield level, "bnb_config_kwargs", problem, "set its bnb_4bit_quant_storage: uint8, which nothing casts"


@rule
def engine_needs_gpus(case: Case) -> Problems:
    """FSDP in one process is silently ignored (accelerate's AcceleratorState)."""
    if case.launching and case["fsdp_config"] and case.gpus == 1:
        yield "error", "fsdp_config", "FSDP2 divides a model among several GPUs, and this run has one", "--gpus N"


@rule
def secret(case: Case) -> Problems:
    """A run's folder keeps its config, and is meant to be shared."""
    for key, value in flatten(case.config):
        if isinstance(value, str | list) and is_secret(key, value):
            what = "" if is_secret(key) else "it holds a secret, which "
            yield "error", key, f"{what}would be stored in the run's folder", "set it in an environment variable"


@rule
def no_batch_size(case: Case) -> Problems:
    """Without it Axolotl trains with one row at a time, in silence (seen)."""
    if not case.is_set("micro_batch_size"):
        yield "error", "micro_batch_size", "not set: Axolotl would take 1", "set it"


@rule
def does_not_divide(case: Case) -> Problems:
    """The rest is dropped in silence: Axolotl divides batch_size by micro_batch_size and rounds down."""
    batch, micro_batch = case["batch_size"], case["micro_batch_size"]
    if batch and micro_batch and batch % micro_batch:
        problem = f"{batch} is not a multiple of micro_batch_size, {micro_batch}"
        yield "error", "batch_size", problem, "choose one that is"


@rule
def does_not_repeat(case: Case) -> Problems:
    """Cut cross entropy's own kernels add up gradients under a lock, in whatever order they come to it (tl_lock_add in
    its cce_backward.py), and torch's switch for deterministic algorithms does not reach them."""
    if case["full_determinism"] and (case["cut_cross_entropy"] or "CutCrossEntropyPlugin" in case.plugins):
        problem = "cut cross entropy adds up gradients in no fixed order, so that runs differ in their last bits"
        yield "warning", "full_determinism", problem, "set cut_cross_entropy: false"


@rule
def scheduler_needs(case: Case) -> Problems:
    """transformers.get_scheduler fails without these, once the model is loaded."""
    scheduler = case["lr_scheduler"]
    options = case["lr_scheduler_kwargs"] or {}
    needed = _SCHEDULER_NEEDS.get(str(scheduler), ())
    if needed and not any(options.get(name) is not None for name in needed):
        yield "error", "lr_scheduler", f"{scheduler} needs {' or '.join(needed)}", "set it under lr_scheduler_kwargs"


_SCHEDULER_NEEDS = {
    "cosine_with_min_lr": ("min_lr", "min_lr_rate"),
    "cosine_warmup_with_min_lr": ("min_lr", "min_lr_rate"),
    "warmup_stable_decay": ("num_decay_steps",),
}


@rule
def never_evaluated(case: Case) -> Problems:
    """Axolotl evaluates only where there is data for it and a step at which to do so (axolotl/core/builders/base.py).

    evals_per_epoch becomes eval_steps = 1 / (evals_per_epoch * num_epochs), a share of the steps, and is dropped in
    silence where that is 1 or more (axolotl/utils/config, normalize_config).
    """
    asked = [key for key in ("evals_per_epoch", "eval_steps", "eval_strategy") if case[key] and case[key] != "no"]
    has_data = bool(case["test_datasets"] or case["val_set_size"])
    if asked and not case.is_set("test_datasets", "val_set_size"):
        yield "error", asked[0], "there is no evaluation data", "set test_datasets or val_set_size, or delete the key"
    if not has_data or case["eval_strategy"] == "no":
        return
    data = "test_datasets" if case["test_datasets"] else "val_set_size"
    share = (case["evals_per_epoch"] or 0) * case.config.get("num_epochs", 1)
    if not asked and not case.is_set("evals_per_epoch", "eval_steps", "eval_strategy"):
        yield "warning", data, "nothing says when to evaluate, so it never happens", "set evals_per_epoch"
    elif asked == ["evals_per_epoch"] and share <= 1:
        yield "warning", "evals_per_epoch", "one in all, which Axolotl drops", "write eval_strategy: epoch in its place"
    elif case.steps and (case["eval_steps"] or 0) > case.steps:
        yield "warning", "eval_steps", f"the training has at most {case.steps} steps, so it never evaluates", "lower it"


@rule
def never_saved(case: Case) -> Problems:
    """Without a checkpoint an interrupted run starts over; the adapter is saved at the end in any case."""
    if case.steps and (case["save_steps"] or 0) > case.steps:
        yield "warning", "save_steps", f"the training has at most {case.steps} steps, so it never saves one", "lower it"


@rule
def long_warm_up(case: Case) -> Problems:
    """The learning rate then never reaches its value."""
    if case.steps and (case["warmup_steps"] or 0) >= case.steps:
        yield "error", "warmup_steps", f"as long as the whole training of {case.steps} steps", "lower it"
