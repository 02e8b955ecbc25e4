"""Whether the steps are enough for warm-up, evaluations and checkpoints."""

from .case import Case, Problems, rule


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
    if case["save_strategy"] == "best" and not case["metric_for_best_model"]:
        yield "error", "save_strategy", "nothing says what the best is", "set metric_for_best_model: eval_loss"
    if case.steps and (case["save_steps"] or 0) > case.steps:
        yield "warning", "save_steps", f"the training has {case.number_of_steps}, so it never saves one", "lower it"


@rule
def no_watchdog(case: Case) -> Problems:
    """Axolotl goes on however high the loss is without it (axolotl/utils/callbacks), and at NaN even with it."""
    if case.steps and case.steps >= _LONG and not case.is_set("loss_watchdog_threshold"):
        problem = f"not set, so of {case.number_of_steps} all are done even if the training diverges"
        remedy = "set a loss well above the first, as in 10; it does not stop at a loss of NaN"
        yield "note", "loss_watchdog_threshold", problem, remedy


_LONG = 1000  # steps that are worth stopping


@rule
def long_warm_up(case: Case) -> Problems:
    """The learning rate then never reaches its value."""
    if case.steps and (case["warmup_steps"] or 0) >= case.steps:
        yield "error", "warmup_steps", f"as long as the whole training of {case.number_of_steps}", "lower it"


@rule
def unusual(case: Case) -> Problems:
    """No recipe, nor any of Axolotl's examples, comes near: most such values are slips by a factor."""
    rate, alpha, rank = case["learning_rate"], case["lora_alpha"], case["lora_r"] or 8
    if isinstance(rate, int | float) and rate > _HIGH_RATE and not str(case["optimizer"]).startswith("prodigy"):
        yield "note", "learning_rate", f"{rate:g} is high; LoRA mostly trains with 1e-5 to 1e-3", ""
    if case.lora and alpha and alpha / (rank**0.5 if case["peft_use_rslora"] else rank) > _LARGE_SCALE:
        yield "note", "lora_alpha", f"{alpha} beside lora_r {rank} lets LoRA's update count many times", ""


_HIGH_RATE = 0.1
_LARGE_SCALE = 16
