"""How `--help` looks: as click writes it, broken only between words, with verbs by heading and examples at the end."""

from collections.abc import Iterable
from itertools import groupby

import click
from typer.core import TyperCommand, TyperGroup

_NO_BREAK = "\N{NON-BREAKING HYPHEN}"


class _Formatter(click.HelpFormatter):
    """Breaks no name of an option or a file at a hyphen, and says in plainer words which numbers an option takes."""

    def write(self, string: str) -> None:
        super().write(string.replace(_NO_BREAK, "-"))

    def write_heading(self, heading: str) -> None:
        super().write_heading(click.style(heading, bold=True))

    def write_usage(self, prog: str, args: str = "", prefix: str | None = None) -> None:
        super().write_usage(prog, _unbroken(args), prefix)

    def write_text(self, text: str) -> None:
        super().write_text(_unbroken(text))

    def write_dl(self, rows: Iterable[tuple[str, str]], col_max: int = 24, col_spacing: int = 2) -> None:
        plain = [
            (written.replace("INTEGER RANGE", "N").replace("INTEGER", "N"), explained.replace("x>=", "at least "))
            for written, explained in rows
        ]
        super().write_dl([(written, _unbroken(explained)) for written, explained in plain], col_max, col_spacing)


def _unbroken(text: str) -> str:
    return text.replace("-", _NO_BREAK)


class _Context(click.Context):
    formatter_class = _Formatter


def _write_examples(epilog: str | None, formatter: click.HelpFormatter, heading: str = "Examples") -> None:
    with formatter.section(heading):
        for line in (epilog or "").splitlines():
            formatter.write(f"  {line}\n")


class Verb(TyperCommand):
    """A verb; its epilog are examples, a line each."""

    context_class = _Context

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        _write_examples(self.epilog, formatter)


class Verbs(TyperGroup):
    """A group of verbs, under their headings; its epilog are examples, a line each."""

    context_class = _Context
    EXAMPLES = "Examples"

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        verbs = [(name, self.commands[name]) for name in self.list_commands(ctx)]
        width = max(len(name) for name, _ in verbs)
        for heading, below in groupby(verbs, key=lambda verb: getattr(verb[1], "rich_help_panel", None) or "Commands"):
            with formatter.section(heading):
                formatter.write_dl([(name.ljust(width), verb.get_short_help_str(limit=1000)) for name, verb in below])

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        _write_examples(self.epilog, formatter, self.EXAMPLES)
