"""How the command ends where it cannot print, and what it prints of texts that strangers wrote."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import RECIPE

ESCAPE = "\x1b[2J\x1b]0;owned\x07\u202e"


def shell(line: str, place: Path, **env: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        ["sh", "-c", line], cwd=place, env=os.environ | env, capture_output=True, text=True, errors="replace"
    )


@pytest.mark.parametrize(
    ("line", "code", "says"),
    [
        (f"{RECIPE} list > /dev/full", 1, "recipe: standard output"),
        (f"{RECIPE} list | head -1", 0, ""),
        (f"{RECIPE} score p.jsonl --out /dev/full", 1, "recipe: /dev/full:"),
        *((f"{RECIPE} {words} >&-", 0, "") for words in ("list", "score p.jsonl")),
        (f"{RECIPE} results 2>&-", 0, ""),  # messages reach nobody, rather than stdout
        # without `make coverage`, which could not write either
        (f"ulimit -f 0; COVERAGE_PROCESS_CONFIG= {RECIPE} new x --from code-llama-7b", 1, "recipe: variants/x.yaml:"),
        (f"ulimit -v 1000000; {RECIPE} plan code-llama-7b --gpu T4 --set lora_r=7", 1, "recipe: out of memory"),
    ],
)
def test_what_cannot_be_printed_or_written_ends_with_a_line(tmp_path, line, code, says):
    (tmp_path / "p.jsonl").write_text('{"reference": "a b", "prediction": "a b"}\n')
    done = shell(line, tmp_path)
    assert (done.returncode, says in done.stderr, "Traceback" in done.stderr) == (code, True, False), done.stderr
    assert "2>&-" not in line or done.stdout == ""


def test_a_terminal_of_another_encoding_gets_question_marks(tmp_path):
    done = shell(f"{RECIPE} list", tmp_path, PYTHONIOENCODING="latin-1")
    assert done.returncode == 0 and "?" in done.stdout and "Traceback" not in done.stderr


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
    assert process.stdout and process.stdout.readline() == "begun\n"
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
            assert not set(text) & set("\x1b\x07\u202e"), (done.args, text)


@pytest.mark.parametrize("name", ["...yaml", "\x1b[2J.yaml"])
def test_a_file_whose_runs_would_lie_elsewhere_is_refused(tmp_path, recipe, name):
    (tmp_path / name).write_text("base_model: x\n")
    refused = recipe.fails("run", f"./{name}", "--rehearse")
    assert refused.stderr
    assert [file.name for file in tmp_path.iterdir()] == [name]
