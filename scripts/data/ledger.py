"""A study's ledger: the records in its folder results/, which anybody can add to, and what numbers rest on them.

`recipe results --export` writes a record; see scripts/results/ledger.py.
"""

import json
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import pairwise
from math import inf
from pathlib import Path
from statistics import mean
from typing import Any

from pydantic import ValidationError

from ..base import paths, private, yamlfiles
from ..base.errors import UserError, did_you_mean
from ..base.progress import say
from ..metrics import registry
from ..metrics.judge import Judge as Declared
from ..metrics.metric import Column
from .ledger_record import Judge, Record, Score
from .study import Study

FOLDER = "results"


def read(file: Path, of_study: Study, shipped: bool = False) -> Record:
    """The record in a file of a study's ledger.

    Args:
        file: the file.
        of_study: the study.
        shipped: whether it is among the project's own records, where no rehearsal may be.

    Raises:
        UserError: it holds none, or one that gives something private away, that contradicts itself or the study, or
            that is of a rehearsal and must not be; all that is wrong is named.
    """
    try:
        content = json.loads(file.read_bytes(), object_pairs_hook=_once)
        record = Record.model_validate_json(json.dumps(content))
    except ValidationError as error:
        wrong = [*in_words(error)]
    except OSError as error:
        wrong = [str(error.strerror)]
    except (ValueError, RecursionError) as error:
        wrong = [f"not a record of `recipe results --export`: {error}"]
    else:
        wrong = [*problems(record, of_study, private.names_here())]
        if shipped and record.rehearsal:
            wrong.append("rehearsal: the ledger holds none; hand in records of real runs")
    if wrong:
        lines = (f"{paths.shown(file)}: {what}" for what in wrong)
        raise UserError("\n".join(re.sub(r"[\x00-\x1f\x7f-\x9f]", " ", line) for line in lines))  # it is anybody's text
    return record


