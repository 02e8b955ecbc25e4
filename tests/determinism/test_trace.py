from pathlib import Path
from types import SimpleNamespace
from typing import Any

import orjson
import pytest
import torch

from qlora_recipes.determinism import trace

A, B, C = [5, 6, 7], [8, 9], [4, 4, 4, 4]


def a_batch(*rows: list[int], width: int = 5) -> dict[str, torch.Tensor]:
    """A micro-batch, padded on the right, whose first token carries no loss."""
    padded = [row + [0] * (width - len(row)) for row in rows]
    labels = [[-100, *row[1:]] + [-100] * (width - len(row)) for row in rows]
    mask = [[1] * len(row) + [0] * (width - len(row)) for row in rows]
    return {
        "input_ids": torch.tensor(padded),
        "labels": torch.tensor(labels),
        "attention_mask": torch.tensor(mask),
    }


def packed(*rows: list[int]) -> dict[str, torch.Tensor]:
    """A micro-batch of one packed row."""
    return {
        "input_ids": torch.tensor([[token for row in rows for token in row]]),
        "labels": torch.tensor([[token for row in rows for token in [-100, *row[1:]]]]),
        "position_ids": torch.tensor([[i for row in rows for i in range(len(row))]]),
    }


def test_a_hash_of_a_batch_is_of_all_of_it() -> None:
    whole, _ = trace.hashes([a_batch(A, B)])
    assert whole == trace.hashes([a_batch(A, B)])[0]
    relabelled = a_batch(A, B) | {"labels": a_batch(A, B)["labels"].clamp(min=-99)}
    others = [a_batch(B, A)], [a_batch(A), a_batch(B)], [a_batch(A, B, width=6)], [relabelled], [a_batch(A, C)]
    assert len({whole, *(trace.hashes(other)[0] for other in others)}) == 6


def test_a_hash_of_rows_depends_on_no_order_padding_or_packing() -> None:
    _, rows = trace.hashes([a_batch(A, B), a_batch(C)])
    same = [a_batch(C, B, A)], [a_batch(C, width=8), a_batch(B, A)], [packed(B, A, C)], [packed(C), packed(A, B)]
    assert {trace.hashes(other)[1] for other in same} == {rows}
    relabelled = a_batch(A, B) | {"labels": a_batch(A, B)["input_ids"]}
    for other in ([a_batch(A, B)], [a_batch(A, A), a_batch(C)], [relabelled, a_batch(C)], [packed(A + B, C)]):
        assert trace.hashes(other)[1] != rows


def test_batches_without_tokens_have_hashes_too() -> None:
    pictures = {"pixel_values": torch.ones(2, 3, dtype=torch.bfloat16), "number": 3}
    assert trace.hashes([pictures]) == trace.hashes([dict(pictures)])
    assert trace.hashes([pictures]) != trace.hashes([{"pixel_values": torch.zeros(2, 3)}])
    assert trace.hashes([["a prompt"]]) != trace.hashes([["another"]])
    graded = {"input_ids": a_batch(A)["input_ids"], "labels": torch.tensor([1.0])}
    assert trace.hashes([graded])[0] != trace.hashes([graded | {"labels": torch.tensor([2.0])}])[0]


