"""Whether settings are complete, compatible with one another and with the number of steps, and safe to keep."""

from ...base.progress import is_secret
from ...configs.config import flatten
from .case import Case, Problems, rule


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
        yield "warning", "eval_steps", f"the training has {case.number_of_steps}, so it never evaluates", "lower it"


@rule
def never_saved(case: Case) -> Problems:
    """Without a checkpoint an interrupted run starts over; the adapter is saved at the end in any case."""
    if case.steps and (case["save_steps"] or 0) > case.steps:
        yield "warning", "save_steps", f"the training has {case.number_of_steps}, so it never saves one", "lower it"


@rule
def long_warm_up(case: Case) -> Problems:
    """The learning rate then never reaches its value."""
    if case.steps and (case["warmup_steps"] or 0) >= case.steps:
        yield "error", "warmup_steps", f"as long as the whole training of {case.number_of_steps}", "lower it"


@rule
def unusual(case: Case) -> Problems:
    """No recipe, nor any of Axolotl's examples, comes near: most such values are slips by a factor."""
    alpha, rank = case["lora_alpha"], case["lora_r"] or 8
    if case.lora and alpha and alpha / (rank**0.5 if case["peft_use_rslora"] else rank) > 16:
        yield "note", "lora_alpha", f"{alpha} beside lora_r {rank} lets LoRA's update count many times", ""
