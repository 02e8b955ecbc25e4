"""Whether settings are complete, compatible with one another, and safe to keep."""

import re
from pathlib import Path

from ...base.private import is_secret
from ...configs.config import flatten
from ...configs.precision import OLD_KEYS
from .. import schema
from .case import Case, Problems, rule


@rule
def secret(case: Case) -> Problems:
    """A run's folder keeps its config, and is meant to be shared."""
    for key, value in flatten(case.config):
        if isinstance(value, str | list) and is_secret(key, value):
            what = "" if is_secret(key) else "it holds a secret, which "
            yield "error", key, f"{what}would be stored in the run's folder", "set it in an environment variable"


@rule
def no_number(case: Case) -> Problems:
    """Axolotl takes a learning rate as text too, and turns it into a number once 15 s of imports are done."""
    rate = case["learning_rate"]
    if isinstance(rate, str) and not re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", rate.strip().lower()):
        yield "error", "learning_rate", f"{rate} is not a number", "write it as 0.0002 or 2e-4"


@rule
def no_batch_size(case: Case) -> Problems:
    """Without it Axolotl trains with one row at a time, in silence (seen)."""
    if not case.is_set("micro_batch_size"):
        yield "error", "micro_batch_size", "not set: Axolotl would take 1", "set it"


@rule
def excluding_keys(case: Case) -> Problems:
    """Axolotl refuses these pairs (axolotl/utils/schemas/validation.py), one at a time, after 15 s of imports."""
    for key, other in _EXCLUDING:
        if case[key] and case[other]:
            yield "error", key, f"cannot be used beside {other}", "delete one of them"
    if case["evals_per_epoch"] and case["eval_strategy"] not in (None, "steps"):
        yield "error", "eval_strategy", "cannot be used beside evals_per_epoch", "delete one of them"


_EXCLUDING = [
    ("warmup_steps", "warmup_ratio"),
    ("eval_steps", "evals_per_epoch"),
    ("save_steps", "saves_per_epoch"),
    ("test_datasets", "val_set_size"),
    ("batch_size", "gradient_accumulation_steps"),
    ("deepspeed", "fsdp_config"),
    *((key, "attn_implementation") for key in OLD_KEYS),
]


@rule
def deprecated(case: Case) -> Problems:
    """The schema carries Axolotl's own message about a key that it has deprecated."""
    for key, value in case.config.items():
        described = schema.load()["properties"].get(key, {})
        if value and described.get("deprecated"):
            yield "error" if described["x-removed"] else "warning", key, described["deprecationMessage"], ""


@rule
def does_not_divide(case: Case) -> Problems:
    """The rest is dropped in silence: Axolotl divides batch_size by micro_batch_size and rounds down."""
    batch, micro_batch = case["batch_size"], case["micro_batch_size"]
    if batch and micro_batch and batch % micro_batch:
        problem = f"{batch} is not a multiple of micro_batch_size, {micro_batch}"
        yield "error", "batch_size", problem, "choose one that is"


@rule
def two_cross_entropies(case: Case) -> Problems:
    """Each replaces the loss function; Axolotl refuses them together, after 15 s of imports, but for cut cross entropy
    that its plugin turns on by itself."""
    options = ("cut_cross_entropy", "chunked_cross_entropy", "liger_cross_entropy", "liger_fused_linear_cross_entropy")
    by_itself = {"cut_cross_entropy"} if "CutCrossEntropyPlugin" in case.plugins else set()
    on = [key for key in options if case[key] or key in by_itself]
    if len(on) > 1:
        yield "error", on[1], f"cannot be on beside {on[0]}", "set one of them to false"


@rule
def does_not_repeat(case: Case) -> Problems:
    """Cut cross entropy's own kernels add up gradients under a lock, in whatever order they come to it (tl_lock_add in
    its cce_backward.py), and torch's switch for deterministic algorithms does not reach them."""
    if case["full_determinism"] and (case["cut_cross_entropy"] or "CutCrossEntropyPlugin" in case.plugins):
        problem = "cut cross entropy adds up gradients in no fixed order, so that runs differ in their last bits"
        yield "warning", "full_determinism", problem, "set cut_cross_entropy: false"


@rule
def output_in_use(case: Case) -> Problems:
    """`axolotl train` writes over what is there, and saves its own checkpoints beside another run's."""
    folder = Path(str(case["output_dir"] or "model-out"))
    resumes = case["auto_resume_from_checkpoints"] or case["resume_from_checkpoint"]
    if not (case.launching or resumes) and "\0" not in str(folder) and any(folder.glob("checkpoint-*")):
        yield "warning", "output_dir", f"{folder} holds another run's checkpoints", "`recipe run` has a folder per run"
