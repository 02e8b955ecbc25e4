"""Rules about settings: missing, contradictory, or unsuited to the GPUs or installed packages."""

import os
import re
from pathlib import Path

from ..base.hardware import torch_cuda
from ..base.secrets import is_secret, names_secret, without_secrets
from ..config import substitution
from ..config.finding import Case, Level, Problems, rule
from ..config.gpus import deepspeed_of
from ..config.merging import flatten, remote_trackers
from ..config.numerics import AMPERE, precision, quantized, takes_varlen


@rule
def two_precisions(case: Case) -> Problems:
    """If bf16 is on, Axolotl silently ignores fp16 and float16.

    If the key bfloat16 is true instead, Axolotl ignores only float16; transformers then refuses fp16.
    float16 needs bf16: false, because the default, auto, turns bf16 on for every GPU (see `precision`)."""
    ignored = next((key for key in ("fp16", "float16") if case[key]), None)
    if not ignored or precision(case.config, on_gpu=True).weights != "bfloat16":
        return
    problem = (
        f"{ignored} is true, but Axolotl would load the model in bfloat16: bf16 (by default auto) or bfloat16 is on"
    )
    yield "error", ignored, problem, f"set {ignored}, or bf16 and bfloat16, to false"


@rule
def gpu_lacks(case: Case) -> Problems:
    """Features that the GPU's hardware lacks.

    torch for CUDA 13 needs compute capability 7.5. bf16 needs 8.0. On older GPUs, torch emulates bf16 slowly and
    reports it as supported, so that Axolotl's default, bf16: auto, turns it on (seen). transformers refuses tf32 below
    8.0. FlashAttention 2 and SageAttention need 8.0, FlashAttention 3 exactly 9.0, FlashAttention 4 at least 9.0 (their
    READMEs). For packed rows, Axolotl replaces sdpa by torch's varlen_attn, which is FlashAttention
    (loaders/patch_manager.py). Triton's README requires 8.0; Liger, cut cross entropy and the LoRA kernel of the MLP
    (SwiGLU, GEGLU) use Triton.
    """
    if not case.gpu:
        return
    has = case.gpu.capability
    name = str(case.gpu)
    if has < (7, 5) and (torch_cuda() or "").startswith("13."):
        remedy = "use Turing (7.5) or newer, or torch for CUDA 12.6: `make setup CUDA=12.6`"
        yield "error", "base_model", f"torch for CUDA 13 does not run on {name}", remedy
    least, most = _ATTENTION_RUNS_ON.get(case.attention, ((0, 0), (99, 0)))
    if not least <= has <= most:
        problem = f"{case.attention} does not run on {name}"
        yield "error", case.attention_key, problem, f"use {case.advised_attention} instead"
    if has >= AMPERE:
        return
    if precision(case.config, on_gpu=True).weights == "bfloat16":
        problem = f"{name} only emulates bf16, slowly; the default, auto, turns it on"
        yield "error", "bf16", problem, "use `--set bf16=false --set fp16=true`"
    if case["tf32"] is True:
        yield "error", "tf32", f"{name} has no tf32", "set it to false"
    if takes_varlen(case.config, case.architecture):
        problem = f"packed rows use torch's varlen_attn, which does not run on {name}"
        yield "error", "sample_packing", problem, "set sdpa_varlen: false, or use the profile packed"
    for key, value in case.config.items():
        if value and re.fullmatch("liger_.*|cut_cross_entropy|lora_mlp_kernel", key):
            yield "warning", key, f"its kernels need Triton, which does not support {name}", "delete it"


_HUB = "kernels-community/"
_ATTENTION_RUNS_ON = {  # lowest and highest compute capability
    **dict.fromkeys(("flash_attention_2", f"{_HUB}flash-attn2"), ((8, 0), (99, 0))),
    **dict.fromkeys(("flash_attention_3", f"{_HUB}flash-attn3", f"{_HUB}vllm-flash-attn3"), ((9, 0), (9, 0))),
    **dict.fromkeys(("flash_attention_4", f"{_HUB}flash-attn4"), ((9, 0), (99, 0))),
    **dict.fromkeys(("sage", f"{_HUB}sage-attention"), ((8, 0), (12, 0))),
    "fp8": ((9, 0), (99, 0)),
}


