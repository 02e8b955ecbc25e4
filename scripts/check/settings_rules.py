"""Rules about settings: missing, contradictory, or unsuited to the GPUs or installed packages."""

import os
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from ..base import yamlfiles
from ..base.hardware import torch_cuda
from ..base.processes import package_version
from ..base.secrets import is_secret, names_secret, without_secrets
from ..base.yamlfiles import Config
from ..config import keys, substitution
from ..config.finding import Level
from ..config.gpus import deepspeed_of
from ..config.merging import flatten
from ..config.numerics import AMPERE, precision, quantized, takes_varlen
from ..config.training_settings import KEPT_CHECKPOINTS, TrainingSettings
from ..training.row_types import OF_PAIRS
from .rule import Case, Problems, rule


@rule()
def two_precisions(case: Case) -> Problems:
    """If bf16 is on, Axolotl silently ignores fp16 and float16.

    If the key bfloat16 is true instead, Axolotl ignores only float16; transformers then refuses fp16.
    float16 needs bf16: false, because the default, auto, turns bf16 on for every GPU (see `precision`)."""
    ignored = case.first_set("fp16", "float16")
    if not ignored or precision(case.config, on_gpu=True).weights != "bfloat16":
        return
    problem = (
        f"{ignored} is true, but Axolotl would load the model in bfloat16: bf16 (by default auto) or bfloat16 is on"
    )
    yield "error", ignored, problem, f"set {ignored}, or bf16 and bfloat16, to false"


@rule(scope="gpu")
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
    capability = case.gpu.capability
    if capability < (7, 5) and (torch_cuda() or "").startswith("13."):
        remedy = "use Turing (7.5) or newer, or torch for CUDA 12.6: `make setup CUDA=12.6`"
        yield "error", "base_model", f"torch for CUDA 13 does not run on {case.gpu}", remedy
    lowest, highest = _ATTENTION_RUNS_ON.get(case.attention, _ON_ALL)
    if not lowest <= capability <= highest:
        problem = f"{case.attention} does not run on {case.gpu}"
        yield "error", case.attention_key, problem, f"use {case.advised_attention} instead"
    if capability < AMPERE:
        yield from _needs_ampere(case, str(case.gpu))


def _needs_ampere(case: Case, name: str) -> Problems:
    """Features that a GPU before Ampere lacks, by the GPU's name."""
    if precision(case.config, on_gpu=True).weights == "bfloat16":
        problem = f"{name} only emulates bf16, slowly; the default, auto, turns it on"
        remedy = "use `--set bf16=false --set fp16=true`"
        if re.match("gemma[23]", str(case.architecture.get("model_type"))):  # transformers#36822, not tested here
            remedy = "activations of this model overflow in fp16: use `--set bf16=false` for fp32, or a GPU with bf16"
        yield "error", "bf16", problem, remedy
    if case["tf32"] is True:
        yield "error", "tf32", f"{name} has no tf32", "set it to false"
    if takes_varlen(case.config, case.architecture):
        problem = f"packed rows use torch's varlen_attn, which does not run on {name}"
        yield "error", "sample_packing", problem, "set sdpa_varlen: false, or use the profile packed"
    for key, value in case.config.items():
        if value and re.fullmatch("liger_.*|cut_cross_entropy|lora_mlp_kernel", key):
            yield "warning", key, f"its kernels need Triton, which does not support {name}", "delete it"


_ON_ALL = ((0, 0), (99, 0))  # lowest and highest compute capability
_FROM_AMPERE = ((8, 0), (99, 0))
_FROM_HOPPER = ((9, 0), (99, 0))
_ON_HOPPER = ((9, 0), (9, 0))
_UNTIL_BLACKWELL = ((8, 0), (12, 0))
_ATTENTION_RUNS_ON = {
    "flash_attention_2": _FROM_AMPERE,
    "kernels-community/flash-attn2": _FROM_AMPERE,
    "flash_attention_3": _ON_HOPPER,
    "kernels-community/flash-attn3": _ON_HOPPER,
    "kernels-community/vllm-flash-attn3": _ON_HOPPER,
    "flash_attention_4": _FROM_HOPPER,
    "kernels-community/flash-attn4": _FROM_HOPPER,
    "sage": _UNTIL_BLACKWELL,
    "kernels-community/sage-attention": _UNTIL_BLACKWELL,
    "fp8": _FROM_HOPPER,
}


