"""What can be wrong with a config whose keys and values are all allowed.

A rule is a function that yields (level, key, problem, remedy); its name, with dashes, is the finding's. Its docstring
says why the rule is there and how that is known; "seen" is with Axolotl 0.21 on this project's machine. Rules may
rely on the schema: what breaks it has been taken out of the config that they get.
"""

import importlib.util
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..base import paths
from ..base.errors import did_you_mean
from ..base.yamlfiles import Config
from ..configs import datafiles, models
from ..configs.attention import OLD_KEYS, attention
from ..configs.config import flatten
from ..configs.gpus import Gpu
from ..configs.precision import precision
from . import schema
from .finding import Finding, Level

Found = Iterator[tuple[Level, str, str, str]]


@dataclass
class Case:
    """What rules judge.

    Attributes:
        config: the config, without what breaks the schema.
        wrong: the top-level keys from which something was taken out.
        gpu: the GPU that it is meant for; None where none is named or there.
        gpus: how many of them.
        launching: whether a run is about to start here, so that what only this machine lacks is an error.
    """

    config: Config
    wrong: set[str]
    gpu: Gpu | None = None
    gpus: int = 1
    launching: bool = False

    def __getitem__(self, key: str) -> Any:
        return self.config.get(key)

    @cached_property
    def model(self) -> models.Model:
        """The base model, as far as it is known."""
        return models.find(self.config)

    @cached_property
    def steps(self) -> int | None:
        """The optimizer steps of the training, where they can be counted; at most so many where rows are packed."""
        return None if self.wrong else datafiles.most_steps(self.config, self.gpus)

    @property
    def number_of_steps(self) -> str:
        """The steps in words."""
        return f"{'at most ' if self['sample_packing'] and not self['max_steps'] else ''}{self.steps} steps"

    @property
    def attention(self) -> str:
        """The attention that it asks for."""
        return attention(self.config)

    @property
    def lora(self) -> bool:
        """Whether an adapter of PEFT's LoRA is trained."""
        return self["adapter"] in ("lora", "qlora")

    def is_set(self, *keys: str) -> bool:
        """Whether one of some keys has a value, and not an empty one or false; a wrong one counts."""
        return any(self.config.get(key) or key in self.wrong for key in keys)


def findings(case: Case) -> Iterator[Finding]:
    """What every rule finds."""
    for rule in _RULES:
        for level, key, problem, remedy in rule(case):
            yield Finding(level, rule.__name__.replace("_", "-"), key, problem, remedy)


_RULES: list[Callable[[Case], Found]] = []


def _rule(function: Callable[[Case], Found]) -> Callable[[Case], Found]:
    _RULES.append(function)
    return function


@_rule
def secret(case: Case) -> Found:
    """A run's folder keeps its config, and is meant to be shared."""
    for key, value in flatten(case.config):
        if isinstance(value, str) and schema.is_secret(key):
            yield "error", key, "would stand in the run's folder", "give it by an environment variable"


@_rule
def no_data(case: Case) -> Found:
    """Axolotl refuses such a config, after 15 s of imports."""
    if not case.is_set("datasets", "pretraining_dataset"):
        yield "error", "datasets", "the config names no data to train on", "list a data set with path and type"


@_rule
def missing_file(case: Case) -> Found:
    """Axolotl validates a DeepSpeed file's name only (seen); other files fail it once the model is loaded."""
    for key, dataset in datafiles.datasets(case.config):
        name = dataset.get("path")
        if not isinstance(name, str) or not name:
            yield "error", f"{key}.path", f"{name!r} names no data", "give a file, a folder or a data set of the hub"
        for file in datafiles.local_files(dataset):
            remedy = "`recipe data prepare` writes the study's data, --rehearse needs none"
            if not file.is_file():
                yield "error", f"{key}.path", f"{file.absolute()} does not exist", remedy
            elif not file.stat().st_size:
                yield "error", f"{key}.path", f"{file} is empty", remedy
    for key in ("deepspeed", "lora_model_dir", "resume_from_checkpoint"):
        name = case[key]
        if isinstance(name, str) and not Path(name).exists() and not (key == "lora_model_dir" and name.count("/") == 1):
            yield "error", key, f"{Path(name).absolute()} does not exist", "correct the path or delete the key"


