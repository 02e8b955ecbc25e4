"""A recipe is an ordinary Axolotl config: it trains without this project's package."""

import subprocess
import sys

import pytest

from qlora_recipes.base import paths

# `axolotl`, in an interpreter to which this project's package does not exist
AXOLOTL = "import sys; sys.modules['qlora_recipes'] = None; from axolotl.cli.main import main; main()"


@pytest.mark.long
def test_a_recipe_trains_with_plain_axolotl(tmp_path, tiny, sample):
    folder = tmp_path / "data" / "codereviewer"
    folder.mkdir(parents=True)
    for name, rows in (("train", 16), ("valid", 4)):
        lines = (sample / f"{name}.jsonl").read_bytes().splitlines(keepends=True)
        (folder / f"{name}.jsonl").write_bytes(b"".join(lines[:rows]))
    file = paths.RECIPES / "haider2024" / "llama-3.1-8b.yaml"
    overrides = ["--base-model", str(tiny), "--output-dir", "out", "--no-fp16"]
    command = [sys.executable, "-c", AXOLOTL, "train", str(file), *overrides, "--launcher", "python"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    assert "eval_loss" in done.stdout + done.stderr
