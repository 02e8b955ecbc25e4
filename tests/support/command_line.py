"""Command lines of `recipe`, parsed by its own parser; nothing is started."""

import shlex
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import click
import typer.main

from qlora_recipes import cli
from qlora_recipes.base import paths

ALL = typer.main.get_command(cli.app)


def subcommands(command: click.Command) -> dict[str, click.Command]:
    if not isinstance(command, click.Group):
        return {}
    context = click.Context(command)
    below = {name: command.get_command(context, name) for name in command.list_commands(context)}
    return {name: subcommand for name, subcommand in below.items() if subcommand}


def commands(name: str = "recipe", command: click.Command = ALL) -> Iterator[tuple[str, click.Command]]:
    yield name, command
    for word, below in subcommands(command).items():
        yield from commands(f"{name} {word}", below)


COMMANDS = dict(commands())


def parsed(line: str) -> click.Context:
    """Parse a line that begins with `recipe`; the context of its word. Files and a user's recipes need not exist."""
    with patch("qlora_recipes.commands.options.find_recipe", _found):
        return _parsed(*shlex.split(line, comments=True))


def _found(name: str) -> tuple[str, Path]:
    is_part = any(name in recipe for recipe in paths.recipe_names())
    return paths.find_recipe(name) if is_part else (name, Path(name))


def _parsed(name: str, *arguments: str) -> click.Context:
    words = list(arguments)
    command: click.Command = ALL
    while True:
        context = command.make_context(name, words)
        if not isinstance(command, click.Group):
            return context
        word, below, words = command.resolve_command(context, [*context._protected_args, *context.args])
        assert word
        assert below
        name, command = word, below
