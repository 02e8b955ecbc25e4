"""Command lines of `recipe`, parsed by its own parser; nothing is started."""

import shlex
from collections.abc import Iterator

import click
import typer.main

from qlora_recipes import cli

ALL = typer.main.get_command(cli.app)


def subcommands(command: click.Command) -> dict[str, click.Command]:
    if not isinstance(command, click.Group):
        return {}
    context = click.Context(command)
    below = {name: command.get_command(context, name) for name in command.list_commands(context)}
    return {name: subcommand for name, subcommand in below.items() if subcommand}


def commands(name: str = "recipe", command: click.Command = ALL) -> Iterator[tuple[str, click.Command]]:
    yield name, command
    for verb, below in subcommands(command).items():
        yield from commands(f"{name} {verb}", below)


COMMANDS = dict(commands())


def parsed(line: str) -> click.Context:
    """Parse a line that begins with `recipe`; the context of its verb."""
    name, *words = shlex.split(line, comments=True)
    command: click.Command = ALL
    while True:
        context = command.make_context(name, words)
        if not isinstance(command, click.Group):
            return context
        verb, below, words = command.resolve_command(context, [*context._protected_args, *context.args])
        assert verb
        assert below
        name, command = verb, below
