"""Shared arguments and options of commands: completion, values, and their conflicts."""

import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import click
import typer

from ..base import paths, tables
from ..base.errors import UserError
from ..base.files import Row, read_json
from ..base.paths import find_recipe
from ..base.terminal import say, warn
from ..config import gpus
from ..config.merging import Override, parse_override

if TYPE_CHECKING:
    from ..run.backends import Backend, TaskResult


def full_name(context: typer.Context, name: str) -> str:
    """Replace part of a recipe's name by the full name, and log it.

    The name of a file stays, and so do an empty name and any name during completion.

    Raises:
        UserError: the name matches no recipe, variant or file, or several.
    """
    if context.resilient_parsing or not name:
        return name
    recipe, file = find_recipe(name)
    if file == Path(name):
        return name
    if recipe != name:
        say(f"recipe {recipe}")
    return recipe


def recipe_or_run(context: typer.Context, name: str) -> str:
    """Full name of a recipe, see `full_name`; or the config of the run that the name stands for.

    Raises:
        UserError: the name matches no recipe, file or run, or several.
    """
    try:
        return full_name(context, name)
    except UserError as error:
        from ..run.rundir import find_run

        try:
            return str(find_run(name, paths.runs()).config_file)
        except UserError:
            raise error from None


def study_or_full_name(context: typer.Context, name: str) -> str:
    """Name of a study, or a recipe's full name; see `full_name`."""
    return name if paths.is_study(name) else full_name(context, name)


def full_names(context: typer.Context, names: list[str]) -> list[str]:
    """Full names of several recipes; studies, patterns and unknown names stay, for the command to report."""
    full = []
    for name in names:
        try:
            full.append(study_or_full_name(context, name))
        except UserError:
            full.append(name)
    return full


def _beginning(incomplete: str, names: Sequence[str]) -> list[str]:
    """Names that begin with a text.

    If no name does, return the last parts of names that begin with the text.
    """
    matches = [name for name in dict.fromkeys(names) if name.startswith(incomplete)]
    if matches:
        return matches
    last_parts = dict.fromkeys(name.rpartition("/")[2] for name in names)
    return [part for part in last_parts if part.startswith(incomplete)]


def _yaml_files(incomplete: str) -> list[str]:
    folder = "".join(incomplete.rpartition("/")[:2])
    return [f"{folder}{file.name}" for file in sorted(Path(folder or ".").glob("*.y*ml"))]


def complete_recipes(incomplete: str) -> list[str]:
    """Complete recipes, variants and YAML files."""
    return _beginning(incomplete, [*paths.variant_names(), *paths.recipe_names(), *_yaml_files(incomplete)])


def complete_runs(context: typer.Context, incomplete: str) -> list[str]:
    """Complete `latest`, recipes with runs, and run folders; nothing without runs."""
    folder = Path(context.find_root().params.get("runs") or paths.runs())
    runs = sorted(run.relative_to(folder) for run in paths.run_folders(folder))
    if not runs:
        return []
    recipes = dict.fromkeys(run.parent.as_posix() for run in runs)
    return _beginning(incomplete, ["latest", *recipes, *(run.name for run in runs)])


def complete_things(context: typer.Context, incomplete: str) -> list[str]:
    """Complete runs and studies."""
    return [*complete_runs(context, incomplete), *complete_studies(incomplete)]


def complete_sweep_files(incomplete: str) -> list[str]:
    """Complete built-in sweeps and YAML files."""
    built_in = sorted(file.stem for file in paths.SWEEPS.glob("*.yaml"))
    return _beginning(incomplete, [*built_in, *_yaml_files(incomplete)])


def complete_profiles(incomplete: str) -> list[str]:
    """Complete built-in profiles and YAML files."""
    return _beginning(incomplete, [*_PROFILES, *_yaml_files(incomplete)])


def complete_studies(incomplete: str) -> list[str]:
    """Complete studies."""
    return _beginning(incomplete, [folder.name for folder in paths.studies()])


