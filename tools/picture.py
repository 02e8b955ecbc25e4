"""Draws the README's pictures in docs/, light and dark: `make demo picture`. Needs chromium and script(1)."""

import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import DEFAULT_TERMINAL_THEME, DIMMED_MONOKAI, TerminalTheme
from rich.text import Text

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
RECIPE = Path(sys.executable).with_name("recipe")
WIDTH = 80
COMMANDS = (
    ["check", "haider2024/llama-3-8b", "--rehearse", "--set", "lora_droput=0.1"],
    ["plan", "haider2024/llama-3-8b", "haider2024/llama-3.2-3b", "--gpu", "T4"],
    ["reproduce", "haider2024", "--stage", "predictions", "--metric", "bertscore:none"],
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
HIDDEN = "#overview, #scores, #settings, #provenance, .contents, footer, [data-figure=norm], [data-figure=speed], "
HIDDEN += "details, #filters, .keys, .tools, figure .note"
"""Parts of a report that its picture leaves out."""
INVERTED = '<body style="margin:0;background:#0d1117"><img src="{}" style="filter:invert(.93) hue-rotate(180deg)">'
"""A page with a figure on black. Its colours keep their hues."""


def in_terminal(words: list[str]) -> str:
    """The output of a command, without its messages, in a terminal, which `script` emulates."""
    command = f"stty cols {WIDTH}; {shlex.join([str(RECIPE), *words])} 2> {os.devnull}"
    done = subprocess.run(["script", "--quiet", "--command", command, os.devnull], cwd=ROOT, capture_output=True)
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-ln-z]", "", done.stdout.decode()).splitlines()  # keeps colours only
    return "\n".join(lines).strip()


def draw_terminal() -> None:
    """Draw the commands and what they print."""
    printed = [(words, Text.from_ansi(in_terminal(words))) for words in COMMANDS]
    themes: dict[str, TerminalTheme] = {"terminal": DEFAULT_TERMINAL_THEME, "terminal-dark": DIMMED_MONOKAI}
    for name, theme in themes.items():
        console = Console(record=True, width=WIDTH, file=io.StringIO(), highlight=False)
        for words, text in printed:
            console.print(Text(f"$ recipe {shlex.join(words)}", "bold green"))
            console.print(text, end="\n\n")
        svg = console.export_svg(title="recipe", theme=theme, code_format=SVG, unique_id=name)
        (DOCS / f"{name}.svg").write_text(svg)


def photograph(page: str, picture: Path, size: str, dark: bool) -> None:
    """Write a picture of an HTML page in a browser."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "page.html"
        file.write_text(page)
        browser = shutil.which("chromium") or "google-chrome"
        options = ["--headless", "--no-sandbox", "--hide-scrollbars", "--virtual-time-budget=8000", "--disable-gpu"]
        options += ["--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
        options += [f"--blink-settings=preferredColorScheme={int(not dark)}"]
        command = [browser, *options, f"--window-size={size}", f"--screenshot={picture}", file.as_uri()]
        subprocess.run(command, check=True, capture_output=True)


def main() -> None:
    draw_terminal()
    report = (ROOT / "report.html").read_text()
    shortened = report.replace("</head>", f"<style>{HIDDEN} {{ display: none !important }}</style></head>", 1)
    photograph(shortened, DOCS / "report.png", "1000,1260", dark=False)
    photograph(shortened, DOCS / "report-dark.png", "1000,1260", dark=True)
    inverted = INVERTED.format((DOCS / "qlora.png").as_uri())
    photograph(inverted, DOCS / "qlora-dark.png", "911,408", dark=True)


if __name__ == "__main__":
    main()
