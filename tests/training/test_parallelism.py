"""Two real ranks on the CPU, through the command, under every parallelism: a tiny Llama in NF4 with LoRA.

Runs under DDP, ZeRO-3 and FSDP, and of FSDP on two nodes, are broken off, by a request to stop or by killing a rank,
and resumed; losses and adapter of every run are compared with those of one process.
"""

import subprocess
from pathlib import Path

import psutil
import pytest
import torch
from conftest import finish, start, wait_until

from qlora_recipes.config.merging import Source
from qlora_recipes.run import rundir
from qlora_recipes.run.rundir import RunDir

pytestmark = pytest.mark.long

NAME = "haider2024/code-llama-7b"
ENGINES = {"ddp": "DDP", "zero1": "ZeRO-1", "zero2": "ZeRO-2", "zero3": "ZeRO-3", "fsdp2": "FSDP"}
# ddp is asked to stop; a rank of the others is killed
BROKEN_OFF = {"ddp": "interrupted", "zero3": "failed", "fsdp2": "failed"}
STEPS = 8
CLOSE = 1e-2
ODD = "test_datasets.0.split=train[:7]"  # rows for evaluation, which no two ranks can share evenly


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("place")


def rehearsal(profile: Path, runs: str, *more: str) -> list[str | Path]:
    """The arguments of a run whose losses fall visibly, and depend on nothing random."""
    # the learning rate of a model without knowledge; dropout would differ from rank to rank
    settings = ("num_epochs=1", "saves_per_epoch=4", "learning_rate=0.02", "lora_dropout=0", "bf16=false", ODD)
    sets = (word for setting in settings for word in ("--set", setting))
    return ["--runs", runs, "run", NAME, "--profile", "rehearsal", "--profile", profile, *sets, *more]


@pytest.fixture(scope="module")
def alone(place: Path, tiny_profile: Path) -> RunDir:
    return RunDir(place / finish(start(place, *rehearsal(tiny_profile, "one"))))


def broken_off(process: "subprocess.Popen[str]", runs: Path, kill: bool) -> RunDir:
    """A run that is stopped, or loses a rank, once it has done three steps."""

    def has_done_three() -> bool:
        return any(record["step"] >= 3 for run in rundir.all_runs(runs) for record in run.read_metrics())

    try:
        wait_until(has_done_three, process)
        (launcher,) = psutil.Process(process.pid).children()
        both = sorted(launcher.children(), key=lambda one: one.environ()["LOCAL_RANK"])
        assert len(both) == 2
        if kill:
            both[1].kill()
        else:
            process.terminate()
        psutil.wait_procs(both, timeout=60)
        assert not any(one.is_running() for one in both)
        finish(process, code=1)
    finally:
        process.kill()
    (run,) = rundir.all_runs(runs)
    return run


@pytest.fixture(scope="module", params=ENGINES)
def divided(place: Path, tiny_profile: Path, request: pytest.FixtureRequest) -> tuple[str, RunDir]:
    """A profile, and a run under it on two ranks."""
    profile = request.param
    process = start(place, *rehearsal(tiny_profile, profile, "--profile", profile, "--gpus", "2"))
    if profile not in BROKEN_OFF:
        return profile, RunDir(place / finish(process))
    state = BROKEN_OFF[profile]
    run = broken_off(process, place / profile, state == "failed")
    done = run.summary(run.read()).step
    assert run.read().state == state and 3 <= done < STEPS
    checkpoint = run.last_checkpoint()
    assert checkpoint is not None
    if state == "interrupted":
        assert checkpoint.name == f"checkpoint-{done}"  # of the step at which both ranks stopped
    finish(start(place, "--runs", profile, "resume", "latest"))
    assert run.read().launches[1].resumed_from == checkpoint.name
    return profile, run


def losses(run: RunDir, kind: str) -> dict[int, float]:
    return {record["step"]: record[kind] for record in run.read_metrics() if kind in record}