@_rule
def no_number(case: Case) -> Found:
    """Axolotl takes a learning rate as text too, and turns it into a number once 15 s of imports are done."""
    rate = case["learning_rate"]
    if isinstance(rate, str):
        try:
            float(rate)
        except ValueError:
            yield "error", "learning_rate", f"{rate} is no number", "write it as 0.0002 or 2e-4"


@_rule
def no_batch_size(case: Case) -> Found:
    """Without it Axolotl trains with one row at a time, in silence (seen)."""
    if not case.is_set("micro_batch_size"):
        yield "error", "micro_batch_size", "not set: Axolotl would take 1", "set it"


@_rule
def excluding_keys(case: Case) -> Found:
    """Axolotl refuses these pairs (axolotl/utils/schemas/validation.py), each on its own, after 15 s of imports."""
    for one, other in _EXCLUDING:
        if case[one] and case[other]:
            yield "error", one, f"cannot stand beside {other}", "delete one of them"
    if case["evals_per_epoch"] and case["eval_strategy"] not in (None, "steps"):
        yield "error", "eval_strategy", "cannot stand beside evals_per_epoch", "delete one of them"


_EXCLUDING = [
    ("warmup_steps", "warmup_ratio"),
    ("eval_steps", "evals_per_epoch"),
    ("save_steps", "saves_per_epoch"),
    ("test_datasets", "val_set_size"),
    ("batch_size", "gradient_accumulation_steps"),
    ("deepspeed", "fsdp_config"),
    *((key, "attn_implementation") for key in OLD_KEYS),
]


@_rule
def deprecated(case: Case) -> Found:
    """The schema carries what Axolotl says of a key that it is done with."""
    for key, value in case.config.items():
        known = schema.load()["properties"].get(key, {})
        if value and known.get("deprecated"):
            yield "error" if known["x-removed"] else "warning", key, known["deprecationMessage"], ""


@_rule
def no_lora_targets(case: Case) -> Found:
    """Axolotl's validation lets it pass; PEFT fails once the model is loaded (NoMatchingPeftModuleError)."""
    if case.lora and not case.is_set("lora_target_modules", "lora_target_linear", "lora_target_parameters"):
        yield "error", "adapter", "no layers are named for LoRA", "set lora_target_modules or lora_target_linear: true"


@_rule
def unknown_lora_target(case: Case) -> Found:
    """PEFT passes over a name that matches no layer, as long as another does (BaseTuner.inject_adapter)."""
    targets, linear = case["lora_target_modules"], case.model.linear
    if not (case.lora and targets and linear) or targets == "all-linear":
        return
    paths = ["model.embed_tokens", "lm_head"]
    for i in range(case.model.layers or 1000):
        paths += [f"model.layers.{i}.{'self_attn' if name in models.ATTENTION else 'mlp'}.{name}" for name in linear]
    if isinstance(targets, str):
        try:
            if any(re.fullmatch(targets, path) for path in paths):
                return
        except re.error as error:
            yield "error", "lora_target_modules", f"{targets} is no regular expression: {error}", "use a list of names"
            return
        yield "error", "lora_target_modules", f"{targets} matches no layer of this model", f"it has {', '.join(linear)}"
        return
    for i, target in enumerate(targets):
        if not any(path == target or path.endswith(f".{target}") for path in paths):
            hint = did_you_mean(target, linear) or f"; it has {', '.join(linear)}"
            yield "error", f"lora_target_modules.{i}", f"no layer of this model is called {target}{hint}", ""


@_rule
def no_lora_rank(case: Case) -> Found:
    """PEFT gets None and fails once the model is loaded."""
    for key in ("lora_r", "lora_alpha"):
        if case.lora and not case.is_set(key, "lora_model_dir"):
            yield "error", "adapter", f"{key} is not set", f"set {key}"


