"""The shipped recipes and the variants of them: `recipe list`. It reads study.yaml without the models of a study, which
take longer to build than all of the rest."""

from pathlib import Path
from typing import Any

from ..base import paths, yamlfiles
from ..base.errors import UserError
from ..base.files import Row
from ..base.progress import say
from ..configs import config


def recipes() -> list[Row]:
    """Every shipped recipe and every variant in the working folder: its study, base model, epochs, optimizer, the
    published scores as `published_METRIC`, and the recipe that a variant is from.

    A variant or a study that cannot be read is reported on stderr.
    """
    rows = []
    studies = {folder.name: _declared(folder) for folder in paths.studies()}
    shipped = {name: paths.recipe_file(name) for name in paths.recipe_names()}
    own = {name: paths.VARIANTS / f"{name}.yaml" for name in paths.variant_names() if name not in shipped}
    for name, file in (shipped | own).items():
        try:
            recipe = yamlfiles.read_yaml(file)
            variant_of = config.parent_of(name, file) if name in own else None
            study = str(name if name in shipped else config.origin_of(name, file)).partition("/")[0]
        except UserError as error:
            say(str(error))
            continue
        row: Row = {
            "recipe": name,
            "study": study if study in studies else None,
            "base_model": recipe.get("base_model"),
            "epochs": recipe.get("num_epochs"),
            "optimizer": recipe.get("optimizer"),
            "variant_of": variant_of,
        }
        declared = studies.get(study, {})
        scores = _mapping(_mapping(_mapping(declared.get("published")).get(name)).get("scores"))
        for metric in _mapping(declared.get("metrics")):
            score = scores.get(metric)
            row[f"published_{metric}"] = score.get("value") if isinstance(score, dict) else score
        rows.append(row)
    return rows


def _declared(folder: Path) -> yamlfiles.Config:
    try:
        return yamlfiles.read_yaml(folder / "study.yaml")
    except UserError as error:
        say(str(error))
        return {}


def _mapping(value: Any) -> dict[str, Any]:
    """A value if it is a mapping, otherwise an empty one; `recipe study check` reports a malformed value."""
    return value if isinstance(value, dict) else {}


def tables_of(rows: list[Row]) -> list[tuple[str | None, list[Row]]]:
    """The rows of `recipes` in a table for each study, and one for those of no study; each with a title where there are
    several."""
    by_study: dict[str | None, list[Row]] = {}
    for row in rows:
        by_study.setdefault(row["study"], []).append(_shown(row))
    several = len(by_study) > 1
    return [(f"{name or 'Of no study'}" if several else None, table) for name, table in by_study.items()]


def _shown(row: Row) -> Row:
    scores = {key.removeprefix("published_"): value for key, value in row.items() if key.startswith("published_")}
    shown = {key: row[key] for key in ("recipe", "epochs", "optimizer")} | scores
    return shown | {"base model": row["base_model"], "variant of": row["variant_of"]}
