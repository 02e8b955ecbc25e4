"""The commands run, resume and cancel."""

from typing import Annotated

import typer

from ..base.errors import UserError
from .help import RecipeCommand, suggest_evaluation
from .options import WHERE, Force, Name, On, Overrides, Profiles, RehearseAll, RunName, Things, backend_of

commands = typer.Typer(rich_markup_mode=None)


@commands.command(
    "run",
    cls=RecipeCommand,
    epilog="recipe run code-llama-7b --rehearse\nrecipe run llama-3.2-3b --set num_epochs=3 --set lora_r=64",
)
def run_command(
    *,
    name: Name,
    rehearse: RehearseAll = False,
    profile: Profiles,
    set_: Overrides,
    gpu_count: Annotated[
        int,
        typer.Option(
            "--gpus", rich_help_panel=WHERE, metavar="N", min=1, help="GPUs to train on; with --nodes, GPUs per node."
        ),
    ] = 1,
    nodes: Annotated[
        int, typer.Option(rich_help_panel=WHERE, metavar="N", min=1, help="Machines to train on, with --on slurm.")
    ] = 1,
    on: On = "local",
    force: Force,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the config, or the batch scripts; start nothing.")
    ] = False,
) -> None:
    """Train a recipe with Axolotl, in a new run folder."""
    from ..config.compose import Request, is_rehearsal
    from ..run import run

    request = Request(
        name,
        profiles=profile,
        overrides=set_,
        rehearse=rehearse,
        gpus=gpu_count,
        nodes=nodes,
        dry_run=dry_run,
        force=force,
    )
    backend = backend_of(on, is_rehearsal(request), submits=not dry_run)
    if dry_run:
        print(run.preview(request, backend), end="")
    else:
        folder = run.start(request, backend)
        print(folder.path)
        suggest_evaluation(folder, on)


@commands.command("resume", cls=RecipeCommand, epilog="recipe resume latest")
def resume_command(
    *,
    run: RunName,
    prepare: Annotated[
        bool,
        typer.Option("--prepare", hidden=True, help="Only tokenize rows and fetch the base model; needs no GPU."),
    ] = False,
    trust: Annotated[
        bool,
        typer.Option("--trust", help="Trust a run folder from elsewhere; its author's code may execute."),
    ] = False,
    force: Force,
    on: On = "local",
) -> None:
    """Resume an interrupted run from its last valid checkpoint."""
    from ..run.run import resume

    backend = backend_of(on)
    folder = resume(run, backend, prepare, force, trust)
    print(folder.path)
    if not prepare:  # after --prepare, there is nothing to evaluate
        suggest_evaluation(folder, on)


@commands.command("cancel", cls=RecipeCommand, epilog="recipe cancel latest\nrecipe cancel lora-tradeoffs")
def cancel_command(names: Things) -> None:
    """Save a checkpoint and stop active jobs; remove queued ones."""
    if not names:
        raise UserError("nothing is named; give a run, a study or a sweep, as in `recipe cancel latest`")
    messages = []
    for name in names:
        messages += _cancel(name)
    if not messages:
        raise UserError(f"{', '.join(names)}: nothing is running or queued")
    print(*messages, sep="\n")


def _cancel(name: str) -> list[str]:
    """Ask a run, or the runs of a sweep or study, to stop; return a message per process or job."""
    from ..run import backends
    from ..run.rundir import RunDir
    from ..study import reproduce, sweep

    target = sweep.find_run_sweep_or_study(name)
    if isinstance(target, RunDir):
        return backends.cancel([target])
    return sweep.cancel(target) if isinstance(target, sweep.Sweep) else reproduce.cancel(target)