@rule()
def missing_package(case: Case) -> Problems:
    """Axolotl and transformers notice a missing package only after the model is loaded.

    An error before a run; otherwise a warning, because the config may be for another machine. If flash-attn is missing,
    transformers uses a kernel from the hub, for which it needs the package `kernels`
    (`_check_and_adjust_attn_implementation` in modeling_utils.py). Axolotl refuses the kernel if the hub has no build
    for the installed torch. Axolotl turns a tracker on even if only its project is set (axolotl/utils/mlflow_.py and
    others).
    """
    level: Level = "error" if case.launching else "warning"
    packages = _packages()
    for package, key in _required_packages(case, packages["needs"]):
        if package.startswith("flash-attn") and package_version("kernels"):
            continue
        if package_version(package) is None:
            source = packages["sources"].get(package)
            install = f"install it from {source}" if source else "install it"
            yield level, key, f"the package {package} is not installed", f"{install}, or delete {key}"


@cache
def _packages() -> Config:
    """Content of packages.yaml."""
    return yamlfiles.read_yaml(Path(__file__).with_name("packages.yaml"))


def _required_packages(case: Case, needs: dict[str, str]) -> Iterator[tuple[str, str]]:
    """Packages that a config needs, each with the first key that needs it."""
    settings = [(key, f"{key}={value}") for key, value in case.config.items() if value]
    settings += [("plugins", f"plugin={name}") for name in case.plugins]
    settings.append((case.attention_key, f"attention={case.attention}"))
    for package, pattern in needs.items():
        keys_of_package = [key for key, setting in settings if re.fullmatch(pattern, setting)]
        if keys_of_package:
            yield package, keys_of_package[0]


@rule()
def no_login(case: Case) -> Problems:
    """Without a login, wandb stops the run with a traceback after the model is loaded (seen with wandb 0.31)."""
    switches = dict(keys.remote_trackers(case.config)).get("wandb")
    if switches and not _has_wandb_login():
        problem = "wandb has no login on this machine: a run would stop after loading the model"
        yield "warning", switches[-1], problem, f"run `wandb login`, or delete {' and '.join(switches)}"


def _has_wandb_login() -> bool:
    """True if wandb's API key is in the environment or in ~/.netrc."""
    file = Path("~/.netrc").expanduser()
    if os.environ.get("WANDB_API_KEY"):
        return True
    return file.is_file() and "wandb" in file.read_text(errors="replace")


@rule(scope="machine")
def no_gpu(case: Case) -> Problems:
    """A run without a GPU: a CPU lacks the features listed in `substitution`, and does not train in fp16.

    On a CPU, Axolotl turns its default, bf16: auto, into fp16. transformers refuses fp16, but only after the model is
    loaded."""
    if not case.launching or case.gpu:
        return
    for change, reason in substitution.gpu_replacements(case.config):
        names = [key for key in change if key not in ("fp16", "float16")]
        if names:
            key = case.first_set(*names) or names[0]
            yield "error", key, f"no NVIDIA GPU found: {reason}", "add --rehearse, which replaces this setting"
    if precision(case.config, on_gpu=False).autocast == "float16":
        key = "fp16" if case["fp16"] else "bf16"
        problem = "no NVIDIA GPU found, and a CPU does not train in fp16, which it uses by default (bf16: auto)"
        yield "error", key, problem, f"add --rehearse for a small model, or --set {key}=false for fp32"


@rule()
def optimizer_and_parallelism(case: Case) -> Problems:
    """bitsandbytes' optimizers do not support FSDP2's DTensors; Axolotl refuses only two of them.

    With offload_optimizer, accelerate replaces the optimizer by DeepSpeed's Adam. DeepSpeed's Adam uses AdamW's
    weight decay only if the config's optimizer is a 32-bit AdamW (map_pytorch_optim_to_deepspeed).
    """
    optimizer = TrainingSettings.of(case.config).optimizer
    of_bnb = re.search(r"paged|bnb|^(adamw|ademamix|lion|rmsprop)_(8|32)bit$", optimizer)
    if case["fsdp_config"] and of_bnb:
        yield "error", "optimizer", f"{optimizer} does not work with FSDP2", "set adamw_torch_8bit or adamw_torch_fused"
    deepspeed = dict(flatten(deepspeed_of(case.config)))
    offloaded = deepspeed.get("zero_optimization.offload_optimizer.device", "none") != "none"
    replaced = offloaded and deepspeed.get("zero_force_ds_cpu_optimizer", True)
    if replaced and not re.fullmatch("adamw_torch|adamw_torch_fused|paged_adamw_32bit", optimizer):
        problem = f"offload_optimizer replaces {optimizer} by Adam without AdamW's weight decay"
        yield "error", "optimizer", problem, "set adamw_torch, or use the profile zero3-offload"


