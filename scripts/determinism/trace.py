"""The trace of a training, trace.jsonl: what each optimizer step was computed from, and what it came to.

It is always recorded, because the run that one would have liked to trace is over by then. So it takes what the trainer
has computed anyway, and only once a step's backward passes are done: that is where a GPU is waited for, once a step.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Any

import orjson
from pydantic import BaseModel, ValidationError

from ..base.files import append_line, write_rows

FILE = "trace.jsonl"
_BYTES = 6  # of a hash: its 48 bits fit into the float64 that ranks exchange


class Step(BaseModel):
    """One optimizer step. None stands for a number that is infinite or none at all.

    Attributes:
        step: counted from 1.
        epoch: the one that its rows belong to, counted from 0.
        batch: a hash of all that the model was given, in order, padding included.
        rows: the sum of a hash of each row's tokens and labels, without padding, so that it depends on no order; a
            packed row counts as the rows in it.
        loss: as the trainer computed it for the step, before rounding. Of several ranks the mean.
        grad_norm: the norm of the gradient of all ranks before it is clipped.
        learning_rate: with which the step changes the weights.
    """

    step: int
    epoch: int
    batch: str
    rows: str
    loss: float | None
    grad_norm: float | None
    learning_rate: float | None


def read(file: Path) -> list[Step]:
    """The steps in a trace, in order; none if there is no such file. The torn line of a killed process is skipped."""
    try:
        lines = file.read_bytes().split(b"\n")
    except OSError:
        return []
    steps = {}
    for line in filter(None, lines):
        try:
            step = Step.model_validate_json(line)
        except ValidationError:
            continue
        steps[step.step] = step
    return [steps[number] for number in sorted(steps)]


def add_to(trainer: Any, file: Path, of_all: Callable[[float, Any], list[float]]) -> None:
    """Have a trainer record its steps.

    A resumed run drops the steps after its checkpoint from what an earlier launch recorded.

    Args:
        trainer: transformers' or one derived from it.
        file: where to; the first rank writes it.
        of_all: gives a number of every rank, on a device.
    """
    _Recorder(trainer, file, of_all)


class _Recorder:
    """Listens at the three methods of a trainer that fetch a step's batches, give a batch's loss, and the norm."""

    def __init__(self, trainer: Any, file: Path, of_all: Callable[[float, Any], list[float]]):
        self.trainer, self.file, self.of_all = trainer, file, of_all
        self.batches: list[Any] = []
        self.loss: Any = 0.0  # from the first batch on a tensor, so that nothing waits for it
        self.begun = False
        self.rows_of_epoch: Any = None  # the iterator over them
        self.epoch = 0
        self.fetch, self.train, self.norm = trainer.get_batch_samples, trainer.training_step, trainer._get_grad_norm
        trainer.get_batch_samples, trainer.training_step = self._get_batch_samples, self._training_step
        trainer._get_grad_norm = self._get_grad_norm

    def _get_batch_samples(self, rows_of_epoch: Any, *arguments: Any, **options: Any) -> Any:
        if rows_of_epoch is not self.rows_of_epoch:  # state.epoch is a bit behind where packing makes fewer batches
            self.epoch = int(self.trainer.state.epoch or 0) if self.rows_of_epoch is None else self.epoch + 1
            self.rows_of_epoch = rows_of_epoch
        batches, items = self.fetch(rows_of_epoch, *arguments, **options)
        self.batches = [copy(batch) for batch in batches]  # from which a loss may take its labels away
        self.loss = 0.0
        return batches, items

    def _training_step(self, *arguments: Any, **options: Any) -> Any:
        loss = self.train(*arguments, **options)
        self.loss = self.loss + loss
        return loss

    def _get_grad_norm(self, *arguments: Any, **options: Any) -> Any:
        """Called once a step, when its gradients are complete and before they change the weights."""
        norm = self.norm(*arguments, **options)
        self._record(norm)
        return norm

    def _record(self, norm: Any) -> None:
        state, device = self.trainer.state, self.trainer.args.device
        batch, rows = hashes(self.batches)
        batches, sums, losses = (self.of_all(float(value), device) for value in (batch, rows, self.loss))
        step = {
            "step": state.global_step + 1,
            "epoch": self.epoch,
            "batch": _hex(batches[0] if len(batches) == 1 else _hash(repr(batches).encode())),
            "rows": _hex(sum(map(int, sums)) % 256**_BYTES),
            "loss": sum(losses) / len(losses),
            "grad_norm": None if norm is None else float(norm),
            "learning_rate": self.trainer._get_learning_rate(),
        }
        if not state.is_world_process_zero:
            return
        if not self.begun and self.file.exists():
            write_rows(self.file, (kept.model_dump() for kept in read(self.file) if kept.step <= state.global_step))
        self.begun = True
        append_line(self.file, orjson.dumps(step))


def hashes(batches: Sequence[Any]) -> tuple[int, int]:
    """A hash of a step's micro-batches as they are, and one of their rows that depends on no order; see `Step`."""
    whole: list[bytes] = []
    rows = 0
    for batch in batches:
        if not isinstance(batch, Mapping):  # prompts, of which a reinforcement learner makes its own batches
            whole.append(repr(batch).encode())
            rows += _hash(whole[-1])
            continue
        arrays = {name: _array(value) for name, value in sorted(batch.items()) if hasattr(value, "detach")}
        for name, array in arrays.items():
            whole += f"{name} {array.shape} ".encode(), array.tobytes()
        rows += sum(map(_hash, _rows(arrays)))
    return _hash(*whole), rows % 256**_BYTES


def _rows(arrays: dict[str, Any]) -> Iterator[bytes]:
    """Tokens and labels of each row of a micro-batch; where there are no tokens, all of it as one."""
    import numpy as np

    if "input_ids" not in arrays:
        yield b"".join(array.tobytes() for array in arrays.values())
        return
    ids = arrays["input_ids"]
    of_tokens = {name: array for name, array in arrays.items() if array.shape == ids.shape}  # labels may be of rows
    table = np.stack([of_tokens[name] for name in ("input_ids", "labels") if name in of_tokens], axis=-1)
    kept = of_tokens.get("attention_mask", np.ones(ids.shape)) != 0
    first = of_tokens.get("position_ids", np.ones(ids.shape)) == 0  # of the rows in a packed one
    for i, row in enumerate(table):
        for part in np.split(row[kept[i]], np.flatnonzero(first[i][kept[i]])):
            if len(part):
                yield part.tobytes()


def _array(tensor: Any) -> Any:
    """A tensor as an array; numpy has no bfloat16."""
    on_cpu = tensor.detach().cpu()
    return (on_cpu.float() if on_cpu.is_floating_point() else on_cpu).numpy()


def _hash(*parts: bytes) -> int:
    digest = hashlib.blake2b(digest_size=_BYTES)
    for part in parts:
        digest.update(part)
    return int.from_bytes(digest.digest())


def _hex(number: float) -> str:
    return f"{int(number):0{2 * _BYTES}x}"
