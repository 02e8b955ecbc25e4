"""Execute docs/qlora.ipynb in place, and write docs/free-t4.ipynb from docs/free-t4.md: `make notebook`."""

import re
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

ROOT = Path(__file__).parents[1]
QLORA = ROOT / "docs" / "qlora.ipynb"
T4 = ROOT / "docs" / "free-t4.ipynb"
KERNEL = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
CODE = re.compile(r"^```python\n(.*?)^```\n", re.MULTILINE | re.DOTALL)


def executed(notebook: NotebookNode) -> NotebookNode:
    """Run the cells of a notebook, which keeps no times and no version of Python.

    Raises:
        CellExecutionError: a cell fails.
    """
    NotebookClient(notebook, kernel_name="python3", timeout=None, record_timing=False).execute()
    notebook.metadata = NotebookNode(KERNEL)
    return notebook


def of_page(page: str) -> NotebookNode:
    """Return a page's text and Python blocks, up to its section on time limits, as a notebook."""
    parts = CODE.split(page.partition("\n## Time limits")[0])
    notebook = new_notebook(metadata=KERNEL)
    for index, part in enumerate(parts):
        if not part.strip():
            continue
        new_cell = new_code_cell if index % 2 else new_markdown_cell
        notebook.cells.append(new_cell(part.strip(), id=f"cell-{index}"))
    return notebook


def picture(notebook: NotebookNode) -> str:
    """Return the figure, in base64, of the cell tagged `picture`."""
    (cell,) = (cell for cell in notebook.cells if "picture" in cell.metadata.get("tags", ()))
    return next(output.data["image/png"] for output in cell.outputs if "data" in output)


def main() -> None:
    nbformat.write(of_page((ROOT / "docs" / "free-t4.md").read_text()), T4)
    notebook = executed(nbformat.read(QLORA, as_version=4))
    nbformat.write(notebook, QLORA)


if __name__ == "__main__":
    sys.exit(main())