@rule()
def packed_weights_cast(case: Case) -> Problems:
    """Casts destroy packed 4-bit codes, which Axolotl by default stores in bfloat16 tensors (loaders/model.py).

    DeepSpeed casts each floating-point parameter to the training dtype (runtime/engine.py,
    _cast_module_mixed_precision); FSDP2 casts at each all-gather; `axolotl inference` casts the complete model. Casts
    treat the codes as numbers (seen: loss 4.4 becomes 21.3)."""
    if not case["load_in_4bit"] or not quantized(case.config) or "quantization_config" in case.architecture:
        return
    numbers = precision(case.config, on_gpu=True)
    level: Level = "note"
    who = "`axolotl inference`"
    dtype: str | None = numbers.weights
    if case["deepspeed"] or case["fsdp_config"]:
        level = "error"
        who = "the engine"
        dtype = numbers.autocast
    storage = (case["bnb_config_kwargs"] or {}).get("bnb_4bit_quant_storage", "bfloat16")
    if dtype is None or storage in (dtype, "uint8", "int8"):  # without autocast, DeepSpeed and FSDP cast nothing
        return
    problem = f"{who} casts the 4-bit weights, stored as {storage}, to {dtype} and destroys them"
    yield level, "bnb_config_kwargs", problem, "add bnb_4bit_quant_storage: uint8, which nothing casts"


@rule()
def parallelism_needs_gpus(case: Case) -> Problems:
    """accelerate silently ignores FSDP in a single process (AcceleratorState)."""
    if case.launching and case["fsdp_config"] and case.gpus == 1:
        yield "error", "fsdp_config", "FSDP2 shards a model across GPUs, but this run uses one", "pass --gpus N"


@rule()
def fsdp_saves(case: Case) -> Problems:
    """FSDP2 trains these modules, then saving the adapter fails: KeyError 'modules_to_save.default.weight' (seen)."""
    if case["fsdp_config"] and case["lora_modules_to_save"]:
        problem = "FSDP2 would train these modules, then fail while saving the adapter"
        yield "error", "lora_modules_to_save", problem, "delete the key, or use DeepSpeed, as with --profile zero2"


@rule()
def secret(case: Case) -> Problems:
    """The config is stored in the run's folder, which users may share."""
    remedy = "use an environment variable instead"
    for key, value in flatten(case.config):
        if value is None or isinstance(value, bool):
            continue
        if names_secret(key):
            yield "error", key, "this secret would be stored in the run's folder", remedy
        elif is_secret(key, value):
            yield "error", key, "contains a secret, which would be stored in the run's folder", remedy


@rule()
def url_parameter(case: Case) -> Problems:
    """An unknown parameter of a URL can be a signature, and the config is stored in the run's folder."""
    for key, value in flatten(case.config):
        if not is_secret(key, value) and without_secrets(value) != value:
            problem = "a parameter of this URL can be a secret, and would be stored in the run's folder"
            yield "error", key, problem, "download the file, and name its path"


@rule()
def no_batch_size(case: Case) -> Problems:
    """Without micro_batch_size, Axolotl silently trains one row at a time (seen)."""
    if not case.is_set("micro_batch_size"):
        yield "error", "micro_batch_size", "not set: Axolotl would use 1", "set it"


@rule()
def no_sequence_len(case: Case) -> Problems:
    """Without sequence_len, Axolotl takes 512 tokens and drops longer rows, which only its log says (seen)."""
    if not case.is_set("sequence_len"):
        yield "warning", "sequence_len", "not set: Axolotl drops rows of more than 512 tokens", "set it"


