"""The verbs of data: fetch and prepare."""

from pathlib import Path
from typing import Annotated

import typer

from ..base import yamlfiles
from ..base.paths import find_recipe
from ..base.progress import Bar, say
from ..terminal import tables
from . import completion
from .help import Verb, Verbs
from .next_step import next_step
from .options import InputFormatName, Json, Wide

verbs = typer.Typer(
    cls=Verbs,
    help="Fetch and prepare the data that recipes train on.",
    no_args_is_help=True,
    epilog="recipe data fetch\nrecipe data prepare",
)


@verbs.command("fetch", cls=Verb, epilog="recipe data fetch\nrecipe data fetch --from Comment_Generation.zip")
def fetch_verb(
    name: Annotated[
        str, typer.Argument(metavar="DATA", autocompletion=completion.data_sets, help="The data set.")
    ] = "codereviewer",
    from_: Annotated[
        str | None,
        typer.Option("--from", metavar="URL|FILE", help="A mirror's address, or the archive that you already have."),
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="The folder; by default data/DATA-raw.")] = None,
    wide: Wide = False,
    json: Json = False,
) -> None:
    """Download a data set from where it is published, and verify it; an interrupted download is resumed."""
    from ..data import fetch, study

    data = study.with_data(name).data
    rows = fetch.fetch(data, out or data.raw, from_)
    tables.print_json(rows) if json else tables.print_table(rows, wide=wide)
    next_step("data", "prepare", *([] if out in (None, data.raw) else [out / row["file"] for row in rows]), json=json)


@verbs.command("prepare", cls=Verb, epilog="recipe data prepare\nrecipe data prepare --input-format tagged")
def prepare_verb(
    raw: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[RAW]...",
            help="The folder or the zip with msg-train.jsonl, msg-valid.jsonl and msg-test.jsonl, or these files; "
            "by default what `data fetch` left.",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The folder to write to; by default the input format's.")
    ] = None,
    input_format: Annotated[
        InputFormatName,
        typer.Option(help="diff: the patch as it is. tagged: one line with tags, as the authors' code has it."),
    ] = "diff",
    instruction: Annotated[str | None, typer.Option(help="An instruction other than the study's.")] = None,
    valid_rows: Annotated[int, typer.Option(min=0, help="Rows to draw for validation; 0 keeps all.")] = 1000,
    subset: Annotated[
        list[int] | None,
        typer.Option(metavar="N", min=1, help="Also draw N test rows, for test-N.jsonl. Repeatable."),
    ] = None,
    seed: Annotated[int, typer.Option(help="The seed of these draws.")] = 42,
    study_name: Annotated[
        str, typer.Option("--study", metavar="S", autocompletion=completion.studies, help="The study whose data it is.")
    ] = "haider2024",
    wide: Wide = False,
    json: Json = False,
) -> None:
    """Turn CodeReviewer's rows into the files that the recipes train on, with a manifest."""
    from ..data import codereviewer, study

    of_study = study.find(study_name)
    form = of_study.data.input_formats[input_format]
    folder = out or Path(form.folder)
    files = raw or codereviewer.fetched(of_study.data)
    drawn = (valid_rows, subset or [], seed)
    with Bar(f"preparing {folder}", 1):
        manifest = codereviewer.prepare(files, folder, of_study, input_format, instruction, *drawn)
    if json:
        tables.print_json(manifest)
        return
    for split in manifest["splits"].values():
        for name, reason in split.get("left_out", {}).items():
            say(f"{name}.jsonl: not written: {reason}")
    tables.print_table(codereviewer.table(manifest), spare=["repeated rows kept"], wide=wide)
    print(folder / codereviewer.MANIFEST)
    for name in (*of_study.published, *of_study.beside):
        trains_on = yamlfiles.read_yaml(find_recipe(name)[1])["datasets"][0]["path"]
        if Path(trains_on).parent == folder and {"train", "valid"} <= manifest["splits"].keys():
            next_step("check", name, "--data")
            break
