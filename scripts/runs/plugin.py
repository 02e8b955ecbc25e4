"""The Axolotl plugin of a run: telemetry, a clean stop, and what training on a CPU needs.

It is the only code of this project inside the training process; `recipe run` adds it to the config.
"""

import fcntl
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
from axolotl.integrations.base import BasePlugin
from pynvml import NVMLError
from transformers import EarlyStoppingCallback, TrainerCallback

from ..base.files import append_line
from ..base.processes import end_with_parent
from ..configs.engines import CPU_RANKS, KEYS, engine_of
from . import checkpoints, eval_loss, ranks
from .rundir import Ended

GIB = 2**30


class RunPlugin(BasePlugin):
    """Writes metrics.jsonl beside the run's output folder, lets NF4 train on a CPU, and sees to trackers."""

    engine: str | None = None

    def register(self, cfg: Any) -> None:
        """Note the engine that is asked for, before Axolotl writes over it, and let a rehearsal's ranks use the CPU."""
        several = int(os.environ.get("WORLD_SIZE", "1")) > 1
        if several:
            end_with_parent(signal.SIGKILL)  # ranks of a killed launcher would train on
        self.engine = engine_of(cfg) if several or any(cfg.get(key) for key in KEYS) else None
        if CPU_RANKS in os.environ:
            ranks.use_cpu(engine_of(cfg))

    def get_training_args(self, cfg: Any) -> dict[str, Any] | None:
        """What Axolotl does not pass on to transformers.

        That refuses bf16 without a GPU unless told that the CPU is meant. On several GPUs Axolotl has it weigh each
        GPU's share of a step the same, few tokens or many; here every token weighs the same, as on one GPU. It alone
        knows trackio's project, and after a push to the hub it would publish the run as a Space that nobody asked for.
        """
        args: dict[str, Any] = {} if torch.cuda.is_available() else {"use_cpu": True}
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            args["average_tokens_across_devices"] = True
        if cfg.trackio_project_name:
            args["project"] = cfg.trackio_project_name
        if cfg.use_trackio and not os.environ.get("TRACKIO_SPACE_ID"):
            args["trackio_static_space_id"] = False
        return args

    def pre_model_load(self, cfg: Any) -> None:
        """Open MLflow's store, one run at a time: two that find none at once and make it break each other."""
        uri = os.environ.get("MLFLOW_TRACKING_URI", "")  # Axolotl puts the config's there
        if not cfg.use_mlflow or not uri.startswith("sqlite:///"):
            return
        import mlflow

        store = Path(uri.removeprefix("sqlite:///"))
        store.parent.mkdir(parents=True, exist_ok=True)
        with store.with_name(f".{store.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            mlflow.search_experiments(max_results=1)

    def post_model_load(self, cfg: Any, model: torch.nn.Module) -> None:
        """Keep bitsandbytes from repacking 4-bit weights for CPU inference at the first evaluation.

        On processors with AVX512-BF16, training would go on through the repacked weights, by a kernel
        that has no gradient, and learn nothing from then on.
        """
        if torch.cuda.is_available():
            return
        from bitsandbytes.nn.modules import Linear4bit

        for module in model.modules():
            if isinstance(module, Linear4bit):
                module.support_avx512bf16_for_cpu = False

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Have evaluations measure a loss that does not depend on their batches."""
        eval_loss.add_to(trainer)

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[TrainerCallback]:
        """The callback that records and stops."""
        return [RunCallback(Path(cfg.output_dir).parent / "metrics.jsonl", trainer, self.engine)]


class RunCallback(TrainerCallback):
    """Appends a record to metrics.jsonl for each thing that the trainer logs.

    Fields: time (seconds since 1970), step, max_steps, epoch, and as the trainer logs them loss, eval_loss,
    grad_norm, learning_rate; eval_loss_per_token, which the module `eval_loss` measures; for training steps since the
    last record step_seconds (without evaluation and saving), tokens (padding not counted) and tokens_per_second; memory
    in GiB, GPU utilization in percent, and cpu_percent, the process's load since the last record, where 100 is one
    processor. Of several ranks the first one writes; peak_gib_by_rank has the memory of each. The last record has
    `ended`, see `rundir.Ended`.

    SIGTERM ends training after the step in hand, with a checkpoint; that of one rank is enough.

    Args:
        file: metrics.jsonl.
        trainer: the trainer.
        engine: what is to divide the training, which is checked as it begins; None for one process without an engine.
    """

    def __init__(self, file: Path, trainer: Any, engine: str | None):
        self.file, self.trainer, self.engine = file, trainer, engine
        self.stop = self.stopped = False
        self.step_started = self.step_seconds = 0.0
        self.tokens_seen: int | None = 0
        self.process = psutil.Process()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """From here on a checkpoint can be written, so a request to stop waits for one."""
        signal.signal(signal.SIGTERM, self._stop)
        if self.engine:
            ranks.check_engine(self.engine, self.trainer)
            self._append(state, {"engine": self.engine})
        if state.global_step:
            self.tokens_seen = None  # a resumed run counts on from a number that is not known here
        self.process.cpu_percent()  # the load since this call is what the next one tells

    def _stop(self, *_: Any) -> None:
        self.stop = True

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock of a step."""
        self.step_started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop the clock, and the training where that was asked for."""
        self.step_seconds += time.perf_counter() - self.step_started
        if any(ranks.of_all(self.stop, args.device)):
            self.stopped = control.should_training_stop = control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add the manifest to a checkpoint that the trainer has saved."""
        ranks.of_all(0, args.device)  # each rank writes files of its own, and returns from this when all are here
        if state.is_world_process_zero:
            checkpoints.write_manifest(Path(args.output_dir, f"checkpoint-{state.global_step}"))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Record what the trainer logs of a step or an evaluation.

        The loss per token does not stay in the trainer's own history: transformers' card of a model fails where some
        evaluations have it and some do not, as in a run that was begun before there was one.
        """
        if state.log_history:
            state.log_history[-1].pop(eval_loss.NAME, None)
        if not logs or not {"loss", "eval_loss", eval_loss.NAME} & logs.keys():
            return
        usage = _usage()
        peaks = ranks.of_all(usage.get("memory_reserved_gib") or usage["rss_peak_gib"], args.device)
        if len(peaks) > 1:
            usage["peak_gib_by_rank"] = peaks
        record = {"epoch": state.epoch}
        kept = ("loss", "eval_loss", eval_loss.NAME, "grad_norm", "learning_rate")
        record |= {key: logs[key] for key in kept if key in logs}
        if "loss" in logs:
            record["step_seconds"], self.step_seconds = self.step_seconds, 0.0
            if total := logs.get("tokens/total"):
                if self.tokens_seen is not None:
                    record["tokens"] = total - self.tokens_seen
                    record["tokens_per_second"] = record["tokens"] / record["step_seconds"]
                self.tokens_seen = total
        self._append(state, record | usage | {"cpu_percent": self.process.cpu_percent()})

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Record the last step, which the trainer may not have logged, and why it was the last."""
        self._append(state, {"ended": self._how_it_ended(state, control)})

    def _how_it_ended(self, state: Any, control: Any) -> Ended:
        """How the training ended. Unstopped, it is complete, even if packing took fewer steps than planned."""
        if state.global_step >= state.max_steps or not control.should_training_stop:
            return "complete"
        callbacks = [one for one in self.trainer.callback_handler.callbacks if isinstance(one, EarlyStoppingCallback)]
        if any(one.early_stopping_patience_counter >= one.early_stopping_patience for one in callbacks):
            return "early stopping"
        return "signal" if self.stopped else "callback"

    def _append(self, state: Any, record: dict[str, Any]) -> None:
        if not state.is_world_process_zero:
            return
        when = {"time": time.time(), "step": state.global_step, "max_steps": state.max_steps}
        append_line(self.file, orjson.dumps(when | record))


def _usage() -> dict[str, Any]:
    """Memory and, where there is a GPU, its utilization."""
    if not torch.cuda.is_available():
        return {"rss_peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB}
    usage = {
        "memory_allocated_gib": torch.cuda.max_memory_allocated() / GIB,
        "memory_reserved_gib": torch.cuda.max_memory_reserved() / GIB,
    }
    with suppress(NVMLError):  # a slice of a GPU (MIG) does not tell
        usage["gpu_utilization"] = torch.cuda.utilization()
    return usage
