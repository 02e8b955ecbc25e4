"""Finds words that the style of this project rules out: `make lint` calls it. Exit code 1 if there are any."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

DOCSTRING = re.compile(r'^\s*"""(?:What|Which|That|Those|Whether|How)\b', re.MULTILINE)
JINJA = re.compile(r"{%.*?%}|{{.*?}}")  # code in a template
PHRASE = re.compile(r"\b(?:(?<!there )(?:is|are) none|what of|is said|are told)\b")


def found(file: Path) -> Iterator[str]:
    """Each place in a file with such words."""
    text = JINJA.sub("", file.read_text())
    for match in [*PHRASE.finditer(text), *(DOCSTRING.finditer(text) if file.suffix == ".py" else ())]:
        line = text.count("\n", 0, match.end()) + 1
        yield f"{file}:{line}: {' '.join(match[0].split()[-3:])}: use a noun or a verb, in the active voice"


def main() -> int:
    """Search the files that git knows, but for tests and changes."""
    listed = subprocess.run(["git", "ls-files", "*.py", "*.md", "*.j2"], capture_output=True, text=True, check=True)
    names = [name for name in listed.stdout.split() if not name.startswith(("tests/", "CHANGELOG", "tools/words"))]
    lines = [line for name in names for line in found(Path(name))]
    print(*lines, sep="\n", end="\n" * bool(lines))
    return bool(lines)


if __name__ == "__main__":
    sys.exit(main())
