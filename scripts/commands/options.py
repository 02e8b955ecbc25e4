"""Arguments and options that several verbs of the command have, and the values that they take."""

from pathlib import Path
from typing import Annotated, Literal

import click
import typer

from ..scores.metrics import PER_ROW

PlaceName = Literal["local", "slurm"]
InputFormat = Literal["diff", "tagged"]
CacheForm = Literal["auto", "static", "dynamic"]
Group = Literal["lang", "length"]
CRITERIA = ["eval_loss", *PER_ROW, "memory", "time", "bleu4_per_gib"]

Name = Annotated[str, typer.Argument(metavar="NAME|FILE", help="A recipe's name (see `recipe list`) or a YAML file.")]
Names = Annotated[
    list[str] | None,
    typer.Argument(metavar="[NAME|FILE]...", help="Recipes or YAML files; by default all recipes."),
]
RunName = Annotated[
    str, typer.Argument(metavar="RUN", help="A run's folder, an unambiguous end of its name, or latest.")
]
SweepFile = Annotated[
    str | None,
    typer.Argument(
        metavar="[SWEEP]", help="A YAML file in Axolotl's sweep format, or the name of one in recipes/sweeps."
    ),
]
Runs = Annotated[Path, typer.Option("--runs", metavar="DIR", help="The folder that holds the runs.")]
Profiles = Annotated[
    list[str] | None,
    typer.Option("--profile", metavar="P", help="Lay a profile over it: a shipped one or a file. Repeatable."),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key (a.b.0.c reaches below). Repeatable."),
]
Mirror = Annotated[bool, typer.Option("--mirror", help="Take an ungated copy of a gated base model.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
FigureFile = Annotated[
    Path | None, typer.Option("--figure", metavar="FILE", help="Draw it too, to a .png or .svg file.")
]
Judge = Annotated[
    str | None,
    typer.Option(
        "--bertscore", metavar="MODEL|none", help="BERTScore's model; by default roberta-large if it is here."
    ),
]
JudgeLayer = Annotated[
    int | None, typer.Option("--bertscore-layer", min=1, help="Its layer, where bert-score knows no best one.")
]
BatchSize = Annotated[int, typer.Option(min=1, help="The most rows generated at a time; fewer where they are long.")]
On = Annotated[
    PlaceName, typer.Option("--on", help="Where: this machine, or SLURM's queue, from which it is not waited for.")
]
SlurmOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--slurm",
        metavar="KEY=VALUE",
        help="With --on slurm: an option of sbatch, as in time=8:00:00, for one step in evaluate.time=1:00:00. "
        "Repeatable; ~/.config/qlora-recipes/slurm.yaml holds those that are always meant.",
    ),
]
Best = Annotated[
    str | None, typer.Option("--best", click_type=click.Choice(CRITERIA), help="Name the best member by this.")
]
