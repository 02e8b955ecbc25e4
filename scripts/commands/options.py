"""Shared arguments and options of verbs: completion, values, and their conflicts."""

import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ..base import paths
from ..base.errors import UserError
from ..base.files import read_json
from ..base.paths import find_recipe
from ..base.progress import say

if TYPE_CHECKING:
    from ..backends import Backend


def whole_name(context: typer.Context, given: str | None) -> str | None:
    """Complete a part of a recipe's name, with a message; return anything else unchanged."""
    if given and not context.resilient_parsing:
        with suppress(UserError):  # which the verb itself reports
            name, file = find_recipe(given)
            if name != given and file != Path(given):
                say(f"recipe {name}")
                return name
    return given


def whole_names(context: typer.Context, given: list[str] | None) -> list[str]:
    """The whole names of several recipes, see `whole_name`."""
    return [whole_name(context, name) or name for name in given or ()]


def _beginning(incomplete: str, names: Sequence[str]) -> list[str]:
    """Names with this beginning, or else the ends of their paths that have it."""
    ends = ["/".join(name.split("/")[level:]) for name in names for level in range(1, name.count("/") + 1)]
    whole, parts = ([name for name in dict.fromkeys(some) if name.startswith(incomplete)] for some in (names, ends))
    return whole or parts


def _yaml_files(incomplete: str) -> list[str]:
    folder = incomplete.rpartition("/")[0]
    path = Path(folder or ".")
    files = sorted(path.iterdir()) if path.is_dir() else []
    return [f"{folder}/{file.name}" if folder else file.name for file in files if file.suffix in (".yaml", ".yml")]


def complete_recipes(incomplete: str) -> list[str]:
    """Recipes, variants and YAML files."""
    return _beginning(incomplete, [*paths.variant_names(), *paths.recipe_names(), *_yaml_files(incomplete)])


def complete_runs(context: typer.Context, incomplete: str) -> list[str]:
    """`latest`, the recipes that have runs, and these."""
    folder = _runs_folder(context)
    found = sorted(file.parent.relative_to(folder) for file in folder.rglob("run.json"))
    of_recipes = dict.fromkeys(run.parent.as_posix() for run in found)
    return _beginning(incomplete, [*["latest"][: len(found)], *of_recipes, *(run.name for run in found)])


def complete_things(context: typer.Context, incomplete: str) -> list[str]:
    """Runs as above, studies, and the sweeps that were started."""
    folder = _runs_folder(context) / "sweeps"
    files = sorted(file.relative_to(folder).as_posix() for file in folder.glob("*/*.json"))  # see Sweep.file
    labels = [file.removesuffix(".json").replace(".rehearsal", "/rehearsal").replace("--", "/") for file in files]
    return [
        *complete_runs(context, incomplete),
        *_beginning(incomplete, [*labels, *(study.name for study in paths.studies())]),
    ]


def _runs_folder(context: typer.Context) -> Path:
    return Path(context.find_root().params.get("runs") or paths.runs())


def complete_sweep_files(incomplete: str) -> list[str]:
    """The shipped sweeps, and YAML files."""
    shipped = sorted(file.stem for file in (paths.RECIPES / "sweeps").glob("*.yaml"))
    return _beginning(incomplete, [*shipped, *_yaml_files(incomplete)])


def complete_profiles(incomplete: str) -> list[str]:
    """The shipped profiles, and YAML files."""
    return _beginning(incomplete, [*_PROFILES, *_yaml_files(incomplete)])


def complete_studies(incomplete: str) -> list[str]:
    """The studies."""
    return _beginning(incomplete, [folder.name for folder in paths.studies()])


def complete_keys(incomplete: str) -> list[str]:
    """The keys of Axolotl's configuration, each to be given a value."""
    return _beginning(incomplete, [f"{key}=" for key in read_json(paths.RECIPES / "axolotl.schema.json")["properties"]])


