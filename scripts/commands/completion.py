"""What a shell completes: names from files and folders, without what reads these in earnest and loads for longer."""

from collections.abc import Sequence
from pathlib import Path

import typer

from ..base import paths, yamlfiles
from ..base.files import read_json


def _beginning(incomplete: str, names: Sequence[str]) -> list[str]:
    """The names that begin like this; where none does the ends of their paths that do, which stand for them."""
    ends = ["/".join(name.split("/")[level:]) for name in names for level in range(1, name.count("/") + 1)]
    whole, parts = ([name for name in dict.fromkeys(some) if name.startswith(incomplete)] for some in (names, ends))
    return whole or parts


def _yaml_files(incomplete: str) -> list[str]:
    folder = incomplete.rpartition("/")[0]
    place = Path(folder or ".")
    files = sorted(place.iterdir()) if place.is_dir() else []
    return [f"{folder}/{file.name}" if folder else file.name for file in files if file.suffix in (".yaml", ".yml")]


def recipes(incomplete: str) -> list[str]:
    """Recipes, variants and YAML files."""
    return _beginning(incomplete, [*paths.variant_names(), *paths.recipe_names(), *_yaml_files(incomplete)])


def runs(context: typer.Context, incomplete: str) -> list[str]:
    """`latest`, the recipes that have runs, and these."""
    folder = _runs_folder(context)
    found = sorted(file.parent.relative_to(folder) for file in folder.rglob("run.json"))
    of_recipes = dict.fromkeys(run.parent.as_posix() for run in found)
    return _beginning(incomplete, [*["latest"][: len(found)], *of_recipes, *(run.name for run in found)])


def things(context: typer.Context, incomplete: str) -> list[str]:
    """Runs as above, studies, and the sweeps that were started."""
    folder = _runs_folder(context) / "sweeps"
    files = sorted(file.relative_to(folder).as_posix() for file in folder.glob("*/*.json"))  # see Sweep.file
    labels = [file.removesuffix(".json").replace(".rehearsal", "/rehearsal").replace("--", "/") for file in files]
    return [*runs(context, incomplete), *_beginning(incomplete, [*labels, *(study.name for study in paths.studies())])]


def _runs_folder(context: typer.Context) -> Path:
    return Path(context.find_root().params.get("runs") or paths.runs())


def sweep_files(incomplete: str) -> list[str]:
    """The shipped sweeps, and YAML files."""
    shipped = sorted(file.stem for file in (paths.RECIPES / "sweeps").glob("*.yaml"))
    return _beginning(incomplete, [*shipped, *_yaml_files(incomplete)])


def profiles(incomplete: str) -> list[str]:
    """The shipped profiles, and YAML files."""
    shipped = sorted(file.stem for file in paths.PROFILES.glob("*.yaml"))
    return _beginning(incomplete, [*shipped, *_yaml_files(incomplete)])


def gpus(incomplete: str) -> list[str]:
    """The GPUs in the case that was begun with, without spaces, which would divide them for a shell."""
    from ..configs.gpus import catalogue

    names = [name.replace(" ", "-") for name in catalogue()]
    names += [name.removeprefix("RTX-") for name in names]
    matching = [name for name in names if name.lower().startswith(incomplete.lower())]
    return [incomplete + name[len(incomplete) :] for name in dict.fromkeys(matching)]


def studies(incomplete: str) -> list[str]:
    """The studies."""
    return _beginning(incomplete, [folder.name for folder in paths.studies()])


def keys(incomplete: str) -> list[str]:
    """The keys of Axolotl's configuration, each to be given a value."""
    return _beginning(incomplete, [f"{key}=" for key in read_json(paths.RECIPES / "axolotl.schema.json")["properties"]])


def data_sets(incomplete: str) -> list[str]:
    """The data sets of the studies."""
    of_studies = (yamlfiles.read_yaml(folder / "study.yaml")["data"] for folder in paths.studies())
    return _beginning(incomplete, [data["key"] for data in of_studies])