def complete_keys(incomplete: str) -> list[str]:
    """Complete keys of Axolotl's config, followed by `=`."""
    return _beginning(incomplete, [f"{key}=" for key in read_json(paths.RECIPES / "axolotl.schema.json")["properties"]])


WHERE = "Where it runs"
repeatable_option = partial(typer.Option, default_factory=list, show_default=False)
several_arguments = partial(typer.Argument, default_factory=list, show_default=False)
recipe_argument = partial(typer.Argument, callback=full_name, autocompletion=complete_recipes)
_PROFILES = sorted({file.stem for file in paths.PROFILES.glob("*.yaml")} - {"rehearsal"})  # --rehearse applies it
Name = Annotated[
    str,
    recipe_argument(
        metavar="NAME|FILE",
        help="Recipe name, partial name, or YAML file.",
    ),
]
NameOrStudy = Annotated[
    str,
    typer.Argument(
        metavar="NAME|FILE|STUDY",
        callback=study_or_full_name,
        autocompletion=complete_recipes,
        help="Recipe name, partial name, YAML file, or study.",
    ),
]
Names = Annotated[
    list[str],
    several_arguments(
        metavar="[NAME|FILE|STUDY]...",
        callback=full_names,
        autocompletion=complete_recipes,
        help="Recipes (names, parts, or patterns: 'llama-3*'), YAML files, or studies; default: all.",
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
RunNames = Annotated[
    list[str],
    typer.Argument(metavar="RUN...", autocompletion=complete_runs, help="Runs, as folders or by names, or latest."),
]
Things = Annotated[
    list[str],
    several_arguments(
        metavar="[RUN|STUDY|SWEEP]...",
        autocompletion=complete_things,
        help="Runs (folder, partial name, recipe or latest), a study, or a sweep.",
    ),
]
StudyName = Annotated[
    str, typer.Argument(metavar="STUDY", autocompletion=complete_studies, help="Study, or part of its name.")
]
PlannedGpu = Annotated[
    gpus.Gpu | None,
    typer.Option(
        parser=gpus.find_gpu,
        rich_help_panel=WHERE,
        metavar="NAME",
        help="With --dry-run: GPU to plan for; default: this machine's.",
    ),
]
Jobs = Annotated[
    int | None,
    typer.Option(
        rich_help_panel=WHERE,
        metavar="N",
        min=1,
        help="Parallel runs, one GPU each; default: 1 (SLURM: all).",
    ),
]
SweepFile = Annotated[
    str | None,
    typer.Argument(
        metavar="[SWEEP]",
        autocompletion=complete_sweep_files,
        help="YAML file in Axolotl's sweep format, or a built-in sweep.",
    ),
]
Profiles = Annotated[
    list[str],
    repeatable_option(
        metavar="P",
        autocompletion=complete_profiles,
        help=f"Merge in a YAML file, or a built-in profile: {', '.join(_PROFILES)}. Repeatable.",
    ),
]
Overrides = Annotated[
    list[Override],
    repeatable_option(
        "--set",
        parser=parse_override,
        metavar="KEY=VALUE",
        autocompletion=complete_keys,
        help="Override a config key, or a nested key such as a.b.0.c. Repeatable.",
    ),
]
Force = Annotated[
    list[str],
    repeatable_option(
        metavar="FINDING",
        help="Override the `recipe check` error named FINDING. Repeatable.",
    ),
]
Json = Annotated[bool, typer.Option("--json", rich_help_panel="Output", help="Print JSON.")]


Limit = Annotated[
    int | None,
    typer.Option(
        metavar="N", min=1, help="Evaluate only N rows, chosen pseudo-randomly; default: all (rehearsal: 12)."
    ),
]
Seeds = Annotated[
    int,
    typer.Option(metavar="N", min=1, help="Train everything with N seeds, the recipe's own seed first."),
]
Metrics = Annotated[
    list[str],
    repeatable_option(
        metavar="NAME",
        help="Add to the study's metrics; without a study, replace the defaults. Repeatable.",
    ),
]
BatchSize = Annotated[
    int | None, typer.Option(metavar="N", min=1, help="Maximum rows per batch; default: 64, fewer if memory is short.")
]


class _BackendOption(click.types.StringParamType):
    """Text that begins with the name of a backend; imports the backends only for help."""

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        from ..run.backends import BACKENDS

        return f"{'|'.join(BACKENDS)}[,KEY=VALUE]..."


On = Annotated[
    str,
    typer.Option(
        rich_help_panel=WHERE,
        click_type=_BackendOption(),
        help="Run locally, or on SLURM with sbatch options (slurm,time=8:00:00); see docs/clusters.md.",
    ),
]
RehearseAll = Annotated[bool, typer.Option("--rehearse", help="Try it on the CPU: small model, few rows, no network.")]
Stage = Annotated[
    Literal["predictions", "adapter", "training"],
    typer.Option(
        help="What to score: published predictions, published adapters, or adapters that you train.",
    ),
]
RehearsalsOfStudy = Annotated[
    bool, typer.Option("--rehearse", help="For a study: show rehearsals instead of real runs.")
]
DecodingName = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Use the decoding that study.yaml calls NAME; scores get their own column."),
]


def settings_of(text: str) -> list[str]:
    """Split `KEY=VALUE,KEY=VALUE` at commas; a part without `=` continues the value before it: `nodelist=a,b`."""
    return re.split(r",(?=[^,]*=)", text)


def columns_by_field(text: str) -> dict[str, str]:
    """Columns by field, from --fields, such as `question=Frage,answer=Antwort`.

    Raises:
        UserError: the text is malformed.
    """
    columns = {}
    for setting in filter(None, settings_of(text)):
        name, _, column = setting.partition("=")
        if not column:
            raise UserError(f"--fields {text}: expected FIELD=COLUMN, as in question=Frage,answer=Antwort")
        columns[name] = column
    return columns


def refuse_together(options: dict[str, object]) -> None:
    """Refuse more than one of several options.

    Args:
        options: value of each option.

    Raises:
        UserError: more than one option has a value.
    """
    if sum(map(bool, options.values())) > 1:
        *names, last = options
        raise UserError(f"{', '.join(names)} and {last}: give only one of them")


def refuse_without(option: str, value: object, other: str, needed: object) -> None:
    """Refuse an option that is given without its requirement.

    Args:
        option: name of the option.
        value: value of the option.
        other: description of the requirement.
        needed: true if the requirement is met.

    Raises:
        UserError: the requirement is not met.
    """
    if value and not needed:
        raise UserError(f"{option}: works only with {other}")


def report_problems(problems: dict[str, str]) -> None:
    """Log problems, each with the name of its subject.

    Raises:
        typer.Exit: code 1 if there is a problem.
    """
    for name, problem in problems.items():
        warn(f"{name}: {problem}")
    if problems:
        raise typer.Exit(1)


def backend_of(on: str, rehearsal: bool = False, jobs: int | None = None, submits: bool = True) -> "Backend":
    """Return the backend that --on names, with the options after the name.

    Args:
        on: value of --on.
        rehearsal: whether the runs are rehearsals.
        jobs: value of --jobs.
        submits: whether jobs are about to be submitted, for which SLURM must answer.

    Raises:
        UserError: the backend does not exist, or refuses the options.
    """
    from ..run.backends import BACKENDS

    name, _, options = on.partition(",")
    return BACKENDS.find(name, "--on")(rehearsal, jobs, [*filter(None, settings_of(options))], submits)


def show_and_exit(
    results: "list[TaskResult]",
    json: bool,
    head: dict[str, Any],
    rows: list[Row],
    show: Callable[[], None],
) -> None:
    """Print steps and results, and exit with the steps' code."""
    from ..study import pipeline

    if json:
        steps = [result.as_row() | {"problem": result.problem} for result in results]
        tables.print_json(head | {"steps": steps, "results": rows})
    else:
        tables.print_table([result.as_row() for result in results], below=["run"])
        print()
        show()
    for result in results:
        if result.problem:
            warn(f"{result.label}: {result.problem}")
    if code := pipeline.exit_code(results):
        raise typer.Exit(code)