@_rule
def not_quantized(case: Case) -> Found:
    """Axolotl quantizes to 4 bits for the adapters qlora and mixlora only (axolotl/loaders/model.py)."""
    if case["adapter"] == "lora" and case["load_in_4bit"]:
        yield "error", "adapter", "lora leaves the base in 16 bits, load_in_4bit or not", "set adapter: qlora"
    if case["adapter"] == "qlora" and not case["load_in_4bit"]:
        yield "error", "adapter", "qlora needs load_in_4bit: true", "set it, or adapter: lora"
    for key in ("load_in_4bit", "load_in_8bit"):
        if not case.is_set("adapter") and case[key]:
            yield "error", key, "a quantized base cannot be trained without an adapter", "set adapter: qlora"


@_rule
def two_precisions(case: Case) -> Found:
    """bf16 wins and fp16 or float16 is dropped without a message; float16 needs bf16: false, because the default, auto,
    is on for every GPU (see `precision`). transformers' TrainingArguments refuses fp16 beside bfloat16."""
    ignored = next((key for key in ("fp16", "float16") if case[key]), None)
    if not ignored or precision(case.config, on_gpu=True).weights != "bfloat16":
        return
    if case["bf16"] is True:
        problem = f"{ignored} and bf16 are both true: Axolotl would take bf16"
    elif case["bfloat16"]:
        problem = f"{ignored} and bfloat16 are both true: Axolotl would load the model in bfloat16"
    else:
        problem = f"{ignored} is true, but bf16 is auto, the default: Axolotl would take bf16"
    yield "error", ignored, problem, f"set {ignored} or {'bfloat16' if case['bfloat16'] else 'bf16'} to false"


@_rule
def gpu_lacks(case: Case) -> Found:
    """What a GPU has no hardware for.

    torch for CUDA 13 is built from compute capability 7.5 on. bf16 came with 8.0; below, torch emulates it slowly and
    reports it as supported, so that Axolotl's bf16: auto, its default, turns it on (seen). FlashAttention 2 and
    SageAttention need 8.0, FlashAttention 3 is for 9.0 alone, 4 for 9.0 and newer (their READMEs); Axolotl asks for 9.0
    for fp8; transformers refuses tf32 below 8.0.
    """
    if not case.gpu:
        return
    has, name = case.gpu.capability, str(case.gpu)
    if has < (7, 5):
        yield "error", "base_model", f"torch for CUDA 13 does not run on {name}", "take a GPU from Turing (7.5) on"
    if has < (8, 0) and precision(case.config, on_gpu=True).weights == "bfloat16":
        asked = case["bf16"] is True or case["bfloat16"]
        default = "" if asked else " (auto, the default, turns it on all the same)"
        yield "error", "bf16", f"{name} emulates bf16, slowly{default}", "set fp16: true and bf16: false"
    if has < (8, 0) and case["tf32"] is True:
        yield "error", "tf32", f"{name} has no tf32", "set it to false"
    least, most = _ATTENTION_RUNS_ON.get(case.attention, ((0, 0), (99, 0)))
    if not least <= has <= most:
        yield "error", "attn_implementation", f"{case.attention} does not run on {name}", "set sdpa"
    if has < (9, 0) and case["fp8"]:
        yield "error", "fp8", f"Axolotl trains in fp8 from 9.0 on, not on {name}", "delete it"


_ATTENTION_RUNS_ON = {  # from and to which compute capability
    "flash_attention_2": ((8, 0), (99, 0)),
    "kernels-community/flash-attn2": ((8, 0), (99, 0)),
    "flash_attention_3": ((9, 0), (9, 0)),
    "kernels-community/flash-attn3": ((9, 0), (9, 0)),
    "flash_attention_4": ((9, 0), (99, 0)),
    "sage": ((8, 0), (99, 0)),
    "fp8": ((9, 0), (99, 0)),
}


@_rule
def no_gpu(case: Case) -> Found:
    """A CPU does not train in fp16, into which Axolotl also turns bf16: auto, its default, there; transformers says so
    once the model is loaded."""
    if case.launching and not case.gpu and precision(case.config, on_gpu=False).autocast == "float16":
        key, default = ("fp16", "") if case["fp16"] else ("bf16", ", which bf16: auto, the default, becomes there")
        problem = f"no NVIDIA GPU was found, and a CPU does not train in fp16{default}"
        remedy = f"--rehearse tries the recipe with a small model, --set {key}=false trains in fp32"
        yield "error", key, problem, remedy