@rule()
def batch_size(case: Case) -> Problems:
    """Axolotl counts steps of batch_size rows, but accumulates by the default of gradient_accumulation_steps (seen)."""
    if case.is_set("batch_size"):
        problem = "Axolotl counts steps by it, but does not accumulate by it, and so trains a part of the rows"
        yield "error", "batch_size", problem, "set gradient_accumulation_steps to batch_size / micro_batch_size instead"


@rule()
def does_not_repeat(case: Case) -> Problems:
    """Cut cross entropy's kernels add gradients under a lock, in no fixed order.

    See tl_lock_add in cce_backward.py. torch's switch for deterministic algorithms does not affect these kernels."""
    if case["full_determinism"] and (case["cut_cross_entropy"] or "CutCrossEntropyPlugin" in case.plugins):
        problem = "cut cross entropy adds gradients in no fixed order: runs differ in their last bits"
        yield "warning", "full_determinism", problem, "set cut_cross_entropy: false"


@rule()
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


@rule()
def never_evaluated(case: Case) -> Problems:
    """Axolotl evaluates only if it has evaluation data, and training reaches an evaluation step.

    See axolotl/core/builders/base.py. Axolotl turns evals_per_epoch into eval_steps = 1 / (evals_per_epoch *
    num_epochs), a fraction of all steps. If the result is 1 or more, Axolotl skips all evaluations. It warns of this
    only if the result is more than 1 (axolotl/utils/config, normalize_config).
    """
    timing = [key for key in _EVALUATION_KEYS if case[key] not in (None, 0, "", "no")]
    if timing and not case.is_set("test_datasets", "val_set_size"):
        level, effect = _without_data(case, timing[-1])
        remedy = "set test_datasets or val_set_size, or delete the key"
        yield level, timing[-1], f"{effect} without evaluation data", remedy
    data = case.first_set("test_datasets", "val_set_size")
    if not data or case["eval_strategy"] == "no":
        return
    if not case.is_set(*_EVALUATION_KEYS):
        yield "warning", data, "never used: no key says when to evaluate", "set eval_strategy: epoch"
    elif timing == ["evals_per_epoch"] and _evaluations(case) <= 1:
        yield "warning", "evals_per_epoch", "one evaluation, which Axolotl skips", "use eval_strategy: epoch instead"
    elif _is_beyond_training(case, "eval_steps"):
        yield "warning", "eval_steps", f"no evaluation: training has at most {case.steps} steps", "lower it"


def _without_data(case: Case, timing: str) -> tuple[Level, str]:
    """Level and effect of a time of evaluation without rows (schemas/validation.py, check_evals)."""
    if case["val_set_size"] == 0 and timing != "evals_per_epoch":
        return "error", "Axolotl refuses it"
    return "warning", "has no effect"


_EVALUATION_KEYS = ("evals_per_epoch", "eval_steps", "eval_strategy")


def _evaluations(case: Case) -> float:
    """Number of evaluations that evals_per_epoch asks for."""
    return case["evals_per_epoch"] * TrainingSettings.of(case.config).num_epochs


def _is_beyond_training(case: Case, key: str) -> bool:
    """True if a key names a later step than the last."""
    return case.steps is not None and 0 < case.steps < (case[key] or 0)


@rule()
def never_saved(case: Case) -> Problems:
    """Without checkpoints, an interrupted run starts over; only the final adapter is saved."""
    if _is_beyond_training(case, "save_steps"):
        yield "warning", "save_steps", f"no checkpoint: training has at most {case.steps} steps", "lower it"


@rule()
def long_warm_up(case: Case) -> Problems:
    """With a warm-up longer than training, the learning rate never reaches its full value."""
    if case.steps and (case["warmup_steps"] or 0) >= case.steps:
        yield "error", "warmup_steps", f"warm-up never ends: training has at most {case.steps} steps", "lower it"


@rule()
def cannot_resume(case: Case) -> Problems:
    """A checkpoint without optimizer and scheduler restarts both (transformers' Trainer, _save_checkpoint)."""
    if case["save_only_model"]:
        problem = "checkpoints have no optimizer state: a resumed run restarts optimizer and schedule"
        yield "warning", "save_only_model", problem, "delete it"