class Trainer:
    """The methods of transformers' trainer that a step goes through, as it calls them."""

    def __init__(self, step: int = 0, epoch: float | None = None, first_rank: bool = True):
        self.state = SimpleNamespace(global_step=step, epoch=epoch, is_world_process_zero=first_rank)
        self.args = SimpleNamespace(device="cpu")

    def get_batch_samples(self, batches: Any, count: int, device: Any) -> tuple[list[Any], int]:
        return [next(batches) for _ in range(count)], 7

    def training_step(self, model: Any, inputs: dict[str, Any], items: Any = None) -> torch.Tensor:
        return inputs.pop("input_ids").sum() / 64

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        return grad_norm

    def _get_learning_rate(self) -> float:
        return 1e-4 / (1 + self.state.global_step)

    def run_epoch(self, rows: list[list[int]], norm: Any = 0.25) -> None:
        """Train on rows, each a micro-batch, two of them a step."""
        batches = iter([a_batch(row) for row in rows])
        for _ in range(len(rows) // 2):
            fetched, items = self.get_batch_samples(batches, 2, "cpu")
            losses = [self.training_step(None, batch, num) for batch, num in zip(fetched, (items, items), strict=True)]
            assert len(losses) == 2
            assert self._get_grad_norm(None, grad_norm=norm) == norm or norm != norm
            self.state.global_step += 1
            self.state.epoch = (self.state.epoch or 0) + 0.4  # a bit behind, as where packing makes fewer batches


def of_one(value: float, device: Any) -> list[float]:
    return [value]


def test_each_step_is_recorded(tmp_path: Path) -> None:
    trainer = Trainer()
    trace.add_to(trainer, tmp_path / trace.FILE, of_one)
    trainer.run_epoch([A, B, C, A], torch.tensor(0.1))
    trainer.run_epoch([A, C, B, A], float("nan"))
    steps = trace.read(tmp_path / trace.FILE)
    assert [(step.step, step.epoch) for step in steps] == [(1, 0), (2, 0), (3, 1), (4, 1)]
    assert [step.loss for step in steps] == [35 / 64, 34 / 64, 34 / 64, 35 / 64]
    assert steps[0].grad_norm == float(torch.tensor(0.1)) != 0.1  # its own bits, not a rounding
    assert steps[2].grad_norm is None
    assert [step.learning_rate for step in steps] == [1e-4, 1e-4 / 2, 1e-4 / 3, 1e-4 / 4]
    assert steps[0].rows == steps[3].rows and steps[1].rows == steps[2].rows
    assert steps[1].batch != steps[2].batch  # another order


def test_a_resumed_training_drops_what_it_does_again(tmp_path: Path) -> None:
    file = tmp_path / trace.FILE
    before = Trainer()
    trace.add_to(before, file, of_one)
    before.run_epoch([A] * 10)
    whole = file.read_bytes()
    file.write_bytes(whole + b'{"step":6,"epo')  # of a killed process
    assert len(trace.read(file)) == 5
    resumed = Trainer(step=3, epoch=1.2)
    trace.add_to(resumed, file, of_one)
    resumed.run_epoch([B] * 2)
    steps = trace.read(file)
    assert [(step.step, step.epoch) for step in steps] == [(1, 0), (2, 0), (3, 0), (4, 1)]
    assert steps[3].loss == 34 / 64
    assert len(file.read_bytes().splitlines()) == 4
    assert file.read_bytes().splitlines()[:3] == whole.splitlines()[:3]  # to the last bit


def test_a_step_of_several_ranks_is_of_the_rows_of_all(tmp_path: Path) -> None:
    """Two ranks, of which the other has always C and a loss of 1."""
    theirs = trace.hashes([a_batch(C)])
    for first_rank in (True, False):
        trainer = Trainer(first_rank=first_rank)
        answers = iter([float(theirs[0]), float(theirs[1]), 1.0])

        def of_all(value: float, device: Any, answers: Any = answers) -> list[float]:
            return [value, next(answers)]

        trace.add_to(trainer, tmp_path / f"{first_rank}.jsonl", of_all)
        trainer.run_epoch([A, B])
    (step,) = trace.read(tmp_path / "True.jsonl")
    assert step.loss == (35 / 64 + 1) / 2
    assert int(step.rows, 16) == trace.hashes([a_batch(A, B, C)])[1]
    assert int(step.batch, 16) != trace.hashes([a_batch(A), a_batch(B)])[0]
    assert not (tmp_path / "False.jsonl").exists()


@pytest.mark.parametrize("content", [b"", b"not json\n[]\n", orjson.dumps({"step": 1}) + b"\n"])
def test_a_file_that_is_no_trace_has_no_steps(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "trace.jsonl").write_bytes(content)
    assert trace.read(tmp_path / "trace.jsonl") == trace.read(tmp_path / "missing.jsonl") == []