@_rule
def packing_leaks(case: Case) -> Found:
    """Rows packed into one then attend to each other; Axolotl only warns (attn_decontaminates_packing).

    It also warns that sdpa keeps them apart in bf16 at the cost of losses of 0 before Hopper.
    """
    if case["sample_packing"] and case.attention not in KEEP_DOCUMENTS_APART:
        with_what = case.attention or "no attn_implementation"
        yield "error", "sample_packing", f"with {with_what}, packed rows see each other", "set flash_attention_2"
    before_hopper = case.gpu and case.gpu.capability < (9, 0)
    in_bf16 = precision(case.config, on_gpu=True).weights == "bfloat16"
    if case["sample_packing"] and case.attention == "sdpa" and in_bf16 and before_hopper:
        yield "warning", "sample_packing", f"with sdpa and bf16 losses can be 0 on {case.gpu}", "set flash_attention_2"


KEEP_DOCUMENTS_APART = {
    *("flash_attention_2", "flash_attention_3", "flash_attention_4", "flash_attention_torch", "flex_attention"),
    *("xformers", "sage", "sdpa", "eager"),
    *("kernels-community/flash-attn2", "kernels-community/flash-attn3", "kernels-community/sage-attention"),
}


@_rule
def optimizer_and_engine(case: Case) -> Found:
    """bitsandbytes' optimizers know nothing of FSDP2's DTensors; Axolotl refuses only two of them. Muon and the flash
    optimizers do not divide among DeepSpeed's ranks (axolotl/utils/schemas/validation.py). Where DeepSpeed keeps the
    optimizer's state in main memory, accelerate puts DeepSpeed's own Adam in the optimizer's place, which decays
    weights as AdamW does only where it stands for one of 32 bits (map_pytorch_optim_to_deepspeed).
    """
    optimizer = str(case["optimizer"] or "")
    of_bnb = re.search(r"paged|bnb|^(adamw|ademamix|lion|rmsprop)_(8|32)bit$", optimizer)
    if case["fsdp_config"] and of_bnb:
        yield "error", "optimizer", f"{optimizer} does not work with FSDP2", "set adamw_torch_8bit or adamw_torch_fused"
    if case["deepspeed"] and re.match(r"muon|flash_|polora|q_galore", optimizer):
        yield "error", "optimizer", f"{optimizer} does not work with DeepSpeed", "set adamw_torch_fused"
    deepspeed = dict(flatten(case["deepspeed"] or {}))
    offloaded = deepspeed.get("zero_optimization.offload_optimizer.device", "none") != "none"
    replaced = offloaded and deepspeed.get("zero_force_ds_cpu_optimizer", True)
    if replaced and not re.fullmatch("|adamw_torch|adamw_torch_fused|paged_adamw_32bit", optimizer):
        problem = f"with offload_optimizer, Adam without AdamW's weight decay takes the place of {optimizer}"
        yield "error", "optimizer", problem, "set adamw_torch, or take the profile zero3-offload"


@_rule
def engine_needs_gpus(case: Case) -> Found:
    """FSDP in one process is passed over in silence (accelerate's AcceleratorState)."""
    if case.launching and case["fsdp_config"] and case.gpus == 1:
        yield "error", "fsdp_config", "FSDP2 divides a model among several GPUs, and this run has one", "--gpus N"


@_rule
def scheduler_needs(case: Case) -> Found:
    """transformers.get_scheduler fails without these, once the model is loaded."""
    scheduler, options = case["lr_scheduler"], case["lr_scheduler_kwargs"] or {}
    needed = _SCHEDULER_NEEDS.get(str(scheduler), ())
    if needed and not any(options.get(name) is not None for name in needed):
        yield "error", "lr_scheduler", f"{scheduler} needs {' or '.join(needed)}", "set it under lr_scheduler_kwargs"


_SCHEDULER_NEEDS = {
    "cosine_with_min_lr": ("min_lr", "min_lr_rate"),
    "cosine_warmup_with_min_lr": ("min_lr", "min_lr_rate"),
    "warmup_stable_decay": ("num_decay_steps",),
}