WHERE = "Where it runs"
_PROFILES = sorted({file.stem for file in paths.PROFILES.glob("*.yaml")} - {"rehearsal"})  # which is --rehearse
Name = Annotated[
    str,
    typer.Argument(
        metavar="NAME|FILE",
        callback=whole_name,
        autocompletion=complete_recipes,
        help="A recipe's name, a part of it, or a YAML file.",
    ),
]
NameOrStudy = Annotated[
    str,
    typer.Argument(
        metavar="NAME|FILE|STUDY",
        callback=whole_name,
        autocompletion=complete_recipes,
        help="A recipe's name, a part of it, a file, a study.",
    ),
]
Names = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[NAME|FILE]...",
        callback=whole_names,
        autocompletion=complete_recipes,
        help="Recipes, parts of their names, or YAML files; by default all.",
    ),
]
RunName = Annotated[
    str,
    typer.Argument(
        metavar="RUN",
        autocompletion=complete_runs,
        help="Run folder, partial name, recipe name (its newest run), or latest.",
    ),
]
Things = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[RUN|STUDY|SWEEP]...",
        autocompletion=complete_things,
        help="Runs (folder, partial name, recipe or latest), a study, or a sweep.",
    ),
]
PlannedGpu = Annotated[
    str | None,
    typer.Option(
        "--gpu",
        rich_help_panel=WHERE,
        metavar="NAME",
        help="The GPU to plan for; by default this machine's.",
    ),
]
Jobs = Annotated[
    int | None,
    typer.Option(
        rich_help_panel=WHERE,
        min=1,
        help="Parallel runs, one GPU each; default: 1 (SLURM: all).",
    ),
]
SweepFile = Annotated[
    str | None,
    typer.Argument(
        metavar="[SWEEP]",
        autocompletion=complete_sweep_files,
        help="A YAML file in Axolotl's sweep format, or a shipped sweep.",
    ),
]
Profiles = Annotated[
    list[str] | None,
    typer.Option(
        "--profile",
        metavar="P",
        autocompletion=complete_profiles,
        help=f"Merge a YAML file or shipped profile into the config: {', '.join(_PROFILES)}. Repeatable.",
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        autocompletion=complete_keys,
        help="Override a config key; a.b.0.c is a nested one. Repeatable.",
    ),
]
Force = Annotated[
    list[str] | None,
    typer.Option("--force", metavar="FINDING", help="Proceed despite the named `recipe check` error. Repeatable."),
]
Json = Annotated[bool, typer.Option("--json", rich_help_panel="Output", help="Print JSON.")]


Seeds = Annotated[
    int,
    typer.Option(
        "--seeds", metavar="N", min=1, help="Train each setting with N consecutive seeds, from the recipe's on."
    ),
]
Metrics = Annotated[
    list[str] | None,
    typer.Option(
        "--metric",
        metavar="NAME",
        help="Additional metric, benchmark:TASK or bertscore:MODEL; see docs/evaluate.md. Repeatable.",
    ),
]
BatchSize = Annotated[
    int | None, typer.Option(min=1, help="Maximum rows per batch; default: 64, fewer if memory is short.")
]
On = Annotated[
    str,
    typer.Option(
        "--on",
        rich_help_panel=WHERE,
        metavar="local|slurm[,KEY=VALUE]...",
        help="Run locally, or by SLURM with sbatch options (slurm,time=8:00:00); see docs/clusters.md.",
    ),
]
RehearseAll = Annotated[bool, typer.Option("--rehearse", help="Try it on the CPU: small model, few rows, no network.")]
FromStage = Annotated[
    Literal["predictions", "adapter", "training"],
    typer.Option(
        "--from",
        help="Reuse the authors' predictions or adapters, or train anew.",
    ),
]
RehearsalsOfStudy = Annotated[
    bool, typer.Option("--rehearse", help="For a study: show rehearsals instead of real runs.")
]
ExportedRun = Annotated[
    str | None,
    typer.Option(
        "--export",
        metavar="RUN|STUDY",
        autocompletion=complete_runs,
        help="Write a record to contribute, of a run or published predictions.",
    ),
]
OfLedger = Annotated[
    bool,
    typer.Option("--ledger", help="Show each published number's status, and the contributed records."),
]

DecodingName = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Use another decoding of the study; shown in an extra column."),
]
Power = Annotated[
    str | None,
    typer.Option(
        "--power",
        metavar="X|tolerance",
        help="Show seeds and rows needed to detect a difference X.",
    ),
]


def exclusive(options: dict[str, object]) -> None:
    """Refuse more than one of several options, whose values are given by their names.

    Raises:
        UserError: there are too many of them.
    """
    if sum(map(bool, options.values())) > 1:
        *names, last = options
        raise UserError(f"{', '.join(names)} and {last}: give only one of them")


def only_with(option: str, given: object, other: str, needed: object) -> None:
    """Refuse an option without another that it needs.

    Raises:
        UserError: that one is missing.
    """
    if given and not needed:
        raise UserError(f"{option}: works only with {other}")


def backend_of(on: str, rehearsal: bool = False, jobs: int | None = None) -> "Backend":
    """The backend that --on names, with its options; a part without = continues a value.

    Raises:
        UserError: there is no such backend, or it refuses the options.
    """
    from ..backends import Local

    if on == "local":
        return Local(rehearsal, jobs)
    name, *options = re.split(r",(?=[^,]*=)", on)
    if name != "slurm":
        raise UserError(f"--on {on}: give local or slurm, with options as in slurm,partition=gpu,time=8:00:00")
    from ..backends.slurm import Slurm

    return Slurm(rehearsal, jobs, options)


def single_name(names: list[str] | None, option: str) -> str:
    """The only name.

    Raises:
        UserError: it is not just one, which an option needs.
    """
    if not names or len(names) > 1:
        raise UserError(f"{option}: give one name")
    return names[0]
