"""`--help` at any width of the terminal, its examples, which are commands, and `--version`."""

import re
from importlib.metadata import version

import pytest
from command_line import COMMANDS, parsed

from qlora_recipes.base import paths


def records(name: str) -> list[tuple[str, str]]:
    """The arguments and options of a command, each as it is written and explained."""
    command = COMMANDS[name]
    context = command.make_context(name, [], resilient_parsing=True)
    return list(filter(None, (param.get_help_record(context) for param in command.get_params(context))))


def unbroken(text: str) -> str:
    """A text on one line; click breaks lines at spaces and hyphens."""
    return re.sub(r"-\s+", "-", " ".join(text.split()))


@pytest.mark.parametrize("name", COMMANDS)
def test_help_explains_all_within_the_width_and_breaks_no_word(recipe, monkeypatch, name):
    monkeypatch.setenv("COLUMNS", "60")
    command = COMMANDS[name]
    done = recipe.ok(*name.split()[1:], "--help")
    assert [line for line in done.stdout.splitlines() if len(line) > 60] == []
    assert "…" not in done.stdout
    words = unbroken(done.stdout)
    assert command.help and unbroken(command.help) in words
    for written, explained in records(name):
        assert explained.strip()
        assert written in words
        assert unbroken(explained) in words
    assert command.epilog and unbroken(command.epilog) in words


EXAMPLES = [(name, line) for name, command in COMMANDS.items() for line in (command.epilog or "").splitlines()]


@pytest.mark.parametrize(("name", "example"), EXAMPLES)
def test_an_example_is_a_command_of_this_command(place, name, example):
    (place / "mine.jsonl").touch()  # of `recipe new --data`
    assert f"{example} ".startswith(f"{name} ")
    assert parsed(example).args == []
    models = [word for word in example.split() if re.fullmatch(r"[a-z-]*llama-[\d.]*-?\d+b", word)]
    assert models or "llama" not in example
    assert {f"haider2024/{word}" for word in models} <= {*paths.recipe_names()}


def test_the_versions_of_the_package_and_of_axolotl(recipe):
    done = recipe("--version")
    assert done.returncode == 0
    assert done.stderr == ""
    assert done.stdout == f"qlora-recipes {version('qlora-recipes')}\naxolotl {version('axolotl')}\n"


def test_an_option_takes_a_dozen_words():
    helps = [getattr(param, "help", None) or "" for command in COMMANDS.values() for param in command.params]
    long = [text for text in helps if len(text.split()) > 12]
    assert [text for text in long if "profile" not in text and "completion" not in text] == []


def test_an_option_means_the_same_in_all_commands():
    metavars: dict[str, set[str]] = {}
    for command in COMMANDS.values():
        for param in command.params:
            for word in param.opts:
                if word.startswith("--"):
                    kind = "flag" if getattr(param, "is_flag", False) else param.metavar or param.type.name
                    metavars.setdefault(word, set()).add(kind)
    several = {word: kinds for word, kinds in metavars.items() if len(kinds) > 1}
    assert several == {
        "--from": {"BASE", "CARD"},  # a file or recipe to start from
        "--only": {"NAME", "SOURCE"},  # of what the command would handle
        "--out": {"FILE", "FILE.html"},
        "--set": {"KEY=V,V,V", "KEY=VALUE"},  # a sweep tries several values
    }