def parallelism(run: RunDir) -> str:
    """The parallelism in the first record of a training."""
    return str(next(record["parallelism"] for record in run.read_metrics() if "parallelism" in record))


def test_every_engine_trains_like_one_process(alone, divided):
    profile, run = divided
    record = run.read()
    assert record.state == "finished"
    assert record.rehearsal is True
    assert record.gpus_used == 2
    assert parallelism(run) == ENGINES[profile]  # told by the objects that divide it, and checked as it began
    peaks = [record["peak_gib_by_rank"] for record in run.read_metrics() if "peak_gib_by_rank" in record]
    assert [len(of_ranks) for of_ranks in peaks] == [2] * len(peaks)
    assert record.summary.peak_memory == max(map(max, peaks))
    for kind in ("loss", "eval_loss_per_token"):
        expected, actual = losses(alone, kind), losses(run, kind)
        assert {step: actual[step] for step in expected} == pytest.approx(expected, abs=CLOSE)
    before = [losses(one, "eval_loss_per_token")[0] for one in (alone, run)]
    assert before[0] == pytest.approx(before[1], abs=1e-4)
    assert record.summary.eval_tokens == alone.read().summary.eval_tokens is not None
    assert abs(losses(alone, "eval_loss")[0] - losses(run, "eval_loss")[0]) > 1e-4  # Axolotl's own
    assert max(losses(alone, "loss").values()) - min(losses(alone, "loss").values()) > 5 * CLOSE
    changed = {difference.key: (difference.run, difference.source) for difference in record.differences}
    divided = Source("gpus", "--gpus 2", "keeps the number of rows per step")
    assert changed["gradient_accumulation_steps"] == (2, divided)
    if profile == "fsdp2":
        assert changed["optimizer"] == ("adamw_torch_fused", Source("profile", "fsdp2"))
    else:
        assert "optimizer" not in changed


def logits(adapter: Path | None, model: Path, merged: bool = False) -> torch.Tensor:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    of_model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    if adapter:
        of_model = PeftModel.from_pretrained(of_model, adapter)
    if merged:
        of_model = of_model.merge_and_unload()
    with torch.no_grad():
        result: torch.Tensor = of_model(torch.arange(5, 205)[None]).logits
    return result


def test_every_engine_leaves_an_ordinary_adapter(alone, divided, tiny):
    _, run = divided
    expected = logits(alone.output, tiny)
    assert (expected - logits(None, tiny)).abs().max() > 10 * CLOSE
    for merged in (False, True):
        torch.testing.assert_close(logits(run.output, tiny, merged), expected, atol=CLOSE, rtol=0)


def test_two_nodes_train_like_one_process(alone, place, tiny_profile, slurm):
    """Each node's torchrun starts one rank; near its time limit the job stops them in order and goes on later."""
    words = rehearsal(tiny_profile, "nodes", "--profile", "fsdp2", "--nodes", "2", "--on", "slurm")
    run = RunDir(place / finish(start(place, *words)))
    wait_until(lambda: run.summary(run.read()).step >= 3)
    (job,) = (one.id for one in run.jobs() if one.step == "run")
    slurm.ask("scancel", "--batch", "--signal=USR1", job)  # as SLURM does near a time limit
    slurm.wait_until_empty()
    record = run.read()
    assert record.state == "finished", run.log.read_text()
    assert record.nodes == 2
    assert record.gpus_used == 1
    assert parallelism(run) == "FSDP"
    warned, last = record.launches
    assert "--nnodes=2" in warned.command and warned.exit_code == 0 and last.resumed_from
    assert (run.path / "node-1.log").is_file()
    expected, actual = losses(alone, "loss"), losses(run, "loss")
    assert {step: actual[step] for step in expected} == pytest.approx(expected, abs=CLOSE)
    (difference,) = (one for one in record.differences if one.key == "gradient_accumulation_steps")
    assert difference.source == Source("gpus", "--gpus 1 --nodes 2", "keeps the number of rows per step")
