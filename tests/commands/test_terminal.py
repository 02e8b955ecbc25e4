"""Tables as one sees them: every verb that prints one, in pseudo-terminals of 80 and 120 columns."""

import fcntl
import io
import json
import os
import pty
import re
import struct
import sys
import termios
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import recorded_runs
from conftest import SAMPLE, SMALL
from hypothesis import given
from hypothesis import strategies as st
from run_folders import a_run

from qlora_recipes import cli
from qlora_recipes.running.sweeps import Sweep, SweepMember
from qlora_recipes.runs.rundir import Summary
from qlora_recipes.terminal import tables

LONG = "llama-3.2-3b-with-a-name-as-long-as-people-give-them-who-try-things"
CODE_LLAMA = "haider2024/code-llama-7b"
RUNS = {f"20261125-1{i}1500-abc12{i}": f"haider2024/{name}" for i, name in enumerate(["llama-3.2-3b", "llama-3-8b"])}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a variant of a long name, and runs of it and of recipes, evaluated, two of them in a sweep."""
    folder = tmp_path_factory.mktemp("place")
    ended = Summary(
        train_seconds=9000, peak_memory=7.5, memory_kind="GPU, reserved", tokens_per_second=812.0, step=1200,
        max_steps=1200, eval_loss_per_token=1.8123, eval_loss_per_token_first=2.5012,
    )  # fmt: skip
    changed = {"num_epochs": 7, "lora_dropout": 0.1, "learning_rate": 0.0001, "gradient_accumulation_steps": 8}
    runs = folder / "runs"
    made = [a_run(runs, recipe, name, 5.25, summary=ended) for name, recipe in RUNS.items()]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        (folder / "small").mkdir()
        (folder / "small" / "config.json").write_text(json.dumps(SMALL | {"max_position_embeddings": 2048}))
        assert cli.main(["new", LONG, "--from", CODE_LLAMA, "--set", "num_epochs=7", "--set", "sequence_len=512"]) == 0
        file = Path("variants", f"{LONG}.yaml")
        small = file.read_text().replace("codellama/CodeLlama-7b-hf", str(folder / "small"))
        file.write_text(re.sub("(?m)^revision_of_model.*\n", "", small))
        variant = {"set": changed, "variant_of": CODE_LLAMA}
        made.append(a_run(runs, LONG, "20261126-101500-abc125", 5.5, summary=ended, **variant))
        cards = [recorded_runs.RTX_4090] * 2
        for run in made[1:]:  # one of a recipe, and one of a variant, in the ledger of this folder
            recorded_runs.recorded(recorded_runs.completed(run, cards))
    made.append(a_run(runs, CODE_LLAMA, "20261126-111500-abc126", 0.05, summary=ended, rehearsal=True))
    for run in made[:2]:
        rows = [
            {"row": i, "idx": i, "lang": "py", "reference": "Is this line needed?", "prediction": "Why?"}
            for i in range(9)
        ]
        (run.path / "predictions.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    members = [
        SweepMember(name=f"lora_r={rank} lora_target_modules=[q_proj, k_proj, v_proj, o_proj]", values={"lora_r": rank},
                    digest=f"member-{rank}")
        for rank in (8, 16)
    ]  # fmt: skip
    a_run(runs, CODE_LLAMA, "20261126-121500-abc127", 5.4, summary=ended, digest="member-8")
    Sweep(name="ranks", recipe=CODE_LLAMA, rehearsal=False, keys=["lora_r"], members=members).write(runs)
    return folder


def in_terminals(place: Path, widths: Sequence[int], *words: str) -> list[list[str]]:
    """The lines that a command writes to terminals of these widths, without colours.

    It runs in one copy of this process for all of them, as nothing is imported anew there.
    """
    child, terminal = pty.fork()
    if not child:
        os.chdir(place)
        os.environ.pop("COLUMNS", None)
        sys.stdout = os.fdopen(1, "w")
        sys.stderr = (place / "stderr").open("w", 1)  # open until this process ends
        code = 1
        try:
            for width in widths:
                fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
                code = cli.main(words)
                sys.stdout.write("\f")
                sys.stdout.flush()
        finally:
            os._exit(code)
    written = b""
    with suppress(OSError):  # the terminal's other end is closed
        while piece := os.read(terminal, 65536):
            written += piece
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, (place / "stderr").read_text()
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", written.decode())
    return [part.splitlines() for part in text.split("\f")[:-1]]


COMMANDS = {
    "list": [LONG, f"variant of: {CODE_LLAMA}", "haider2024/as-released/llama-3-8b"],
    "list --variants": [CODE_LLAMA],
    f"diff {CODE_LLAMA} haider2024/llama-3.2-3b": ["revision_of_model", "6c284d1468fe6c413cf56183e69b194dcfa27fe6"],
    "results": [*RUNS, "20261126-101500-abc125", "haider2024/llama-3.2-3b"],
    "results --study haider2024": [CODE_LLAMA, "haider2024/llama-2-7b"],
    "results --ledger": ["haider2024/llama-3-8b", CODE_LLAMA],
    "results --sweep ranks": ["lora_r=8", "lora_r=16"],
    f"results --compare {' '.join(RUNS)}": ["bleu4"],
    f"results --by lang --run {next(iter(RUNS))}": ["py"],
    f"data prepare {SAMPLE} --out a/folder/for/prepared/rows": ["train.jsonl", "test.jsonl"],
    f"plan {LONG} --gpu T4": ["embed_tokens", "needed", "T4"],
    f"plan {LONG} variants/{LONG}.yaml": [LONG],
    f"plan {LONG} --compare": ["full", "LoRA", "QLoRA"],
}
IMPORT_MUCH = {
    "check --data --rehearse haider2024/llama-3.2-3b": ["train.jsonl", "valid.jsonl"],
    "analyze quantization --synthetic": ["nf4 + double"],
    f"analyze lora {CODE_LLAMA}": ["codellama/CodeLlama-7b-hf"],
    f"sweep {CODE_LLAMA} --set lora_r=8,16 --rehearse --dry-run": ["lora_r=8", "lora_r=16"],
    "reproduce haider2024 --only code-llama-7b --dry-run --gpu T4": [CODE_LLAMA],
}


@pytest.mark.parametrize(
    ("command", "names"),
    [*COMMANDS.items(), *(pytest.param(*item, marks=pytest.mark.long) for item in IMPORT_MUCH.items())],
)
def test_tables_fit_the_terminal_and_keep_names_whole(
    command: str, names: list[str], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = command.split()
    with monkeypatch.context() as patch:
        patch.chdir(place)
        assert words[0] != "plan" or cli.main(words) == 0  # kept from here on: a copied process cannot trace
    for width, lines in zip((80, 120), in_terminals(place, (80, 120), *words), strict=True):
        assert [line for line in lines if len(line) > width] == []
        for name in names:
            assert any(name in line for line in lines), (name, lines)


def test_a_number_a_text_like_it_and_what_a_terminal_would_obey(capsys: pytest.CaptureFixture[str]) -> None:
    tables.print_table([{"a": 0.05, "b": "\x1b[31mred\n"}, {"a": "0.05", "b": None}])
    assert capsys.readouterr().out == "   a  b\n0.05   [31mred\n0.05  –\n"


NAMES = st.text("abcdefg/-_", min_size=1, max_size=60)
VALUES = st.none() | st.text("xyz /", min_size=1, max_size=60) | st.floats(-1e4, 1e4) | st.integers(0, 10**6)


@given(
    columns=st.lists(st.text("KLMNOPQRST", min_size=1, max_size=12), min_size=1, max_size=9, unique=True),
    data=st.data(),
    width=st.integers(64, 160),
)
def test_any_table_fits_and_shows_or_names_every_column(columns: list[str], data: st.DataObject, width: int) -> None:
    rows: list[dict[str, Any]] = [
        {columns[0]: data.draw(NAMES)} | {column: data.draw(VALUES) for column in columns[1:]} for _ in range(3)
    ]
    others = st.lists(st.sampled_from(columns[1:]), unique=True) if columns[1:] else st.just([])
    spare, below = data.draw(others), data.draw(others)
    with pytest.MonkeyPatch.context() as patch:
        said = io.StringIO()
        patch.setattr(said, "isatty", lambda: True)
        patch.setattr(sys, "stdout", said)
        patch.setenv("COLUMNS", str(width))
        tables.print_table(rows, spare=spare, below=below)
    lines = re.sub(r"\x1b\[[0-9;]*m", "", said.getvalue()).splitlines()
    assert [line for line in lines if len(line) > width] == []
    shown = "".join(lines)
    for column in columns:
        assert column in shown or all(row[column] is None for row in rows)
    for row in rows:
        assert any(line.startswith(row[columns[0]]) for line in lines)
