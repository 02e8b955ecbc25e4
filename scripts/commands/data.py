"""The commands `data fetch` and `data prepare`."""

from pathlib import Path
from typing import Annotated

import typer

from ..base import tables
from ..base.errors import meant
from ..base.terminal import Bar, warn
from .help import RecipeCommand, RecipeGroup, suggest
from .options import Json, complete_studies, repeatable_option, several_arguments

commands = typer.Typer(rich_markup_mode=None, suggest_commands=False)  # click suggests commands already
data_commands = typer.Typer(
    cls=RecipeGroup,
    help="Fetch and prepare the data that recipes train on.",
    no_args_is_help=True,
    epilog="recipe data fetch codereviewer\nrecipe data prepare --study haider2024",
)
commands.add_typer(data_commands, name="data")


@data_commands.command(
    "fetch",
    cls=RecipeCommand,
    epilog="recipe data fetch codereviewer\nrecipe data fetch gsm8k --only test.jsonl",
)
def fetch_command(
    *,
    name: Annotated[
        str,
        typer.Argument(metavar="DATA", autocompletion=complete_studies, help="Data set, or a study that uses it."),
    ],
    only: Annotated[
        list[str],
        repeatable_option(
            metavar="SOURCE",
            help="Fetch only this file of the data (full or partial name). Repeatable.",
        ),
    ],
    json: Json = False,
) -> None:
    """Download a data set into data/DATA-raw and verify known checksums; an interrupted download resumes."""
    from ..data import fetch, studies

    study = studies.find_by_data(name)
    data = study.data
    wanted = dict.fromkeys(meant(word, data.sources, "source", option="--only") for word in only)
    rows = fetch.fetch(data, data.raw, wanted or study.default_sources)
    tables.show(json, rows, [tables.Table(rows)])
    suggest("data", "prepare", "--study", study.folder.name, json=json)


@data_commands.command(
    "prepare",
    cls=RecipeCommand,
    epilog="recipe data prepare --study haider2024\nrecipe data prepare my-folder --study haider2024",
)
def prepare_command(
    *,
    raw: Annotated[
        list[Path],
        several_arguments(
            metavar="[RAW]...",
            help="Raw files, or folders with them; default: those of `data fetch`.",
        ),
    ],
    study_name: Annotated[
        str,
        typer.Option("--study", metavar="S", autocompletion=complete_studies, help="Study, or part of its name."),
    ],
    json: Json = False,
) -> None:
    """Write a study's training and test rows from its raw files, into a folder for each prompt format."""
    from ..data import manifest, prepare, studies
    from ..data.raw_rows import fetched_files

    study = studies.find(study_name)
    files = raw or fetched_files(study.data)
    manifests = {}
    for name, form in study.data.formats.items():
        folder = Path(form.folder)
        with Bar(f"preparing {folder}", 1):
            prepared = manifests[form.folder] = prepare.prepare(files, folder, study, name)
        for split in prepared["splits"].values():
            for subset, reason in split.get("left_out", {}).items():
                warn(f"{subset}.jsonl: not written: {reason}")
        if json:
            continue
        tables.print_table(manifest.table(prepared), below=["left out"])
        print(folder / manifest.MANIFEST)
    tables.show(json, manifests, [])
    suggest("check", next(iter(study.published)), "--all-rows", json=json)