@rule
def missing_package(case: Case) -> Problems:
    """Axolotl and transformers notice a missing package only after the model is loaded.

    An error before a run; otherwise a warning, because the config may be for another machine. If flash-attn is missing,
    transformers uses a kernel from the hub, for which it needs the package `kernels`
    (`_check_and_adjust_attn_implementation` in modeling_utils.py). Axolotl refuses the kernel if the hub has no build
    for the installed torch. Axolotl turns a tracker on even if only its project is set (axolotl/utils/mlflow_.py and
    others).
    """
    level: Level = "error" if case.launching else "warning"
    asked = {package: next(filter(case.__getitem__, keys), None) for package, keys in _PACKAGES.items()}
    asked |= {package: "plugins" for plugin, package in _PLUGIN_NEEDS.items() if plugin in case.plugins}
    asked |= {package: "optimizer" for name, package in _OPTIMIZERS.items() if str(case["optimizer"]).startswith(name)}
    package, kernel = _ATTENTION_NEEDS.get(case.attention, ("", case.attention if "/" in case.attention else ""))
    if not (kernel and case.is_installed("kernels")):
        asked[package or "kernels"] = case.attention_key if package or kernel else None
    for package, key in asked.items():
        if key and not case.is_installed(package):
            remedy = f"install it{_FROM.get(package, '')}, or delete {key}"
            yield level, key, f"the package {package} is not installed", remedy


