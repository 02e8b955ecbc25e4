import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from conftest import finish, start
from run_folders import ADAPTER, a_run
from safetensors import numpy as arrays
from safetensors import torch as tensors

from qlora_recipes.base.errors import WorkFailed
from qlora_recipes.results.publish import require_applied
from qlora_recipes.runs.rundir import RunDir

NAME = "haider2024/code-llama-7b"
STOPS = [(signal.SIGTERM, 1), (signal.SIGKILL, -signal.SIGKILL)]


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run that was merged, and has trained on since."""
    folder = a_run(tmp_path / "runs", NAME, "one", 10.0)
    (folder.output / "merged").mkdir(parents=True)
    (folder.output / "merged" / "model.safetensors").write_bytes(b"former")
    arrays.save_file({"lora_A": np.ones((8, 4), np.float32)}, folder.output / ADAPTER)
    (folder.output / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/model", "r": 8}')
    return folder


def what_is_in(run: RunDir) -> set[str]:
    """The files of a run that a merge could leave."""
    return {path.name for path in run.path.iterdir()} - {"merge.log", ".merge.lock"}


def wait_until_half(run: RunDir, process: "subprocess.Popen[str]") -> None:
    """Wait until the stand-in has written half a model."""
    deadline = time.monotonic() + 120
    while not [*run.path.glob(".merge*/merged/*.safetensors")]:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.long
@pytest.mark.parametrize(("by", "code"), STOPS)
def test_a_merge_that_is_stopped_leaves_no_process_and_no_half_a_model(
    tmp_path: Path, stand_in: Path, run: RunDir, by: signal.Signals, code: int
) -> None:
    before = what_is_in(run)
    merged = run.output / "merged" / "model.safetensors"
    words = ("publish", run.path, "--merge")
    process = start(tmp_path, *words, command=stand_in, STAND_IN_GO=str(tmp_path / "go"))
    try:
        wait_until_half(run, process)
        child = psutil.Process(process.pid).children()
        process.send_signal(by)
        process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == code
    assert psutil.wait_procs(child, timeout=30)[1] == []
    assert merged.read_bytes() == b"former"
    if by != signal.SIGKILL:
        assert what_is_in(run) == before
    finish(start(tmp_path, *words, command=stand_in))
    assert merged.read_bytes() == b"halfother half"
    assert what_is_in(run) == before


LAYER = "model.layers.0.self_attn.q_proj"


def save(folder: Path, file: str, content: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    tensors.save_file(content, folder / file)
    return folder


@pytest.mark.parametrize(
    ("scale", "names", "in_base", "applied"),
    [
        (0.5, [LAYER], LAYER, True),
        (0.0, [LAYER], LAYER, False),
        (0.5, [LAYER, "other"], LAYER, False),
        (0.5, ["as.the.model.calls.it"], LAYER, True),
        (0.5, [LAYER], "in.another.form", True),
    ],
)
def test_a_merge_has_the_adapters_change(
    tmp_path: Path, scale: float, names: list[str], in_base: str, applied: bool
) -> None:
    torch.manual_seed(0)
    weight, a, b = 0.05 * torch.randn(128, 64), 0.1 * torch.randn(8, 64), 0.02 * torch.randn(128, 8)
    rounded = dequantize_4bit(*quantize_4bit(weight, quant_type="nf4"))
    base = save(tmp_path / "base", "model.safetensors", {f"{in_base}.weight": weight})
    both = {"A": a, "B": b}
    content = {f"base_model.model.{name}.lora_{each}.weight": both[each].clone() for name in names for each in both}
    adapter = save(tmp_path / "adapter", ADAPTER, content)
    merged = save(tmp_path / "merged", "model.safetensors", {f"{LAYER}.weight": rounded + scale * b @ a})
    if applied:
        require_applied(lambda: base, adapter, merged)
    else:
        with pytest.raises(WorkFailed):
            require_applied(lambda: base, adapter, merged)
