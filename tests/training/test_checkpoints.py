from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from run_folders import ADAPTER, a_checkpoint

from qlora_recipes.base.files import read_json
from qlora_recipes.base.run_files import RunFile
from qlora_recipes.training import checkpoints
from qlora_recipes.training.run_plugin import RunCallback

DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "cut off": lambda content: content[:-100],
    "empty": lambda content: b"",
    "zeros within": lambda content: content[:1000] + bytes(1000) + content[2000:],
    "all zeros": lambda content: bytes(len(content)),
}


@pytest.mark.parametrize("damage", [*DAMAGES, "gone"])
@pytest.mark.parametrize("name", [ADAPTER, "optimizer.pt", "rng_state.pth", RunFile.MANIFEST])
def test_a_damaged_file_is_named(tmp_path, name, damage):
    folder = a_checkpoint(tmp_path, 4)
    assert checkpoints.damage(folder, ranks=1) is None
    content = (file := folder / name).read_bytes()
    file.unlink()
    if damage in DAMAGES:
        file.write_bytes(DAMAGES[damage](content))
    assert (checkpoints.damage(folder, ranks=1) or "").startswith(f"{name} ")


def test_a_run_saves_manifests(tmp_path):
    folder = a_checkpoint(tmp_path / "output", 4)
    (folder / RunFile.MANIFEST).unlink()
    state = SimpleNamespace(is_world_process_zero=True, global_step=4)
    RunCallback(tmp_path / "metrics.jsonl", None, None).on_save(
        SimpleNamespace(output_dir=str(folder.parent), device=torch.device("cpu")), state, None
    )
    listed = read_json(folder / RunFile.MANIFEST)["files"]
    assert listed.keys() == {ADAPTER, "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}


def test_files_of_each_rank_and_of_the_manifest_count_and_the_step_is_that_of_the_name(tmp_path):
    folder = a_checkpoint(tmp_path, 4, ranks=2)
    assert checkpoints.damage(folder, ranks=2) is None
    assert "rng_state_2.pth" in (checkpoints.damage(folder, ranks=3) or "")
    (folder / "scaler.pt").touch()
    checkpoints.write_manifest(folder)
    (folder / "scaler.pt").unlink()
    assert "scaler.pt" in (checkpoints.damage(folder, ranks=2) or "")
    folder = a_checkpoint(tmp_path, 5).rename(tmp_path / "checkpoint-6")
    assert "trainer_state.json" in (checkpoints.damage(folder, ranks=1) or "")
