import signal
from pathlib import Path

import numpy as np
import psutil
import pytest
from conftest import finish, start, wait_until
from run_folders import ADAPTER, a_run
from safetensors import numpy as arrays

from qlora_recipes.results import publish
from qlora_recipes.run.rundir import RunDir

NAME = "haider2024/code-llama-7b"
STOPS = [(signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)]


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run that was merged, and has trained on since."""
    folder = a_run(tmp_path / "runs", NAME, "one", 10.0)
    (folder.output / "merged").mkdir(parents=True)
    (folder.output / "merged" / "model.safetensors").write_bytes(b"former")
    arrays.save_file({"lora_A": np.ones((8, 4), np.float32)}, folder.output / ADAPTER)
    (folder.output / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/model", "r": 8}')
    return folder


@pytest.mark.long
@pytest.mark.parametrize(("by", "code"), STOPS)
def test_a_merge_that_is_stopped_leaves_no_process_and_no_half_a_model(tmp_path, fake_axolotl, run, by, code):
    merged = run.output / "merged" / "model.safetensors"
    words = ("publish", run.path, "--merge")
    process = start(tmp_path, *words, command=fake_axolotl, FAKE_GO=str(tmp_path / "go"))
    try:
        wait_until(lambda: [*run.output.glob(".merged.part/merged/*.safetensors")], process)  # half of a model
        child = psutil.Process(process.pid).children()
        process.send_signal(by)
        process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == code
    assert psutil.wait_procs(child, timeout=30)[1] == []
    assert not merged.exists() and (by == signal.SIGKILL or not (run.output / ".merged.part").exists())
    finish(start(tmp_path, *words, command=fake_axolotl))
    assert merged.read_bytes() == b"halfother half"
    assert {path.name for path in merged.parent.iterdir()} == {merged.name, publish.MADE_FROM, publish.CARD}
    assert not (run.output / ".merged.part").exists()
