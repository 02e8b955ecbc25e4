"""Axolotl plugin: records metrics, stops at a checkpoint, and makes training on a CPU possible.

`recipe run` adds this plugin to the config. The training process runs no other code of this project than this plugin
and the modules that it imports.
"""

import os
import resource
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import orjson
import psutil
import torch
import torch.distributed as dist
from axolotl.integrations.base import BasePlugin
from peft import PeftModel
from pynvml import NVMLError
from transformers import EarlyStoppingCallback, TrainerCallback

from ..base.files import Row, append_line
from ..base.hardware import GIB
from ..base.processes import LOCK_TIMEOUT, end_with_parent, held
from ..base.run_files import RunFile
from ..base.yamlfiles import Config
from ..config import models
from ..config.gpus import CPU_RANKS, PARALLELISM_KEYS, parallelism_of
from . import chat_templates, losses, model_facts, rewards, signals, trackers
from .checkpoints import step_of, write_manifest
from .row_types import OF_PAIRS
from .run_record import Ended, EvalTokens

WORLD_SIZE = int(os.environ.get("WORLD_SIZE", "1"))  # number of ranks, set by the launcher


class RunPlugin(BasePlugin):
    """Plugin that writes metrics.jsonl, prepares trackers, and lets NF4 train on a CPU."""

    parallelism: str | None = None
    parameters: dict[str, int] | None = None
    rows = 0  # of the embedding in the base model's files

    def register(self, cfg: Any) -> None:
        """Record the requested parallelism before Axolotl overwrites it; put a rehearsal's ranks on the CPU."""
        chat_templates.bound()
        if cfg.rl in (*OF_PAIRS, "kto"):
            from . import preferences  # only a preference training needs it

            preferences.single_bos()
        self.findings = signals.Findings()
        signals.Warnings(self.findings)
        if WORLD_SIZE > 1:
            end_with_parent(signal.SIGKILL)  # otherwise ranks keep training after their launcher is killed
        self.parallelism = (
            parallelism_of(cfg) if WORLD_SIZE > 1 or any(cfg.get(key) for key in PARALLELISM_KEYS) else None
        )
        if CPU_RANKS in os.environ:
            use_cpu(parallelism_of(cfg))

    def load_datasets(self, cfg: Any, preprocess: bool = False) -> None:
        """Record that Axolotl starts loading rows; let `axolotl preprocess` reuse rows.

        Otherwise it would rewrite them in place, while another run may be training on them.
        """
        _note(cfg.output_dir, phase="reading and tokenizing rows")
        cfg.is_preprocess = False

    def get_training_args(self, cfg: Any) -> Config | None:
        """Arguments for transformers' trainer that Axolotl does not set.

        Without a GPU, bf16 needs `use_cpu`. On several GPUs, Axolotl gives each GPU the same weight in a step,
        regardless of its number of tokens; `average_tokens_across_devices` weights all tokens equally, as on one GPU.
        trackio takes its project from these arguments alone. Without trackio_static_space_id=False, a push to the
        hub publishes a Space.
        """
        args = {"use_cpu": not torch.cuda.is_available()}
        args["logging_nan_inf_filter"] = False  # the filter logs a NaN loss as 0
        if WORLD_SIZE > 1:
            args["average_tokens_across_devices"] = True
        if cfg.trackio_project_name:
            args["project"] = cfg.trackio_project_name
        if not os.environ.get("TRACKIO_SPACE_ID"):
            args["trackio_static_space_id"] = False
        return args

    def pre_model_load(self, cfg: Any) -> None:
        """Create MLflow's store under a lock: simultaneous creation by two runs fails."""
        _note(cfg.output_dir, phase="loading the model")
        uri = os.environ.get("MLFLOW_TRACKING_URI", "")  # set by Axolotl from the config
        if not cfg.use_mlflow or not uri.startswith("sqlite:///"):
            return
        import mlflow

        store = Path(uri.removeprefix("sqlite:///"))
        with held(store.with_name(f".{store.name}.lock"), "another run is opening MLflow's store", LOCK_TIMEOUT):
            mlflow.search_experiments(max_results=1)

    def post_model_build(self, cfg: Any, model: Any) -> None:
        """Count embedding rows before Axolotl adds rows for new tokens."""
        self.rows = model.get_input_embeddings().num_embeddings

    def post_lora_load(self, cfg: Any, model: Any) -> None:
        """Count parameters before they are sharded; a packed byte counts as two weights."""
        if isinstance(model, PeftModel):
            trainable, total = model.get_nb_trainable_parameters()
            self.parameters = {"trainable_parameters": trainable, "parameters": total}

    def post_model_load(self, cfg: Any, model: torch.nn.Module) -> None:
        """Keep bitsandbytes from repacking 4-bit weights for CPU inference at the first evaluation.

        On processors with AVX512-BF16, training would continue with the repacked weights. Their kernel has no gradient,
        so the model would stop learning.
        """
        if torch.cuda.is_available():
            return
        from bitsandbytes.nn.modules import Linear4bit

        for module in model.modules():
            if isinstance(module, Linear4bit):
                module.support_avx512bf16_for_cpu = False

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Record when evaluations and saves start; add the eval loss per token.

        Tokenizers of Llama 3.2's mirrors pad on the left (seen in PEFT's pull request 3526), Meta's on the right. This
        method makes mirrors pad on the right, so that batches are the same as with Meta's model. Recipes set the same
        pad token for both.

        With preference pairs, Axolotl saves the adapter and then the base model (train.py, save_trained_model), whose
        layers TRL has renamed, so that nothing can load it. This method leaves it out.
        """
        if cfg.rl and isinstance(trainer.model, PeftModel):
            trainer.model.get_base_model().save_pretrained = _save_nothing
        if models.original(cfg.base_model) != cfg.base_model:
            trainer.processing_class.padding_side = "right"
        save = trainer._save_checkpoint

        def note_and_save(*arguments: Any, **options: Any) -> None:
            _note(cfg.output_dir, phase="saving a checkpoint")
            save(*arguments, **options)

        def note_evaluation() -> None:
            _note(cfg.output_dir, phase="evaluating" if trainer.state.global_step else "first evaluation")

        def note_tokens(name: str, tokens: EvalTokens) -> None:
            steps = {"step": trainer.state.global_step, "max_steps": trainer.state.max_steps}
            _note(cfg.output_dir, **steps, **{name: tokens})

        trainer._save_checkpoint = note_and_save
        losses.add_to(trainer, begins=note_evaluation, record=note_tokens)

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[TrainerCallback]:
        """Callback that records metrics and stops training on request."""
        file = Path(cfg.output_dir).with_name(RunFile.METRICS)
        learns_tokens = not (cfg.rl or cfg.reward_model or cfg.process_reward_model)
        vocabulary = trainer.model.config.get_text_config().vocab_size if learns_tokens else None
        if isinstance(trainer.model, PeftModel) and learns_tokens:
            facts = model_facts.facts(cfg, trainer.model, trainer.processing_class, self.rows)
            model_facts.add_differences(self.findings, facts)
        signals.compare_sets(self.findings, trainer.train_dataset, trainer.eval_dataset)
        judge = signals.Signals(self.findings, vocabulary)
        return [RunCallback(file, trainer, self.parallelism, self.parameters, judge)]


class RunCallback(TrainerCallback):
    """Trainer callback that appends records to metrics.jsonl, and stops training on SIGTERM.

    Phase records have time (seconds since 1970) and phase, the activity that begins. All other records have time, step
    and max_steps. Records of steps and evaluations add epoch; the trainer's loss, eval_loss, grad_norm and
    learning_rate; eval_loss_per_token from the module `losses`; rewards from the module `rewards`; memory in GiB; GPU
    utilization in percent; and cpu_percent (100 is one processor). Records with a loss, and the last record, add values
    of all steps since the previous record with a loss: step_seconds (without evaluation and saving), tokens (without
    padding and a reference's pass) and tokens_per_second. Only the first rank writes; peak_gib_by_rank has the memory
    of all ranks. The first record of a
    launch has parallelism, training_rows, trainable_parameters, parameters (including frozen ones) and the text of the
    first training row, in pieces. The last record has `ended` (see `run_record.Ended`), and kept_step if the trainer
    has loaded the best checkpoint. The first evaluation of a launch adds a record with eval_tokens or eval_pairs.
    Findings of a training about itself are in a record with all of them so far; those of `STOP_AT` stop the training.
    The first record of a launch with losses has `tracked`, TensorBoard's and W&B's runs.

    SIGTERM to any rank ends training after the current step, with a checkpoint.

    Args:
        file: metrics.jsonl.
        trainer: the trainer.
        parallelism: the requested parallelism, checked when training begins; None for one process.
        parameters: parameter counts for the first record; None without an adapter.
        judge: the judge of losses and gradients, with the findings about the model.
    """

    def __init__(
        self,
        file: Path,
        trainer: Any,
        parallelism: str | None,
        parameters: dict[str, int] | None = None,
        judge: signals.Signals | None = None,
    ):
        self.file = file
        self.trainer = trainer
        self.parallelism = parallelism
        self.parameters = parameters
        self.judge = judge or signals.Signals(signals.Findings(), None)
        self.reported = 0  # number of findings in the last record with findings
        self.stop = self.stopped = self.checked_updates = self.noted_trackers = False
        self.step_started = self.step_seconds = 0.0
        self.tokens: Any = 0  # without padding, unlike Axolotl's count; a tensor, so that no step waits for the device
        self.labels: Any = 0  # tokens with a label, and batches without one, since the last log entry
        self.empty: Any = 0
        self.process = psutil.Process()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start handling SIGTERM, check the parallelism, and write the first record."""
        signal.signal(signal.SIGTERM, self._stop)
        first = self.parameters or {}
        if self.parallelism:
            check_parallelism(self.parallelism, self.trainer)
            first = first | {"parallelism": self.parallelism}
        with suppress(TypeError):  # streamed rows have no number
            first = first | {"training_rows": len(self.trainer.train_dataset)}
            first = first | _first_row(self.trainer)
        self._append(state, first)
        self._report_findings(state)
        if not args.eval_on_start:
            _note(args.output_dir, phase="training")
        self.trainer.model.register_forward_pre_hook(self._count, with_kwargs=True)
        self.process.cpu_percent()  # the next call returns the load since this one

    def _count(self, model: torch.nn.Module, arguments: tuple[Any, ...], inputs: dict[str, Any]) -> None:
        ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
        if ids is None and arguments:  # from TRL's trainers for SimPO and ORPO
            ids = arguments[0]
        if not model.training or ids is None or not torch.is_grad_enabled():  # a reference has no gradient
            return
        if mask is not None and mask.shape == ids.shape:
            self.tokens += (mask != 0).sum()
        else:
            self.tokens += ids.numel()
        if inputs.get("labels") is not None:
            labels = (inputs["labels"][..., 1:] != losses.MASKED).sum()
            self.labels += labels
            self.empty += labels == 0

    def _stop(self, *_: Any) -> None:
        self.stop = True

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start timing a step."""
        self.step_started = time.perf_counter()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check before the first update that it trains all trainable parameters; DeepSpeed keeps gradients itself."""
        if not (self.checked_updates or self.trainer.is_deepspeed_enabled):
            model_facts.add_differences(self.judge.findings, model_facts.updates(kwargs["model"], kwargs["optimizer"]))
            self._report_findings(state)
        self.checked_updates = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop timing the step; stop training if requested."""
        self.step_seconds += time.perf_counter() - self.step_started
        if any(gather(self.stop, args.device)):
            self.stopped = control.should_training_stop = control.should_save = True

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Record that training continues."""
        _note(args.output_dir, phase="training")

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the manifest of a checkpoint that the trainer has saved."""
        gather(0, args.device)  # a barrier, because each rank writes its own files
        if state.is_world_process_zero:
            write_manifest(Path(args.output_dir, RunFile.CHECKPOINT.format(state.global_step)))
        _note(args.output_dir, phase="training")

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Record the trainer's log entry for a step or an evaluation; ignore others, such as that of the end."""
        logs: Row = kwargs["logs"]
        if logs.keys().isdisjoint({"loss", "eval_loss", losses.NAME}):
            return
        usage = _usage()
        peaks = gather(usage.get("memory_reserved_gib") or usage["rss_peak_gib"], args.device)
        if len(peaks) > 1:
            usage["peak_gib_by_rank"] = peaks
        record = {"epoch": state.epoch}
        for key in ("loss", "eval_loss", losses.NAME, "grad_norm", "learning_rate", *rewards.NAMES):
            if key in logs:
                record[key] = logs[key]
        for key, name in rewards.TRAINED.items():
            if key in logs:
                record[name] = logs[key]
        if "loss" in logs:
            record |= self._measure_steps(args)
        if not self.noted_trackers:  # they start with the first entry
            record["tracked"] = trackers.tracked_runs(args.report_to)
            self.noted_trackers = True
        self._append(state, record | usage | {"cpu_percent": self.process.cpu_percent()})
        if "loss" in logs:
            tokens, empty = (int(sum(gather(float(count), args.device))) for count in (self.labels, self.empty))
            self.labels = self.empty = 0
            self.judge.step(logs["loss"], logs.get("grad_norm"), tokens, empty)
        if "eval_loss" in logs:
            self.judge.evaluation(logs.get(losses.NAME, logs["eval_loss"]))
        self._report_findings(state)
        control.should_training_stop |= self.judge.findings.stop

    def _report_findings(self, state: Any) -> None:
        """Record the findings if there are new ones; the training may stop after this step."""
        if len(self.judge.findings) > self.reported:
            self._append(state, {"findings": [*self.judge.findings.values()]})
            self.reported = len(self.judge.findings)
        self.stop |= self.judge.findings.stop

    def _measure_steps(self, args: Any) -> dict[str, float]:
        """Time and tokens of the steps since the previous call."""
        tokens = int(sum(gather(float(self.tokens), args.device)))
        seconds, self.step_seconds, self.tokens = self.step_seconds, 0.0, 0
        rate = {"tokens_per_second": tokens / seconds} if seconds else {}
        return {"step_seconds": seconds, "tokens": tokens} | rate

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Record the reason for the end, and the last step, which the trainer does not always log."""
        if state.global_step >= state.max_steps:
            self.judge.end()
        self._report_findings(state)
        ended = {"ended": self._how_it_ended(state, control)}
        if args.load_best_model_at_end and state.best_model_checkpoint:  # the trainer has loaded it
            ended["kept_step"] = step_of(Path(state.best_model_checkpoint))
        if self.step_seconds:  # the steps since the last log entry
            ended |= self._measure_steps(args)
        self._append(state, ended)
        _note(args.output_dir, phase="saving the model")

    def _how_it_ended(self, state: Any, control: Any) -> Ended:
        """Reason for the end; `complete` if nothing stopped the training, even after fewer steps than planned."""
        if self.judge.findings.stop:
            return "finding"
        if state.global_step >= state.max_steps or not control.should_training_stop:
            return "complete"
        if not state.global_step:  # transformers stops if an epoch has no batch
            return "no batch"
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, EarlyStoppingCallback) and _has_stopped(callback):
                return "early stopping"
        return "signal" if self.stopped else "callback"

    def _append(self, state: Any, record: Row) -> None:
        _write(self.file, {"step": state.global_step, "max_steps": state.max_steps} | record)


def _has_stopped(callback: EarlyStoppingCallback) -> bool:
    """True if the eval loss has not improved for as many evaluations as a callback waits."""
    return callback.early_stopping_patience_counter >= callback.early_stopping_patience


def use_cpu(parallelism: str) -> None:
    """Make Axolotl and accelerate train with a parallelism on the CPU, communicating over gloo.

    By default, Axolotl queries the GPU driver and gives each rank a GPU. On a CPU, accelerate supports only DDP and
    silently ignores DeepSpeed and FSDP (AcceleratorState). For these two, this function makes accelerate assume GPUs,
    with gloo as the communication backend and the CPU as the device.
    """
    import axolotl.utils.trainer
    from accelerate.parallelism_config import ParallelismConfig
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType
    from axolotl.loaders.model import ModelLoader

    axolotl.utils.trainer.check_cuda_p2p_ib_support = lambda: True
    if parallelism == "DDP":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    else:
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
        PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)
        build_mesh = ParallelismConfig.build_device_mesh
        ParallelismConfig.build_device_mesh = lambda config, _: build_mesh(config, "cpu")
    set_device_map = ModelLoader._set_device_map_config

    def set_cpu_device_map(loader: Any) -> None:
        set_device_map(loader)
        if "device_map" in loader.model_kwargs:
            loader.model_kwargs["device_map"] = {"": "cpu"}

    ModelLoader._set_device_map_config = set_cpu_device_map
    if parallelism.startswith("ZeRO"):
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiling it takes most of a minute


def parallelism_in_use(trainer: Any) -> str:
    """Name of the active parallelism, as in `gpus.parallelism_of`, or "one process"."""
    from deepspeed import DeepSpeedEngine
    from torch.distributed.tensor import DTensor

    model = trainer.model_wrapped
    if isinstance(model, DeepSpeedEngine):
        stage = model.zero_optimization_stage()
        return f"ZeRO-{stage}" if stage else "DDP"
    if all(isinstance(weight, DTensor) for weight in model.parameters()):
        return "FSDP"
    return "DDP" if isinstance(model, torch.nn.parallel.DistributedDataParallel) else "one process"


def _first_row(trainer: Any) -> Row:
    """Field of a record with the first training row; empty for rows without labels, as in preference training."""
    row = trainer.train_dataset[0]
    if not isinstance(row, dict) or "labels" not in row:
        return {}
    ids, labels = row["input_ids"][:_MOST_TOKENS], row["labels"][:_MOST_TOKENS]
    return {"first_row": losses.pieces(trainer.processing_class, ids, labels)}


_MOST_TOKENS = 4096
"""Largest number of tokens of the first row in metrics.jsonl."""


def check_parallelism(requested: str, trainer: Any) -> None:
    """Stop training if Axolotl silently uses another parallelism or number of ranks than requested.

    Raises:
        RuntimeError: the parallelism or the number of ranks differs.
    """
    parallelism = parallelism_in_use(trainer)
    ranks = trainer.accelerator.num_processes
    if (parallelism, ranks) != (requested, WORLD_SIZE):
        raise RuntimeError(
            f"requested {requested} on {WORLD_SIZE} processes, but Axolotl uses {parallelism} on {ranks}"
        )


def gather(value: float, device: torch.device) -> list[float]:
    """Values of all ranks in rank order, gathered on each rank."""
    if WORLD_SIZE == 1:
        return [value]
    mine = torch.tensor([value], dtype=torch.float64, device=device)
    gathered = [mine.clone() for _ in range(WORLD_SIZE)]
    dist.all_gather(gathered, mine)
    return [float(number) for number in gathered]


def _save_nothing(*_: Any, **__: Any) -> None:
    pass


def _note(output: str, **record: Any) -> None:
    _write(Path(output).with_name(RunFile.METRICS), record)


def _write(file: Path, record: Row) -> None:
    """Append a record with the time to a file, on the first rank only."""
    if os.environ.get("RANK", "0") == "0":
        append_line(file, orjson.dumps({"time": time.time()} | record))


def _usage() -> Row:
    if not torch.cuda.is_available():
        return {"rss_peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB}
    usage = {"memory_reserved_gib": torch.cuda.max_memory_reserved() / GIB}
    with suppress(NVMLError):  # a GPU slice (MIG) does not report utilization
        usage["gpu_utilization"] = torch.cuda.utilization()
    return usage
