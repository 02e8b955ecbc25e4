"""The documentation and `make demo`: commands parse, links lead somewhere, pages are short and words plain."""

import ast
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from a_card import CARD
from command_line import ALL, COMMANDS, parsed, subcommands

from qlora_recipes.base import paths
from qlora_recipes.base.files import write_rows
from qlora_recipes.config import datafiles
from qlora_recipes.config.compose import Request, compose

ROOT = Path(__file__).parents[1]
SKILL = ROOT / ".agents" / "skills" / "qlora-recipes" / "SKILL.md"
PAGES = [SKILL, *(ROOT / name for name in ("README.md", "AGENTS.md", "CONTRIBUTING.md", "templates/README.md"))]
PAGES += sorted((ROOT / "docs").rglob("*.md"))
FOLDERS = ("docker", "docs", "recipes", "scripts", "templates")
ALL_PAGES = [SKILL, *ROOT.glob("*.md"), *(file for folder in FOLDERS for file in (ROOT / folder).rglob("*.md"))]
SOURCES = [*(ROOT / "scripts").rglob("*.py")]
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(
    r"^(?:\$ |!)?(?:timeout .* 10h )?(?:\.venv/bin/)?(recipe (?!.*--help|--install)\S.*)", re.MULTILINE
)
# options of timeout, sbatch, SkyPilot and the hub
OF_OTHERS = {"--env", "--foreground", "--gres", "--secret", "--secrets", "--timeout"}


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return FENCE.sub("", page.read_text())


def options(command: click.Command) -> set[str]:
    return {option for param in command.params for option in param.opts} | {"--help"}


EXAMPLES = [(named(page), line) for page in PAGES for block in FENCE.findall(page.read_text())
            for line in COMMAND.findall(block)]  # fmt: skip


def test_every_command_in_a_block_of_code_parses(place):
    for name in ("mine.jsonl", "pairs.jsonl"):  # of `recipe new --data`
        (place / name).touch()
    wrong = []
    for page, line in EXAMPLES:
        try:
            parsed(line)
        except click.UsageError as error:
            wrong.append(f"{page}: {line}: {error.format_message()}")
    assert wrong == []
    assert len(EXAMPLES) > 100


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_offline_examples_run_and_print_as_shown(page, recipe, tmp_path):
    """A block that begins with `$ ` shows lines of its command's output."""
    offline = {"diff", "list", "new", "render", "show", "study"}
    chats = {"messages": [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]}
    write_rows(tmp_path / "mine.jsonl", [chats] * 100)
    write_rows(tmp_path / "pairs.jsonl", [{"prompt": "1 + 1?", "chosen": "2", "rejected": "3"}] * 100)
    (tmp_path / "mine.csv").write_text("query;reply\n" + "1 + 1?;2\n" * 100)
    text = (paths.RECIPES / "haider2024" / "llama-3-8b.yaml").read_text()
    for right, wrong in (("weight_decay:", "weight_decai:"), ("- v_proj", "- v_prj"), ("bf16: false", "bf16: true")):
        text = text.replace(right, wrong)
    (tmp_path / "mine.yaml").write_text(text.replace("fp16: true", "fp16: false"))
    (tmp_path / "README.md").write_text(CARD)
    (tmp_path / "lora.yml").write_text(CARD.partition("```yaml\n")[2].partition("```")[0])
    write_rows(tmp_path / "rows.jsonl", [{"instruction": "1 + 1?", "output": "2"}] * 100)
    for block in FENCE.findall(page.read_text()):
        shown = block.splitlines()[2:-1] if block.startswith("```\n$ ") else []
        for line in COMMAND.findall(block):
            word, *words = shlex.split(line, comments=True)[1:]
            if word in offline or shown:
                done = recipe(word, *words)
                assert done.returncode == (2 if word == "check" else 0), (line, done.stderr)
                printed = [row.split() for row in (done.stdout + done.stderr).splitlines()]
                assert [row for row in shown if row.split() not in printed] == [], line


def test_the_program_for_power_prints_the_numbers_below_it():
    (program,) = re.findall(
        r"^```python\n(.*?)^```", (ROOT / "docs" / "how" / "intervals.md").read_text(), re.MULTILINE | re.DOTALL
    )
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert [f"# {line}" for line in printed.splitlines()] == program.splitlines()[-3:]


