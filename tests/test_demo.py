"""`make demo`: that its commands are there, and that what it says of them is so."""

import shlex
import subprocess
from pathlib import Path

import click
import typer.main

from qlora_recipes import cli
from qlora_recipes.configs import datafiles
from qlora_recipes.configs.compose import Request, compose
from qlora_recipes.scores.evaluate import REHEARSED


def test_the_demo_does_what_it_says() -> None:
    words = ["make", "--dry-run", "--no-print-directory", "demo"]
    done = subprocess.run(words, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True)
    lines = [shlex.split(line.partition(" > ")[0]) for line in done.stdout.splitlines()]
    commands = [words[1:] for words in lines if words and words[0].endswith("/recipe")]
    assert [verb for verb, *_ in commands] == ["run", "evaluate", "evaluate", "results", "report"]
    verbs = typer.main.get_command(cli.app)
    assert isinstance(verbs, click.Group)
    parsed = [verbs.commands[verb].make_context(verb, words).params for verb, *words in commands]
    trained, alone, *_, reported = parsed
    assert alone["adapter"] == "none" and trained["rehearse"]
    composed = compose(Request(trained["name"], overrides=trained["set_"], rehearse=True))
    said = " ".join(" ".join(words[1:]) for words in lines if words and words[0] == "echo")
    assert f"trained on {datafiles.training_rows(composed.config)} rows" in said
    assert f"on {REHEARSED} other rows" in said
    assert str(reported["out"]) in said
