"""Draws recipes/terminal.svg, the picture of a terminal in the README: `make picture`."""

import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).resolve().parents[1]
RECIPE = Path(sys.executable).with_name("recipe")
WIDTH = 80
COMMANDS = (
    ["diff", "haider2024/code-llama-7b", "haider2024/llama-3.2-3b"],
    ["check", "haider2024/llama-3-8b", "--rehearse", "--set", "lora_droput=0.1"],
    ["plan", "haider2024/llama-3-8b", "haider2024/llama-3.2-3b", "--gpu", "T4"],
)
# rich's own, but for its fonts, which it would load from the network
SVG = """<svg viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<style>.{unique_id}-matrix {{ font-family: ui-monospace, Menlo, Consolas, monospace; font-size: {char_height}px;
line-height: {line_height}px }} {styles}</style>
<defs><clipPath id="{unique_id}-clip-terminal"><rect width="{terminal_width}" height="{terminal_height}"/></clipPath>
{lines}</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">{backgrounds}
<g class="{unique_id}-matrix">{matrix}</g></g>
</svg>
"""


def in_terminal(words: list[str]) -> str:
    """The output of a command in a terminal, which `script` emulates."""
    command = f"stty cols {WIDTH}; {shlex.join([str(RECIPE), *words])}"
    done = subprocess.run(["script", "--quiet", "--command", command, os.devnull], cwd=ROOT, capture_output=True)
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-ln-z]", "", done.stdout.decode()).splitlines()  # but for colours
    return "\n".join(line for line in lines if "━" not in line).strip()  # nor does a terminal keep a bar


def main() -> None:
    """Run the commands and draw what they write."""
    console = Console(record=True, width=WIDTH, file=io.StringIO(), highlight=False)
    for words in COMMANDS:
        console.print(Text(f"$ recipe {' '.join(words)}", "bold green"))
        console.print(Text.from_ansi(in_terminal(words)), end="\n\n")
    file = ROOT / "recipes" / "terminal.svg"
    file.write_text(console.export_svg(title="recipe", code_format=SVG, unique_id="terminal"))
    print(file)


if __name__ == "__main__":
    main()