@rule()
def deleted_checkpoints(case: Case) -> Problems:
    """Without save_total_limit, Axolotl keeps four checkpoints (core/builders/base.py)."""
    saves = (case["saves_per_epoch"] or 0) * TrainingSettings.of(case.config).num_epochs
    if saves > KEPT_CHECKPOINTS and not case.is_set("save_total_limit"):
        problem = f"not set: of {saves:.0f} checkpoints, only the last {KEPT_CHECKPOINTS} are kept"
        yield "note", "save_total_limit", problem, "set it to the number that you need"


@rule()
def no_preference(case: Case) -> Problems:
    """With a beta of 0, the loss of DPO is constant: 0.6931, with a gradient of 0 (TRL#1311; seen)."""
    if not case["rl"]:
        return
    beta = (case["trl"] or {}).get("beta", case["rl_beta"])
    if beta == 0:
        yield "error", "rl_beta", "0: preferences have no effect, and nothing is trained", "set it, for example to 0.1"
    elif beta is None and case["rl"] in OF_PAIRS:
        yield "note", "rl_beta", "not set: TRL uses 0.1", "set it"


@rule()
def simpo_terms(case: Case) -> Problems:
    """Axolotl passes a missing margin on as None, and TRL then fails in its first step (seen).

    TRL's default for cpo_alpha is 1; SimPO's paper (arXiv 2405.14734) has no such term.
    """
    if case["rl"] != "simpo":
        return
    if case["simpo_gamma"] is None:
        yield "error", "simpo_gamma", "not set: training fails in its first step", "set it, for example to 0.5"
    if case["cpo_alpha"] is None:
        problem = "not set: TRL adds the loss of the chosen answers with weight 1"
        yield "warning", "cpo_alpha", problem, "set it to 0, as in SimPO's paper, or to the weight that you want"


@rule()
def answers_cut_away(case: Case) -> Problems:
    """TRL 1.14 cuts answers to max_length minus the longer answer's length (tokenize_row in CPO's and ORPO's trainers).

    Axolotl cuts them to sequence_len, without BOS and EOS: each of these pairs exceeds TRL's max_length (seen).
    """
    if case["rl"] in ("simpo", "orpo") and case["excess_length_strategy"] == "truncate":
        problem = "TRL leaves of a truncated pair's answers fewer tokens than its prompt has"
        yield "warning", "excess_length_strategy", problem, "set it to drop"


@rule()
def ignored_adapter(case: Case) -> Problems:
    """TRL gets only the adapter's settings: training begins with a new adapter (loaders/model.py, _build_adapters)."""
    if case["rl"] in ("dpo", "ipo", "kto") and case["lora_model_dir"]:
        problem = f"rl: {case['rl']} does not load these weights, and trains a new adapter of the base model"
        merge = f"axolotl merge-lora CONFIG --lora-model-dir {shlex.quote(str(case['lora_model_dir']))}"
        remedy = f"merge the adapter with the config that trained it (`{merge}`), and name the folder as base_model"
        yield "error", "lora_model_dir", problem, remedy


@rule()
def dropout_without_effect(case: Case) -> Problems:
    """TRL's trainers set dropout to 0 after they add the adapter (disable_dropout in trl/trainer/dpo_trainer.py)."""
    if case["rl"] in (*OF_PAIRS, "orpo", "kto") and case["lora_dropout"]:
        yield "warning", "lora_dropout", f"no effect: TRL turns dropout off for rl: {case['rl']}", "set it to 0"


@rule()
def rounded_steps(case: Case) -> Problems:
    """TRL's DPO trainer casts adapters of a quantized base to bf16, with 8 significant bits.

    LoRA's A begins with values near 0.01, where bf16 numbers are 3e-5 to 6e-5 apart; Adam's steps are as large as the
    learning rate, and below half of the distance they are lost. B begins at 0 and still learns: at 5e-6, the published
    runs of zephyr's DPO, which TRL cast alike, reached a reward accuracy of 0.74.
    """
    rate = case["learning_rate"]
    is_cast = case["rl"] in ("dpo", "ipo") and case.lora and quantized(case.config)
    if is_cast and isinstance(rate, float) and rate < _LOST_IN_BF16:
        problem = f"{rate:g}: TRL trains adapters of a quantized base in bf16, which rounds so small steps away"
        yield "warning", "learning_rate", problem, f"set {_LOST_IN_BF16:g} or more, or use adapter: lora"


_LOST_IN_BF16 = 5e-6