_PACKAGES = {  # keys that need the package
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
_OPTIMIZERS = {  # by the beginning of the optimizer's name
    "adalomo": "lomo-optim",
    "apollo_": "apollo-torch",
    "came_": "came-pytorch",
    "flash_": "flashoptim",
    "galore_": "galore-torch",
    "grokadamw": "grokadamw",
    "lomo": "lomo-optim",
    "optimi_": "torch-optimi",
    "q_galore_": "q-galore-torch",
    "scao": "scao",
    "stable_adamw": "torch-optimi",
}
_ATTENTION_NEEDS = {  # package, and the hub's kernel that transformers uses if the package is missing
    "flash_attention_2": ("flash-attn", f"{_HUB}flash-attn2"),
    "flash_attention_3": ("flash-attn-3", f"{_HUB}vllm-flash-attn3"),
    "flash_attention_4": ("flash-attn-4", f"{_HUB}flash-attn4"),
    "xformers": ("xformers", ""),
    "sage": ("sageattention", ""),
    "fp8": ("torchao", ""),
}
_FROM = {  # sources of packages that PyPI lacks, or has only in another variant
    "cut-cross-entropy": " from git+https://github.com/axolotl-ai-cloud/ml-cross-entropy.git@v0.1.1, Axolotl's fork",
    "flash-attn-3": " from the folder hopper of github.com/Dao-AILab/flash-attention",
    "sageattention": " from github.com/thu-ml/SageAttention",
}


@rule
def no_login(case: Case) -> Problems:
    """Without a login, wandb stops the run with a traceback after the model is loaded (seen with wandb 0.31)."""
    keys = dict(remote_trackers(case.config)).get("wandb")
    if keys and not _has_wandb_login():
        problem = "wandb has no login on this machine: a run would stop after loading the model"
        yield "warning", keys[-1], problem, f"run `wandb login`, or delete {' and '.join(keys)}"


def _has_wandb_login() -> bool:
    """True if wandb's API key is in the environment or in ~/.netrc."""
    file = Path("~/.netrc").expanduser()
    if os.environ.get("WANDB_API_KEY"):
        return True
    return file.is_file() and "wandb" in file.read_text(errors="replace")


@rule
def no_gpu(case: Case) -> Problems:
    """A CPU lacks the features listed in `substitution`, does not train in fp16, and is too slow for large models.

    On a CPU, Axolotl turns its default, bf16: auto, into fp16. transformers refuses fp16, but only after the model is
    loaded."""
    if not case.launching or case.gpu:
        return
    for change, reason in substitution.gpu_replacements(case.config):
        keys = [key for key in change if key not in ("fp16", "float16")]
        if keys:
            key = next(filter(case.__getitem__, keys), keys[0])
            yield "error", key, f"no NVIDIA GPU found: {reason}", "add --rehearse, which replaces this setting"
    if precision(case.config, on_gpu=False).autocast == "float16":
        key = "fp16" if case["fp16"] else "bf16"
        problem = "no NVIDIA GPU found, and a CPU does not train in fp16, which it uses by default (bf16: auto)"
        yield "error", key, problem, f"add --rehearse for a small model, or --set {key}=false for fp32"


@rule
def optimizer_and_engine(case: Case) -> Problems:
    """bitsandbytes' optimizers do not support FSDP2's DTensors; Axolotl refuses only two of them.

    With offload_optimizer, accelerate replaces the optimizer by DeepSpeed's Adam. DeepSpeed's Adam uses AdamW's
    weight decay only if the config's optimizer is a 32-bit AdamW (map_pytorch_optim_to_deepspeed).
    """
    optimizer = str(case["optimizer"] or "")
    of_bnb = re.search(r"paged|bnb|^(adamw|ademamix|lion|rmsprop)_(8|32)bit$", optimizer)
    if case["fsdp_config"] and of_bnb:
        yield "error", "optimizer", f"{optimizer} does not work with FSDP2", "set adamw_torch_8bit or adamw_torch_fused"
    deepspeed = dict(flatten(deepspeed_of(case.config)))
    offloaded = deepspeed.get("zero_optimization.offload_optimizer.device", "none") != "none"
    replaced = offloaded and deepspeed.get("zero_force_ds_cpu_optimizer", True)
    if replaced and not re.fullmatch("|adamw_torch|adamw_torch_fused|paged_adamw_32bit", optimizer):
        problem = f"offload_optimizer replaces {optimizer} by Adam without AdamW's weight decay"
        yield "error", "optimizer", problem, "set adamw_torch, or use the profile zero3-offload"


@rule
def packed_weights_cast(case: Case) -> Problems:
    """Casts destroy packed 4-bit codes, which Axolotl by default stores in bfloat16 tensors (loaders/model.py).

    DeepSpeed casts each floating-point parameter to the training dtype (runtime/engine.py,
    _cast_module_mixed_precision); FSDP2 casts at each all-gather; `axolotl inference` casts the complete model. Casts
    treat the codes as numbers (seen: loss 4.4 becomes 21.3)."""
    engine = case["deepspeed"] or case["fsdp_config"]
    of_config = precision(case.config, on_gpu=True)
    trained = of_config.autocast if engine else of_config.weights  # without autocast, engines cast nothing
    storage = (case["bnb_config_kwargs"] or {}).get("bnb_4bit_quant_storage", "bfloat16")
    in_four_bits = case["load_in_4bit"] and quantized(case.config) and "quantization_config" not in case.architecture
    if not in_four_bits or storage in (trained, "uint8", "int8") or trained is None:
        return
    who = "the engine" if engine else "`axolotl inference`"
    problem = f"{who} casts the 4-bit weights, stored as {storage}, to {trained} and destroys them"
    level: Level = "error" if engine else "note"
    yield level, "bnb_config_kwargs", problem, "add bnb_4bit_quant_storage: uint8, which nothing casts"


@rule
def engine_needs_gpus(case: Case) -> Problems:
    """accelerate silently ignores FSDP in a single process (AcceleratorState)."""
    if case.launching and case["fsdp_config"] and case.gpus == 1:
        yield "error", "fsdp_config", "FSDP2 shards a model across GPUs, but this run uses one", "pass --gpus N"


@rule
def fsdp_saves(case: Case) -> Problems:
    """FSDP2 trains these modules, then saving the adapter fails: KeyError 'modules_to_save.default.weight' (seen)."""
    if case["fsdp_config"] and case["lora_modules_to_save"]:
        problem = "FSDP2 would train these modules, then fail while saving the adapter"
        yield "error", "lora_modules_to_save", problem, "delete the key, or use DeepSpeed, as with --profile zero2"


@rule
def secret(case: Case) -> Problems:
    """The config is stored in the run's folder, which users may share."""
    for key, value in flatten(case.config):
        if value is None or isinstance(value, bool):
            continue
        if names_secret(key):
            yield "error", key, "this secret would be stored in the run's folder", "use an environment variable instead"
        elif is_secret(key, value):
            problem = "contains a secret, which would be stored in the run's folder"
            yield "error", key, problem, "use an environment variable instead"


@rule
def address_parameter(case: Case) -> Problems:
    """An unknown parameter of an address can be a signature, and the config is stored in the run's folder."""
    for key, value in flatten(case.config):
        if not is_secret(key, value) and without_secrets(value) != value:
            problem = "a parameter of this address can be a secret, and would be stored in the run's folder"
            yield "error", key, problem, "download the file, and name its path"


@rule
def no_batch_size(case: Case) -> Problems:
    """Without micro_batch_size, Axolotl silently trains one row at a time (seen)."""
    if not case.is_set("micro_batch_size"):
        yield "error", "micro_batch_size", "not set: Axolotl would use 1", "set it"


@rule
def does_not_divide(case: Case) -> Problems:
    """Axolotl divides batch_size by micro_batch_size and silently rounds down."""
    batch, micro_batch = case["batch_size"], case["micro_batch_size"]
    if batch and micro_batch and batch % micro_batch:
        problem = f"{batch} is not a multiple of micro_batch_size, {micro_batch}"
        yield "error", "batch_size", problem, "set a multiple"


@rule
def does_not_repeat(case: Case) -> Problems:
    """Cut cross entropy's kernels add gradients under a lock, in no fixed order.

    See tl_lock_add in cce_backward.py. torch's switch for deterministic algorithms does not affect these kernels."""
    if case["full_determinism"] and (case["cut_cross_entropy"] or "CutCrossEntropyPlugin" in case.plugins):
        problem = "cut cross entropy adds gradients in no fixed order: runs differ in their last bits"
        yield "warning", "full_determinism", problem, "set cut_cross_entropy: false"


@rule
def scheduler_needs(case: Case) -> Problems:
    """Without these options, transformers.get_scheduler fails after the model is loaded."""
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
    """Axolotl evaluates only if it has evaluation data, and training reaches an evaluation step.

    See axolotl/core/builders/base.py. Axolotl turns evals_per_epoch into eval_steps = 1 / (evals_per_epoch *
    num_epochs), a fraction of all steps. If the result is 1 or more, Axolotl skips all evaluations. It warns of this
    only if the result is more than 1 (axolotl/utils/config, normalize_config).
    """
    asked = [key for key in ("evals_per_epoch", "eval_steps", "eval_strategy") if case[key] and case[key] != "no"]
    has_data = bool(case["test_datasets"] or case["val_set_size"])
    if asked and not case.is_set("test_datasets", "val_set_size"):
        yield "error", asked[0], "no evaluation data", "set test_datasets or val_set_size, or delete the key"
    if not has_data or case["eval_strategy"] == "no":
        return
    data = "test_datasets" if case["test_datasets"] else "val_set_size"
    share = (case["evals_per_epoch"] or 0) * case.config.get("num_epochs", 1)
    if not asked and not case.is_set("evals_per_epoch", "eval_steps", "eval_strategy"):
        yield "warning", data, "never used: no key says when to evaluate", "set evals_per_epoch"
    elif asked == ["evals_per_epoch"] and share <= 1:
        yield "warning", "evals_per_epoch", "one evaluation, which Axolotl skips", "use eval_strategy: epoch instead"
    elif case.steps and (case["eval_steps"] or 0) > case.steps:
        yield "warning", "eval_steps", f"no evaluation: training has at most {case.steps} steps", "lower it"


@rule
def never_saved(case: Case) -> Problems:
    """Without checkpoints, an interrupted run starts over; only the final adapter is saved."""
    if case.steps and (case["save_steps"] or 0) > case.steps:
        yield "warning", "save_steps", f"no checkpoint: training has at most {case.steps} steps", "lower it"


@rule
def long_warm_up(case: Case) -> Problems:
    """With a warm-up longer than training, the learning rate never reaches its full value."""
    if case.steps and (case["warmup_steps"] or 0) >= case.steps:
        yield "error", "warmup_steps", f"warm-up never ends: training has at most {case.steps} steps", "lower it"