@_rule
def two_cross_entropies(case: Case) -> Found:
    """Each replaces the loss function; Axolotl refuses them together, after 15 s of imports."""
    options = ("cut_cross_entropy", "chunked_cross_entropy", "liger_cross_entropy", "liger_fused_linear_cross_entropy")
    on = [key for key in options if case[key]]
    if len(on) > 1:
        yield "error", on[1], f"cannot be on beside {on[0]}", "set one of them to false"


@_rule
def never_evaluated(case: Case) -> Found:
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
        yield "warning", data, "nothing says when to evaluate, so that it never happens", "set evals_per_epoch"
    elif asked == ["evals_per_epoch"] and share <= 1:
        yield "warning", "evals_per_epoch", "one in all, which Axolotl drops", "write eval_strategy: epoch in its place"
    elif case.steps and (case["eval_steps"] or 0) > case.steps:
        yield "warning", "eval_steps", f"the training has {case.number_of_steps}, so it never evaluates", "lower it"


@_rule
def never_saved(case: Case) -> Found:
    """Without a checkpoint an interrupted run starts anew; the adapter is saved at the end in any case."""
    if case["save_strategy"] == "best" and not case["metric_for_best_model"]:
        yield "error", "save_strategy", "nothing says what is the best", "set metric_for_best_model: eval_loss"
    if case.steps and (case["save_steps"] or 0) > case.steps:
        yield "warning", "save_steps", f"the training has {case.number_of_steps}, so it never saves one", "lower it"


@_rule
def long_warm_up(case: Case) -> Found:
    """The learning rate then never reaches its value."""
    if case.steps and (case["warmup_steps"] or 0) >= case.steps:
        yield "error", "warmup_steps", f"as long as the whole training of {case.number_of_steps}", "lower it"


@_rule
def beyond_context(case: Case) -> Found:
    """Positions that a model never saw; RoPE extends them without an error."""
    context, length = case.model.context, case["sequence_len"] or 0
    if context and length > context and not (case["overrides_of_model_config"] or case["model_config"]):
        yield "error", "sequence_len", f"{length}, but the model was made for {context} tokens", "lower it"


@_rule
def missing_special_token(case: Case) -> Found:
    """Axolotl adds it to the tokenizer and a row to the embedding, which LoRA does not train (loaders/tokenizer.py).

    A padding token carries no loss, so that its untrained row does not matter, but whoever loads the adapter has to
    add the row too; PEFT fails otherwise (seen).
    """
    tokens = case["special_tokens"] or {}
    trained = {"embed_tokens", "lm_head"} <= set(case["lora_modules_to_save"] or [])
    known = case.model.special_tokens
    for name, token in tokens.items():
        if known and isinstance(token, str) and not re.fullmatch(known, token) and not trained:
            level: Level = "warning" if name == "pad_token" else "error"
            problem = (
                f"{token} is no special token of this model: Axolotl adds it, and a row to an embedding that has no "
                "spare one, which is saved with the adapter and has to be added to the base model to load that"
            )
            own = case.model.pad_token if name == "pad_token" else None
            remedy = f"name one that it has{f', as its own {own}' if own else ''}"
            if level == "error":
                problem, remedy = f"{problem}; LoRA does not train it", f"{remedy}, or set {_TRAINED_EMBEDDING}"
            yield level, f"special_tokens.{name}", problem, remedy


_TRAINED_EMBEDDING = "lora_modules_to_save: [embed_tokens, lm_head]"


@_rule
def chat_model(case: Case) -> Found:
    """No mistake, but worth knowing: what the model learnt of its own format is not used."""
    for key, dataset in datafiles.datasets(case.config, "datasets"):
        if case.model.chat and str(dataset.get("type")).startswith("alpaca") and not case["chat_template"]:
            yield "note", f"{key}.type", "the base model is a chat model, the prompt that of a base model", ""


