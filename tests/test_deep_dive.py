"""docs/qlora.ipynb: its committed outputs are clean, agree with its text, and come out again."""

import copy
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import nbformat
import notebook
import pytest
from nbformat import NotebookNode

COMMITTED = nbformat.read(notebook.QLORA, as_version=4)
CODE = [cell for cell in COMMITTED.cells if cell.cell_type == "code"]
NUMBER = re.compile(r"(?<![\w.])[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?![\w.]*\d)")
OF_A_TRAINING = re.compile(r"api\.run\(")
"""Losses differ with the processor's arithmetic, and memory from run to run."""


def printed(cell: NotebookNode) -> str:
    """The text of a cell's outputs."""
    texts = []
    for output in cell.outputs:
        texts.append(output.text if output.output_type == "stream" else output.data["text/plain"])
    return "\n".join(texts)


def stderr(of: NotebookNode) -> list[NotebookNode]:
    """Warnings and progress bars in the outputs of a notebook."""
    outputs = [output for cell in of.cells for output in cell.get("outputs", ())]
    return [output for output in outputs if output.get("name") == "stderr"]


def numbers(text: str) -> list[str]:
    return [number.replace(",", "") for number in NUMBER.findall(text)]


def differs(number: str, another: str, tolerance: float) -> bool:
    """True if two printed numbers differ: integers at all, decimals by more than a share."""
    if "." not in number:
        return number != another
    return float(another) != pytest.approx(float(number), rel=tolerance, abs=0.0002)


def differences(of: NotebookNode, to: NotebookNode) -> Iterator[str]:
    """Numbers in the outputs of a notebook that another one has otherwise."""
    for cell, other in zip(of.cells, to.cells, strict=True):
        if cell.cell_type == "code":
            tolerance = 0.05 if OF_A_TRAINING.search(cell.source) else 0.005
            before, after = numbers(printed(cell)), numbers(printed(other))
            if len(before) != len(after):
                yield f"{cell.id}: {len(before)} numbers, {len(after)} numbers"
            for number, another in zip(before, after, strict=False):
                if differs(number, another, tolerance):
                    yield f"{cell.id}: {number}, {another}"


def test_all_cells_were_executed_in_order():
    assert [cell.execution_count for cell in CODE] == list(range(1, len(CODE) + 1))
    assert COMMITTED.metadata == notebook.KERNEL
    assert [cell.id for cell in CODE if set(cell.metadata) - {"tags"}] == []


def test_no_output_is_a_warning_or_names_a_path_of_the_machine():
    assert stderr(COMMITTED) == []
    paths = [path for cell in CODE for path in re.findall(r"(?<![\w:./])/\w+/\S*", printed(cell))]
    assert paths == []


def test_imports_of_the_project_work():
    lines = [line for cell in CODE for line in cell.source.splitlines() if line.startswith("from qlora_recipes")]
    assert len(lines) > 1
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True)


def test_the_picture_is_the_figure_in_the_notebook():
    assert notebook.PICTURE.read_bytes() == notebook.picture(COMMITTED)


def test_decimals_in_the_text_are_in_an_output():
    outputs = {abs(float(number)) for cell in CODE for number in numbers(printed(cell))}
    wrong = []
    for cell in COMMITTED.cells:
        if cell.cell_type == "markdown":
            for text in re.findall(r"(?<![\w./])\d+\.\d+(?![\w./]*\d)", re.sub(r"\(.*?\)|\[.*?\]", "", cell.source)):
                digits = len(text.partition(".")[2])
                if not any(round(number, digits) == float(text) for number in outputs):
                    wrong.append(f"{cell.id}: {text}")
    assert wrong == []


@pytest.mark.parametrize(
    ("cell_id", "right", "wrong"),
    [
        ("quantization-7", "4.127", "4.217"),
        ("lora-6", "33554432", "33554342"),
        ("memory-2", "80.67", "86.07"),
        ("training-2", "10 steps", "11 steps"),
    ],
)
def test_a_wrong_number_is_found(cell_id, right, wrong):
    planted = copy.deepcopy(COMMITTED)
    (cell,) = (cell for cell in planted.cells if cell.id == cell_id)
    for output in cell.outputs:
        texts = output if output.output_type == "stream" else output.data
        key = "text" if output.output_type == "stream" else "text/plain"
        texts[key] = texts[key].replace(right, wrong)
    assert list(differences(COMMITTED, COMMITTED)) == []
    assert {difference.partition(":")[0] for difference in differences(COMMITTED, planted)} == {cell_id}


@pytest.mark.long
def test_the_notebook_gives_the_committed_numbers_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    again = copy.deepcopy(COMMITTED)
    for cell in again.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    notebook.execute(again)
    assert list(differences(COMMITTED, again)) == []
    assert stderr(again) == []
    assert list(Path.cwd().iterdir()) == []