def unknown(words: list[str]) -> Iterator[str]:
    """Words of a command in running text, which may lack arguments, that are no word or option."""
    command: click.Command = ALL
    for word in words:
        below = subcommands(command)
        if word in below:
            command = below[word]
        elif word.startswith("-"):
            if word.partition("=")[0] not in options(command):
                yield word
        elif below and word.islower():
            yield word


def test_commands_and_options_in_running_text_exist():
    declared = OF_OTHERS.union(*map(options, COMMANDS.values()))
    wrong = []
    for page in PAGES:
        for code in re.findall(r"`([^`]+)`", prose(page)):
            first, *words = code.split()
            if first == "recipe":
                wrong += [f"{named(page)}: {code}: {word}" for word in unknown(words)]
            elif first.startswith("--") and first.partition("=")[0] not in declared:
                wrong.append(f"{named(page)}: {code}")
    assert wrong == []


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_link_and_module_leads_to_a_file_and_a_heading():
    wrong = []
    for page in ALL_PAGES:
        for link in re.findall(r"\]\(((?!https?:)[^)]+)\)", prose(page)):
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            if not target.exists() or (anchor and anchor not in anchors(target)):
                wrong.append(f"{named(page)}: {link}")
        for module in re.findall(r"`(\w+/[\w/]+\.py)`", prose(page)):
            if not any((ROOT / folder / module).is_file() for folder in ("", "scripts")):
                wrong.append(f"{named(page)}: {module}")
    for file in [*SOURCES, *(ROOT / "templates").rglob("*.txt"), ROOT / "docker" / "sky.yaml"]:
        pages = re.findall(r"docs/[\w/-]+\.md", file.read_text())
        wrong += [f"{named(file)}: {page}" for page in pages if not (ROOT / page).is_file()]
    assert wrong == []


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_a_page_begins_with_a_command(page):
    lines = page.read_text().splitlines()
    if page.is_relative_to(ROOT / "docs"):
        assert [line for line in prose(page).splitlines() if len(line) > 120 and not line.startswith("|")] == []
        assert lines[0].startswith("# ")
        assert lines[2] == "```"


def test_the_guide_is_short():
    """Proofs and measurements are in docs/how/."""
    words = {page.name: len(page.read_text().split()) for page in (ROOT / "docs").glob("*.md")}
    assert {name: number for name, number in words.items() if number > 800} == {}
    assert sum(words.values()) <= 10_000


def test_the_demo_does_what_it_says():
    script = (ROOT / "tools" / "demo.sh").read_text()
    steps = re.findall(r'(?m)^step "(\d) of (\d): .*?" (.*)$', script)
    assert [(number, total) for number, total, _ in steps] == [(str(number), "5") for number in range(1, 6)]
    words_of = [parsed(f"recipe {words.partition(' > ')[0]}") for *_, words in steps]
    assert [word.info_name for word in words_of] == ["run", "evaluate", "report", "results", "plan"]
    trained, evaluated, reported, *_ = (word.params for word in words_of)
    composed = compose(Request(trained["name"], overrides=trained["set_"], rehearse=True)).config
    rows, total_rows = datafiles.training_rows(composed), datafiles.training_rows(composed | {"val_set_size": 0})
    assert trained["rehearse"]
    assert rows
    assert total_rows
    assert evaluated["limit"] <= total_rows - rows
    shown = script.partition("<< END")[2].replace("\n", " ")
    assert f"on {rows} rows" in shown
    assert f"the {total_rows - rows} held-out rows" in shown
    assert str(reported["out"]) in shown


def nodes(module: str) -> int:
    """Number of names, calls, constants and operations in a module."""
    tree = ast.parse((ROOT / "scripts" / module).read_text())
    return sum(isinstance(node, ast.expr) for node in ast.walk(tree))


def test_the_reading_path_is_short():
    _, path, *_ = re.split(r"(?m)^## ", (ROOT / "scripts" / "README.md").read_text())
    modules = re.findall(r"(?m)^\d+\. `(\S+\.py)`", path)
    assert path.startswith("Reading path")
    assert 15 < len(modules) == len(set(modules)) <= 25
    assert sum(map(nodes, modules)) <= 20_000
