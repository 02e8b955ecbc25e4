"""The schemas of --json: `Recipe.json` in conftest.py compares each output in all tests with its schema."""

import click
import pytest
import typer
from conftest import validators

from qlora_recipes import cli


def commands(group: click.Group, names: tuple[str, ...] = ()) -> dict[str, click.Command]:
    """All commands by name."""
    listed = {}
    for name in group.list_commands(click.Context(group)):
        command = group.get_command(click.Context(group), name)
        if isinstance(command, click.Group):
            listed |= commands(command, (*names, name))
        else:
            listed[" ".join((*names, name))] = command
    return listed


def test_each_command_with_json_has_a_schema():

    listed = commands(typer.main.get_group(cli.app))
    with_json = {name for name, command in listed.items() if any("--json" in param.opts for param in command.params)}
    assert with_json == validators().keys()


def test_the_committed_schemas_are_those_of_the_code():
    import outputs

    schemas = outputs.schemas()
    assert {file: file.read_text(encoding="utf-8") for file in outputs.FOLDER.iterdir()} == schemas


@pytest.mark.parametrize(
    "words",
    [
        ["list"],
        ["show", "start/qlora"],
        ["diff", "code-llama-7b", "llama-3.2-3b"],
        ["check", "start/qlora", "haider2024/llama-2-7b", "--quick", "--set", "lora_rr=8"],
        ["plan", "start/qlora", "--gpu", "T4"],
        ["reproduce", "haider2024", "--only", "llama-2-7b", "--dry-run"],
        ["doctor"],
    ],
    ids=" ".join,
)
def test_an_output_agrees_with_its_schema(recipe, words):
    code = 2 if "lora_rr=8" in words else 0
    assert recipe.json(*words, code=code)