def in_words(error: ValidationError) -> Iterator[str]:
    """What is wrong with the form of a record, each with its place."""
    for found in error.errors():
        place = ".".join(map(str, found["loc"]))
        yield f"{place}: {yamlfiles.in_words(found)}".removeprefix(": ")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; what stands under a key that comes twice would be read by nobody."""
    read: dict[str, Any] = {}
    for key, value in pairs:
        if key in read:
            raise ValueError(f"the key {key} occurs twice")
        read[key] = value
    return read


def problems(record: Record, of_study: Study, names: Collection[str] = ()) -> Iterator[str]:
    """What is wrong with a record beyond its form: what it gives away, and what it says of another study than this.

    Args:
        names: those of machines and users, which must not be in it.
    """
    content = record.model_dump(mode="json")
    known = {*of_study.published, *of_study.beside}
    data = of_study.data
    files = {f"{name}.jsonl" for name in (*data.splits, *data.subsets)}
    ours = known | files | {of_study.folder.name, *of_study.columns}
    for place, text in private.texts(content):
        is_hash = place.endswith(("sha256", "revision"))  # whose pattern the model has checked
        # a user can be called torch, or max as in max_new_tokens: keys are of the form, and have been checked
        not_in_it = () if place.startswith("packages") or place.endswith(("a key", "memory_kind")) else names
        if text not in ours and not is_hash and (revealed := private.problem(text, not_in_it)):
            yield f"{place}: {revealed}; a record must hold nothing of the kind"
    if record.study != of_study.folder.name or record.recipe not in known:
        hint = did_you_mean(record.recipe, known) or f"; there are {', '.join(known)}"
        yield f"recipe: {record.recipe} is no recipe of {of_study.folder.name}{hint}"
    for i, file in enumerate(record.data):
        if file.name not in files:
            yield f"data.{i}.name: {file.name} is no file of the study's data; there are {', '.join(sorted(files))}"
    yield from _of_scores(record, of_study)


def _of_scores(record: Record, of_study: Study) -> Iterator[str]:
    evaluation = record.evaluation
    if of_study.first.name not in evaluation.scores:
        yield f"evaluation.scores: {of_study.first.name} is missing, the study's first metric"
    if not record.rehearsal and evaluation.test_set != of_study.data.scored_on:
        yield f"evaluation.test_set: published scores are on {of_study.data.scored_on}, not {evaluation.test_set}"
    if not record.rehearsal and evaluation.decoding != of_study.decoding:
        yield "evaluation.decoding: is not the study's"
    for name, score in evaluation.scores.items():
        yield from (
            f"evaluation.scores.{name}: {what}" for what in _of_score(score, of_study.columns.get(name), record)
        )


def _of_score(score: Score, column: Column | None, record: Record) -> Iterator[str]:
    try:
        same = column is not None and column.same_scores(registry.column(column.name, score.metric))
    except registry.WrongMetric as error:
        yield str(error)
        return
    if column is None or not same:
        yield "is no metric of the study's, or declared otherwise than there"
        return
    low, high = score.interval or (score.value, score.value)
    least, most = column.metric.low, inf if column.metric.high is None else column.metric.high
    rounding = 1e-9 * max(abs(score.value), 1)
    if any(after < before - rounding for before, after in pairwise((least, low, score.value, high, most))):
        yield f"the score and its interval are not in order between {least:g} and {most:g}"
    if score.interval and not column.metric.of_rows:
        yield "it has no interval over rows"
    if column.judged != (score.judge is not None):
        yield "the model that judges it is not named" if column.judged else "no model judges it"
    elif score.judge and not record.rehearsal and not is_declared(score.judge, column):
        yield f"{score.judge.model} judged it, and not the model that the study declares"


def is_declared(judge: Judge, column: Column) -> bool:
    """Whether the judge of a score is the one that a study declares, from the hub or from a folder of that name."""
    declared = column.parameters
    assert isinstance(declared, Declared)
    same_layer = declared.layer in (None, judge.layer)
    return not judge.stand_in and same_layer and judge.model in (declared.model, declared.model.rpartition("/")[2])


def records(of_study: Study, rehearsal: bool = False, strict: bool = False) -> list[tuple[Path, Record]]:
    """A study's records with their files: those of real runs, or of rehearsals. They lie in `FOLDER` beside the study's
    recipes, and in the same place below recipes/ of the current folder.

    Args:
        strict: whether to take only those beside the recipes, and raise an error for one that is wrong; else that is
            reported on stderr and left out.

    Raises:
        UserError: see `read`; or two are of the same run.
    """
    name = of_study.folder.name
    folders = {(recipes / name).resolve(): recipes / name / FOLDER for recipes, _ in paths.homes()}
    found: dict[tuple[str, float], tuple[Path, Record]] = {}
    for place, folder in folders.items():
        for file in sorted(folder.glob("*.json")) if not strict or place == of_study.folder.resolve() else ():
            try:
                record = read(file, of_study, shipped=place.parent == paths.RECIPES.resolve())
                former = found.setdefault((record.evaluation.adapter_sha256, record.training.seconds), (file, record))
                if former[0] != file:
                    raise UserError(f"{paths.shown(file)}: is of the same run as {former[0].name}; delete one")
            except UserError as error:
                if strict:
                    raise
                say(str(error))
    return [(file, record) for file, record in found.values() if record.rehearsal == rehearsal]


def summary(of_study: Study, some: Sequence[Record]) -> list[dict[str, Any]]:
    """What stands behind each recipe's numbers, a row for each kind of machine, in the order of the study.

    Returns:
        `recipe`, `hardware`, `records`, how many there are; for each metric NAME its mean, with NAME_low and NAME_high,
        of several records the lowest and highest, of one its 95 % interval; the highest `peak_gib` and `planned_gib`;
        the means of `tokens_per_second` and `hours`.
    """
    groups: dict[tuple[str, str], list[Record]] = {}
    for recipe in (*of_study.published, *of_study.beside):
        for record in some:
            if record.recipe == recipe and (record.is_the_recipes or record.rehearsal):
                groups.setdefault((recipe, str(record.machine)), []).append(record)
    return [
        {"recipe": recipe, "hardware": hardware, "records": len(group)}
        | _scores(of_study, group)
        | {
            "peak_gib": max(_known(record.training.peak_gib for record in group), default=None),
            "planned_gib": max(_known(record.training.planned_gib for record in group), default=None),
            "tokens_per_second": _mean(record.training.tokens_per_second for record in group),
            "hours": _mean(record.training.seconds / 3600 for record in group),
        }
        for (recipe, hardware), group in groups.items()
    ]


def by_recipe(of_study: Study) -> dict[str, dict[str, Any]]:
    """For each of a study's recipes that has records, on whatever machines, the scores as in `summary`."""
    groups: dict[str, list[Record]] = {}
    for _, record in records(of_study):
        if record.is_the_recipes:
            groups.setdefault(record.recipe, []).append(record)
    return {recipe: {"records": len(group)} | _scores(of_study, group) for recipe, group in groups.items()}


def _scores(of_study: Study, group: Sequence[Record]) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for name in of_study.columns:
        scores = [record.evaluation.scores[name] for record in group if name in record.evaluation.scores]
        values = [score.value for score in scores]
        ends = (min(values), max(values)) if len(values) > 1 else scores[0].interval if scores else None
        row |= {
            name: _mean(values),
            f"{name}_low": ends[0] if ends else None,
            f"{name}_high": ends[1] if ends else None,
        }
    return row


def _known(values: Iterable[float | None]) -> Iterator[float]:
    return (value for value in values if value is not None)


def _mean(values: Iterable[float | None]) -> float | None:
    known = [*_known(values)]
    return mean(known) if known else None
