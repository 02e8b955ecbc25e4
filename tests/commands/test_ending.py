"""The end of a command that cannot print, and the printed part of texts that strangers wrote."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import RECIPE

from qlora_recipes import cli

ESCAPE = "\x1b[2J\x1b]0;owned\x07\u202e"


NAME = "haider2024/code-llama-7b"


@pytest.fixture
def place(place: Path) -> Path:
    """A folder with a file of predictions."""
    (place / "p.jsonl").write_text('{"reference": "a b", "prediction": "a b"}\n')
    return place


def shell(line: str, place: Path, **env: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        ["sh", "-c", line], cwd=place, env=os.environ | env, capture_output=True, text=True, errors="replace"
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (f"{RECIPE} list > /dev/full", "standard output, or a folder for temporary files: no space left"),
        (f"{RECIPE} score p.jsonl --metric bleu4 --out /dev/full", "/dev/full: no space left"),
        # without `make coverage`, which could not write either
        (f"ulimit -f 0; COVERAGE_PROCESS_CONFIG= {RECIPE} new x --from {NAME}", "variants/x.yaml: File too large"),
    ],
)
def test_what_cannot_be_written_ends_with_code_1_and_one_message(place, line, message):
    done = shell(line, place)
    assert done.returncode == 1
    assert done.stderr == f"recipe: {message}\n"


@pytest.mark.parametrize("error", [MemoryError(), ImportError("libtorch.so: failed to map segment from shared object")])
def test_too_little_memory_ends_with_a_message(capsys, error):
    def fill() -> None:
        raise error

    assert cli.exit_code(fill) == 1
    assert capsys.readouterr().err == "recipe: out of memory; free some, or raise the limit\n"


@pytest.mark.parametrize(
    ("line", "stderr"),
    [
        (f"{RECIPE} list | true", ""),  # as with `head -1`, but certainly before the last line is written
        (f"{RECIPE} list >&-", "next: recipe run start/qlora --rehearse\n"),
        (f"{RECIPE} score p.jsonl --metric bleu4 >&-", ""),
        (f"{RECIPE} results 2>&-", ""),  # messages reach nobody, rather than stdout
    ],
)
def test_a_closed_stream_is_no_error(place, line, stderr):
    done = shell(line, place)
    assert done.returncode == 0
    assert done.stderr == stderr


def test_a_terminal_of_another_encoding_gets_question_marks(place):
    encoded = shell(f"{RECIPE} list", place, PYTHONIOENCODING="latin-1")
    assert encoded.returncode == 0
    assert encoded.stdout == shell(f"{RECIPE} list", place).stdout.replace("–", "?")


def test_sigterm_removes_what_is_half_written(tmp_path):
    script = """if True:
        import sys, time
        from pathlib import Path
        from qlora_recipes import cli
        from qlora_recipes.base.files import replacing

        def write(*_, **__):
            with replacing(Path("new/f")):
                print("begun", flush=True)
                time.sleep(60)

        cli.app = write
        sys.exit(cli.main())"""
    process = subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stdout.readline() == "begun\n"
    process.terminate()
    assert process.wait(30) == 128 + signal.SIGTERM
    assert [*tmp_path.glob("new/*")] == []
    process.stdout.close()


def test_what_a_terminal_would_obey_does_not_reach_it(tmp_path, recipe):
    escaped = ESCAPE.encode("unicode_escape").decode()
    (tmp_path / "r.yaml").write_text(f'base_model: "{escaped}"\n"{escaped}": 1\n')
    row = {"reference": "a", "prediction": "b", "lang": ESCAPE}
    (tmp_path / "p.jsonl").write_text(f"{json.dumps(row)}\n{json.dumps(row | {'lang': 'c'})}\n")
    printed = [recipe("check", "r.yaml"), recipe("score", f"{ESCAPE}.jsonl")]
    for done in printed:
        for text in (done.stdout, done.stderr):
            assert set(text) & set("\x1b\x07\u202e") == set()


@pytest.mark.parametrize("name", ["...yaml", "\x1b[2J.yaml"])
def test_a_file_whose_runs_would_lie_elsewhere_is_refused(tmp_path, recipe, name):
    (tmp_path / name).write_text("base_model: x\n")
    refused = recipe.fails("run", f"./{name}", "--rehearse")
    assert refused.stderr
    assert [file.name for file in tmp_path.iterdir()] == [name]
