"""Finds words that the style of this project rules out: `make lint` calls it. Exit code 1 if there are any.

Usage: tools/words.py [PREFIX ...]; a prefix such as scripts/base selects files; by default, all that git knows.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

DOCSTRING = re.compile(r'^\s*"""(?:What|Which|That|Those|Whether|How)\b', re.MULTILINE)
JINJA = re.compile(r"{%.*?%}|{{.*?}}")  # code in a template
PHRASE = re.compile(r"\b(?:(?<!there )(?:is|are) none|what of|is said|are told)\b")
VARIABLES = {"found", "own", "known", "given", "made", "named", "each", "every", "there", "begun", "whole", "others"}
VARIABLES |= {"of_study", "usual", "kept", "anew"}
"""Names that do not say which thing a variable or parameter is."""
FUNCTIONS = {"of", "at", "usual", "kept", "anew", "of_all", "find_any"}
"""Names that say neither what a function does nor what it returns."""
UNSEARCHED = ("CHANGELOG", "tools/words.py")


def phrases(file: Path, text: str) -> Iterator[str]:
    """Places with phrases that are not plain, and with docstrings that begin with such a word."""
    plain_text = JINJA.sub("", text)
    matches = [*PHRASE.finditer(plain_text)]
    if file.suffix == ".py":
        matches += DOCSTRING.finditer(plain_text)
    for match in matches:
        line = plain_text.count("\n", 0, match.end()) + 1
        yield f"{file}:{line}: {' '.join(match[0].split()[-3:])}: use a noun or a verb, in the active voice"


def names(file: Path, text: str) -> Iterator[str]:
    """Places in Python code where a variable, parameter or function gets a name that says little.

    Fields and methods of classes are left out, because their class says more: `Evaluation.made`, `FileState.of(file)`.
    """
    tree = ast.parse(text)
    members = [statement for node in ast.walk(tree) if isinstance(node, ast.ClassDef) for statement in node.body]
    fields = [member.target for member in members if isinstance(member, ast.AnnAssign)]
    for node in ast.walk(tree):
        if node in members or node in fields:
            continue
        name = ""
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            name = node.id
        elif isinstance(node, ast.arg):
            name = node.arg
        elif isinstance(node, ast.ExceptHandler | ast.MatchAs):
            name = node.name or ""
        elif isinstance(node, ast.alias):
            name = node.asname or ""
        if name in VARIABLES:
            yield f"{file}:{getattr(node, 'lineno', 0)}: {name}: name the thing"
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name in FUNCTIONS:
            yield f"{file}:{node.lineno}: {node.name}(): name what the function does or returns"


def main() -> int:
    """Search the files that git knows, except the changelog."""
    listing = subprocess.run(["git", "ls-files", "*.py", "*.md", "*.j2"], capture_output=True, text=True, check=True)
    prefixes = tuple(sys.argv[1:]) or ("",)
    places: list[str] = []
    for name in listing.stdout.split():
        if not name.startswith(prefixes) or name.startswith(UNSEARCHED):
            continue
        file = Path(name)
        text = file.read_text()
        places += phrases(file, text)
        if file.suffix == ".py":
            places += names(file, text)
    for place in places:
        print(place)
    return int(bool(places))


if __name__ == "__main__":
    sys.exit(main())
