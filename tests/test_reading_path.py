"""The reading path of scripts/README.md: short enough to be read in an afternoon."""

import ast
import re
from pathlib import Path

SCRIPTS = Path(__file__).parents[1] / "scripts"
_, PATH, *_ = re.split(r"(?m)^## ", (SCRIPTS / "README.md").read_text())
MODULES = re.findall(r"(?m)^\d+\. `(\S+\.py)`", PATH)


def statements(module: str) -> int:
    nodes = [node for node in ast.walk(ast.parse((SCRIPTS / module).read_text())) if isinstance(node, ast.stmt)]
    texts = [node for node in nodes if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)]
    return sum(not isinstance(node, ast.Import | ast.ImportFrom) for node in nodes) - len(texts)


def test_the_reading_path_is_short() -> None:
    assert PATH.startswith("Reading path") and 15 < len(MODULES) == len(set(MODULES)) <= 25
    assert sum(map(statements, MODULES)) <= 2500
