"""Write docs/free-t4.ipynb from docs/free-t4.md, and execute docs/qlora.ipynb in place: `make notebook`."""

import base64
import re
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

ROOT = Path(__file__).parents[1]
QLORA = ROOT / "docs" / "qlora.ipynb"
PICTURE = QLORA.with_suffix(".png")
T4 = ROOT / "docs" / "free-t4.ipynb"
KERNEL = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
CODE = re.compile(r"^```python\n(.*?)^```\n", re.MULTILINE | re.DOTALL)


def execute(notebook: NotebookNode) -> None:
    """Run a notebook's cells and keep their outputs, without times and Python's version, which change with each run.

    Raises:
        CellExecutionError: a cell fails.
    """
    settings = {"record_timing": False, "coalesce_streams": True, "timeout": None}
    NotebookClient(notebook, kernel_name="python3", **settings).execute()
    notebook.metadata = NotebookNode(KERNEL)


def picture(notebook: NotebookNode) -> bytes:
    """Return the figure (PNG) of the cell with the tag `picture`."""
    (cell,) = (cell for cell in notebook.cells if "picture" in cell.metadata.get("tags", ()))
    (output,) = cell.outputs
    return base64.b64decode(output.data["image/png"])


def of_page(page: str) -> NotebookNode:
    """Return a page as a notebook: its text and its Python blocks, up to the section on time limits."""
    notebook = new_notebook(metadata=KERNEL)
    for index, part in enumerate(CODE.split(page.partition("\n## Time limits")[0])):
        new_cell = new_code_cell if index % 2 else new_markdown_cell
        if part.strip():
            notebook.cells.append(new_cell(part.strip(), id=f"cell-{index}"))
    return notebook


def main() -> None:
    nbformat.write(of_page(T4.with_suffix(".md").read_text()), T4)
    notebook = nbformat.read(QLORA, as_version=4)
    execute(notebook)
    nbformat.write(notebook, QLORA)
    PICTURE.write_bytes(picture(notebook))


if __name__ == "__main__":
    main()