@_rule
def prompt_strategy(case: Case) -> Found:
    """Axolotl looks a data set's type up once training has begun: among its own, by whether it is preference data, and
    for one with a dot also among the modules that can be imported."""
    definitions = schema.load()["$defs"]
    types = {name: definitions[f"{name}Dataset"]["properties"]["type"]["anyOf"] for name in ("SFT", "DPO", "KTO")}
    own_module = types["SFT"][1]["pattern"]
    preference = {kind for name in ("DPO", "KTO") for kind in types[name][0]["enum"]} - set(types["SFT"][0]["enum"])
    for key, dataset in datafiles.datasets(case.config):
        kind = dataset.get("type")
        if case["rl"] or not isinstance(kind, str):
            continue
        module = kind.partition(".")[0]
        if kind in preference:
            yield "error", f"{key}.type", f"{kind} is for preference training", "set rl, or a type such as alpaca"
        elif re.match(own_module, kind) and not _can_be_found(module):
            yield "error", f"{key}.type", f"there is no module {module}", "put it on PYTHONPATH"


def _can_be_found(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


@_rule
def missing_tracker(case: Case) -> Found:
    """transformers asks for a tracker's package once the model is loaded. Axolotl also turns on one whose project is
    named (axolotl/utils/mlflow_.py and its like)."""
    for package, keys in _TRACKERS.items():
        on = [key for key in keys if case[key]]
        if on and not _can_be_found(package):
            yield "error", on[0], f"the package {package} is not installed", f"install it, or delete {' and '.join(on)}"


_TRACKERS = {
    "tensorboard": ("use_tensorboard",),
    "trackio": ("use_trackio", "trackio_project_name"),
    "mlflow": ("use_mlflow", "mlflow_experiment_name"),
    "wandb": ("use_wandb", "wandb_project"),
    "comet_ml": ("use_comet", "comet_project_name"),
    "swanlab": ("use_swanlab", "swanlab_project"),
}


@_rule
def does_not_divide(case: Case) -> Found:
    """The rest is dropped in silence: Axolotl divides batch_size by micro_batch_size and rounds down."""
    batch, micro_batch = case["batch_size"], case["micro_batch_size"]
    if batch and micro_batch and batch % micro_batch:
        yield "error", "batch_size", f"{batch} is no multiple of micro_batch_size, {micro_batch}", "choose one that is"


@_rule
def output_in_use(case: Case) -> Found:
    """`axolotl train` writes over what is there, and saves its own checkpoints beside another run's."""
    folder = Path(str(case["output_dir"] or "model-out"))
    goes_on = case.launching or case["auto_resume_from_checkpoints"] or case["resume_from_checkpoint"]
    if not goes_on and "\0" not in str(folder) and any(folder.glob("checkpoint-*")):
        yield "warning", "output_dir", f"{folder} holds another run's checkpoints", "`recipe run` has a folder a run"


@_rule
def no_access(case: Case) -> Found:
    """The hub refuses a gated model without a token. On a laptop that checks for another machine it is no error."""
    level: Level = "error" if case.launching else "warning"
    model, name = case.model, case["base_model"]
    if model.weights_here or not isinstance(name, str) or Path(name).is_relative_to(paths.cache()):
        return  # what is in this project's cache is made when it is needed
    if Path(name).is_dir():
        yield "error", "base_model", f"{name} has no weights in it", "give a folder that save_pretrained wrote"
    elif models.is_path(name):
        yield "error", "base_model", f"{name} does not exist", "give a folder or a model of the hub as owner/name"
    elif models.is_offline():
        yield level, "base_model", f"{name} is not in the hub's cache, and HF_HUB_OFFLINE is set", "fetch it first"
    elif model.gated and not models.has_token():
        yield level, "base_model", f"{name} is gated, and there is no token", "`hf auth login`, or --mirror"


@_rule
def unknown_model(case: Case) -> Found:
    """Without a model's config.json and tokenizer some rules find nothing, which must not look as if all were well."""
    name = case["base_model"]
    if not isinstance(name, str) or not name or models.is_path(name) or case.model != models.Model():
        return
    problem = f"{name} is not on this machine, so its layers, context and special tokens are not checked"
    remedy = f"`hf download {name} --include config.json --include 'tokenizer*'` makes them known"
    yield "note", "base_model", problem, remedy + did_you_mean(name, models.catalogue())
