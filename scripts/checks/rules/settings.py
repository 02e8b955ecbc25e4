"""Whether settings are complete, allowed beside one another, and safe to keep."""

from pathlib import Path

from ...configs.attention import OLD_KEYS
from ...configs.config import flatten
from .. import schema
from .case import Case, Found, rule


@rule
def secret(case: Case) -> Found:
    """A run's folder keeps its config, and is meant to be shared."""
    for key, value in flatten(case.config):
        if isinstance(value, str) and schema.is_secret(key):
            yield "error", key, "would stand in the run's folder", "give it by an environment variable"


@rule
def no_number(case: Case) -> Found:
    """Axolotl takes a learning rate as text too, and turns it into a number once 15 s of imports are done."""
    rate = case["learning_rate"]
    if isinstance(rate, str):
        try:
            float(rate)
        except ValueError:
            yield "error", "learning_rate", f"{rate} is no number", "write it as 0.0002 or 2e-4"


@rule
def no_batch_size(case: Case) -> Found:
    """Without it Axolotl trains with one row at a time, in silence (seen)."""
    if not case.is_set("micro_batch_size"):
        yield "error", "micro_batch_size", "not set: Axolotl would take 1", "set it"


@rule
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


@rule
def deprecated(case: Case) -> Found:
    """The schema carries what Axolotl says of a key that it is done with."""
    for key, value in case.config.items():
        known = schema.load()["properties"].get(key, {})
        if value and known.get("deprecated"):
            yield "error" if known["x-removed"] else "warning", key, known["deprecationMessage"], ""


@rule
def does_not_divide(case: Case) -> Found:
    """The rest is dropped in silence: Axolotl divides batch_size by micro_batch_size and rounds down."""
    batch, micro_batch = case["batch_size"], case["micro_batch_size"]
    if batch and micro_batch and batch % micro_batch:
        yield "error", "batch_size", f"{batch} is no multiple of micro_batch_size, {micro_batch}", "choose one that is"


@rule
def two_cross_entropies(case: Case) -> Found:
    """Each replaces the loss function; Axolotl refuses them together, after 15 s of imports."""
    options = ("cut_cross_entropy", "chunked_cross_entropy", "liger_cross_entropy", "liger_fused_linear_cross_entropy")
    on = [key for key in options if case[key]]
    if len(on) > 1:
        yield "error", on[1], f"cannot be on beside {on[0]}", "set one of them to false"


@rule
def output_in_use(case: Case) -> Found:
    """`axolotl train` writes over what is there, and saves its own checkpoints beside another run's."""
    folder = Path(str(case["output_dir"] or "model-out"))
    goes_on = case.launching or case["auto_resume_from_checkpoints"] or case["resume_from_checkpoint"]
    if not goes_on and "\0" not in str(folder) and any(folder.glob("checkpoint-*")):
        yield "warning", "output_dir", f"{folder} holds another run's checkpoints", "`recipe run` has a folder a run"


@rule
def missing_tracker(case: Case) -> Found:
    """transformers asks for a tracker's package once the model is loaded. Axolotl also turns on one whose project is
    named (axolotl/utils/mlflow_.py and its like)."""
    for package, keys in _TRACKERS.items():
        on = [key for key in keys if case[key]]
        if on and not case.can_import(package):
            yield "error", on[0], f"the package {package} is not installed", f"install it, or delete {' and '.join(on)}"


_TRACKERS = {
    "tensorboard": ("use_tensorboard",),
    "trackio": ("use_trackio", "trackio_project_name"),
    "mlflow": ("use_mlflow", "mlflow_experiment_name"),
    "wandb": ("use_wandb", "wandb_project"),
    "comet_ml": ("use_comet", "comet_project_name"),
    "swanlab": ("use_swanlab", "swanlab_project"),
}
