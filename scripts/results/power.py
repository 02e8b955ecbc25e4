"""What a study's runs could tell apart: `recipe results --power`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import variance
from typing import Any

from .. import tables
from ..base.errors import UserError
from ..data.study import Study
from ..metrics.metric import Column
from ..scores import evaluations, noise
from ..scores.noise import MeanSquares, Variances
from . import comparable, repeats, verdict
from .repeats import Found

SEEDS = (1, 2, 3, 5, 10)
PARTS = (1, 2, 4)  # of the test set: all, a half, a quarter
CHANCE = 0.8
_FEWEST = 10  # rows that a chance is given for


@dataclass(frozen=True)
class Basis:
    """What the variances are from, in words, and on how many rows the runs are scored."""

    variances: Variances
    rows: int
    words: str


def outlook(of_study: Study, runs: Path, difference: float | None = None) -> dict[str, Any]:
    """The chance to see a difference from a published score in the study's first metric, by seeds and rows.

    To see it is to have a 95 % interval of the mean of our runs that excludes a value so far from the truth.

    Args:
        of_study: the study.
        runs: the folder with the runs.
        difference: in the metric's unit; by default the study's tolerance, or a hundredth of the metric's range.

    Returns:
        `metric`, `difference` and where that is from, what the variances rest on, the standard deviations, and `rows`:
        for each number of seeds and of rows the chance to see it, the smallest difference seen with 80 %, and the
        chance to see one where there is none.

    Raises:
        UserError: the noise of rows, or that of seeds, is not known yet; or there is no difference to take.
    """
    column = of_study.first
    difference, why = _difference(of_study, column, difference)
    basis = _basis(of_study, column, runs)
    if not basis.variances.deviation(1, 1):
        raise UserError(f"--power {of_study.folder.name}: all rows of {basis.words} score the same; nothing is noise")
    if basis.rows < _FEWEST:
        raise UserError(f"--power {of_study.folder.name}: {basis.rows} rows are too few to plan with; score more")
    known = next(filter(None, (of_study.repeats(recipe, column.name) for recipe in of_study.published)), [])
    rows = []
    for part in PARTS:
        if (count := basis.rows // part) >= _FEWEST:
            for seeds in SEEDS:
                planned = noise.power(basis.variances, seeds, count, known)
                rows.append(
                    {
                        "seeds": seeds,
                        "rows": count,
                        "sees": planned.sees(difference),
                        "smallest": planned.smallest(CHANCE),
                        "false_alarms": planned.sees(0),
                    }
                )
    of = basis.variances
    return {
        "study": of_study.folder.name,
        "metric": column.name,
        "difference": difference,
        "difference_from": why,
        "rests_on": basis.words,
        "one_run": f"rows, and {noise.BORROWED}" if known else noise.ROWS_ONLY,
        "deviation_of_runs": of.of_runs**0.5,
        "deviation_of_rows": of.of_rows**0.5,
        "deviation_of_a_row_in_a_run": of.rest**0.5,
        "rows": rows,
    }


def _difference(of_study: Study, column: Column, given: float | None) -> tuple[float, str]:
    if given is not None:
        return given, "--difference"
    if column.name in of_study.tolerances:
        return of_study.tolerances[column.name], "the study's tolerance"
    if column.metric.high is None:
        raise UserError(f"--power {of_study.folder.name}: give --difference, in the unit of {column.label}")
    return (column.metric.high - column.metric.low) / 100, "a hundredth of the metric's range"


def _basis(of_study: Study, column: Column, runs: Path) -> Basis:
    """The variances as the runs there show them; where these are of one seed, the spread of published repeats."""
    name = of_study.folder.name
    if column.metric.of_rows is None:
        raise UserError(f"--power {name}: {column.label} has no score for each row, so that rows show no noise")
    known = {r: values for r, of in of_study.published.items() if (values := of.repeats.get(column.name))}
    scored = [(group, table) for group in _groups(of_study, runs) if (table := repeats.by_row(column.name, group))]
    most = max((len(table[0]) for _, table in scored), default=0)
    scored = [(group, table) for group, table in scored if len(table[0]) == most > 1]
    several = [(group, table) for group, table in scored if len({repr(repeats.seed(f)) for f, _ in group}) > 1]
    if several:
        layouts: list[MeanSquares] = [noise.mean_squares(table) for _, table in several]
        words = " and ".join(f"{len(group)} runs of {group[0][1].recipe}" for group, _ in several)
        return Basis(noise.estimated(layouts), most, words)
    if not known:
        lacks = f"`recipe reproduce {name} --seeds 3` makes runs that show it"
        raise UserError(f"--power {name}: how far runs with other seeds lie apart is not known yet; {lacks}")
    recipe, values = next(iter(known.items()))
    of_runs = variance(values)
    borrowed = f"{len(values)} published repeats of {recipe}"
    if scored:
        of_rows = sum(variance(table[0]) for _, table in scored) / len(scored)
        which = " and ".join(group[0][1].recipe for group, _ in scored)
        return Basis(Variances(of_runs, of_rows, 0.0), most, f"{borrowed}, and the rows of {which}")
    metric, published = column.metric, of_study.published[recipe].scores.get(column.name)
    if metric.all_or_nothing and metric.high is not None and published and of_study.data.scored_rows:
        of_rows = (published.value - metric.low) * (metric.high - published.value)
        words = f"{borrowed}, and rows that are right or wrong, {published.value:g} % of them right as published"
        if of_rows >= 0:  # otherwise no score can be as published
            return Basis(Variances(of_runs, of_rows, 0.0), of_study.data.scored_rows, words)
    lacks = f"`recipe reproduce {name} --only {recipe}` makes a run that shows it"
    raise UserError(f"--power {name}: how far rows lie apart is not known yet; {lacks}")


def _groups(of_study: Study, runs: Path) -> list[list[Found]]:
    """The runs of a study whose scores compare with its published ones, those that repeat each other together."""
    usable = [
        (folder, run)
        for folder, run in verdict.usable(runs, rehearsal=False)
        if run.origin in {*of_study.published, *of_study.variants}
        and comparable.comparable(evaluations.of_run(folder.path, run), run, of_study.first)
    ]
    groups: list[list[Found]] = []
    for each in usable:
        if all(each[0].path != folder.path for group in groups for folder, _ in group):
            groups.append(repeats.of(each, usable))
    return groups


def show(found: dict[str, Any], of_study: Study, form: tables.Form) -> None:
    """Print what `outlook` returns, in a form of `tables.Form`."""
    if form == "json":
        tables.print_json(found)
        return
    column, difference = of_study.first, tables.text_of(float(found["difference"]))
    rows: Sequence[dict[str, Any]] = [
        {
            "seeds": row["seeds"],
            "rows": row["rows"],
            f"sees {difference}": f"{row['sees']:.0%}",
            f"smallest seen, {CHANCE:.0%}": row["smallest"],
            "false alarms": f"{row['false_alarms']:.0%}",
        }
        for row in found["rows"]
    ]
    if form == "csv":
        tables.write(found["rows"], form)
        return
    tables.write(rows, form, f"{column.label}: what runs of {found['study']} can tell from a published score")
    for line in _notes(found, difference):
        tables.print_text(line)


def _notes(found: dict[str, Any], difference: str) -> list[str]:
    of_runs, of_rows, rest = (
        tables.text_of(float(found[f"deviation_of_{what}"])) for what in ("runs", "rows", "a_row_in_a_run")
    )
    of_rest = f", and {rest} of a row between runs" if found["deviation_of_a_row_in_a_run"] else ""
    return [
        f"{difference} is {found['difference_from']}. Seen is a score whose 95 % interval excludes one so far away.",
        f"Rests on {found['rests_on']}.",
        f"Standard deviations: {of_runs} between runs, {of_rows} between rows{of_rest}.",
        f"The interval of one run is of {found['one_run']}.",
        "A false alarm is a difference that is seen where there is none; 5 % are usual.",
    ]
