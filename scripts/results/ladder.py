"""The ladder of a study: the published score, the authors' predictions scored by us, their adapter generated with and
scored by us, and our own training. Where two of them differ, what lies between them is the cause."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..data.published import Predictions, Score, adapter_files
from ..data.study import Study
from ..metrics.metric import Column
from ..scores import released
from ..scores.evaluations import ELSEWHERE, Evaluation, current
from ..terminal import tables
from . import verdict

Name = Literal["published", "predictions", "adapter", "training"]
RUNGS: tuple[Name, ...] = ("published", "predictions", "adapter", "training")
BETWEEN = ("scoring", "generation", "training")  # what lies between each and the next
TITLE = "The ladder, from the published score down to our training"
Problems = Mapping[tuple[str, str], str]
"""Why a rung cannot be had, by its owner's name and its own."""


@dataclass(frozen=True)
class Owner:
    """A recipe, or a baseline, whose authors published more than its scores.

    Attributes:
        recipe: its recipe; None for a baseline.
        test_set: the one that the published scores are on.
        adapter: the folder of the adapter among the files of the study's data.
    """

    name: str
    recipe: str | None
    scores: dict[str, Score]
    test_set: str
    predictions: Predictions | None = None
    adapter: str | None = None

    @property
    def predicted_on(self) -> str:
        """The test set that the published predictions are of."""
        return (self.predictions.test_set if self.predictions else None) or self.test_set


def owners(of_study: Study, only: Sequence[str] = ()) -> list[Owner]:
    """Those of a study: its recipes, and without `only`, which names some of these, its baselines too."""
    on = of_study.data.test_set
    found = [
        Owner(recipe, recipe, of.scores, on, of.predictions, of.adapter)
        for recipe, of in of_study.published.items()
        if recipe in only or not only
    ]
    if not only:
        found += [Owner(b.name, None, b.scores, b.test_set, b.predictions) for b in of_study.baselines]
    return [owner for owner in found if owner.predictions or owner.adapter]


def folder(of_study: Study, runs: Path, owner: Owner, rung: str) -> Path:
    """The folder for what is made at a rung."""
    name = owner.name.removeprefix(f"{of_study.folder.name}/")
    return runs / "ladder" / of_study.folder.name / re.sub(r"[^\w.-]+", "-", name).strip("-") / rung


def scored_in(of_study: Study, runs: Path, owner: Owner) -> dict[str, Path]:
    """The folders for the scores of published predictions, by test set."""
    sets = released.test_sets(of_study, owner.predicted_on) if owner.predictions else []
    return {test_set: folder(of_study, runs, owner, f"predictions-{test_set}") for test_set in sets}


def adapter_folder(of_study: Study, runs: Path, owner: Owner, rehearsal: bool) -> Path:
    """The folder for what is generated with a published adapter; a rehearsal has one of its own."""
    return folder(of_study, runs, owner, "adapter-rehearsal" if rehearsal else "adapter")


@dataclass
class Rung:
    """A rung, and its scores where it is there.

    Attributes:
        alike: what two evaluations of ours have in common whose scores may be compared.
        whole: whether it is of all rows of its test set, decoded as the study says.
        verified: whether the study has checksums of the files that it is made of.
    """

    owner: Owner
    name: Name
    test_set: str | None
    rows: int | None = None
    values: dict[str, float | None] = field(default_factory=dict)
    intervals: dict[str, list[float]] = field(default_factory=dict)
    alike: dict[str, Any] | None = None
    whole: bool = True
    verified: bool | None = None
    problem: str | None = None

    def compares_with(self, other: "Rung") -> bool:
        """Whether it is of the same rows as another one."""
        if self.alike and other.alike:
            return self.alike == other.alike
        return self.test_set is not None and self.test_set == other.test_set and self.whole and other.whole


def rows(
    of_study: Study,
    runs: Path,
    rehearsal: bool,
    trained: Sequence[Mapping[str, Any]],
    problems: Problems | None = None,
    down_to: Name = "training",
    only: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """The rungs of a study as far as they were evaluated, a row each, owner by owner.

    Args:
        of_study: the study.
        runs: the folder with the runs.
        rehearsal: whether it is about rehearsals, which have only the two last rungs.
        trained: the rows of `verdict.rows`.
        problems: why some cannot be had; those that are missing for another reason say so themselves.
        down_to: the last rung that is listed even if it is missing.
        only: recipes; by default all, and the baselines.

    Returns:
        Rows with `of`, `rung`, `test_set` and `rows`; for each metric NAME, NAME_low and NAME_high, NAME_published,
        NAME_difference from that, NAME_step from the rung above on the same rows, and NAME_says, what that means;
        `verified`; and `problem`, why the rung is missing.
    """
    of_recipes = {full["recipe"]: full for full in trained}
    table = []
    for owner in owners(of_study, only):
        above: list[Rung] = []
        for rung in _rungs(of_study, runs, rehearsal, owner, of_recipes, problems or {}):
            if rung.values or RUNGS.index(rung.name) <= RUNGS.index(down_to):
                table.append(_row(of_study, rung, above))
                above.append(rung)
    return table


def begun(
    of_study: Study, runs: Path, rehearsal: bool, trained: Sequence[Mapping[str, Any]], only: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """All rungs of a study, see `rows`; none where none between the published scores and our training has a score."""
    rungs = rows(of_study, runs, rehearsal, trained, only=only)
    between = [row for row in rungs if row["rung"] in ("predictions", "adapter")]
    return rungs if any(row[name] is not None for row in between for name in of_study.columns) else []


def _rungs(
    of_study: Study, runs: Path, rehearsal: bool, owner: Owner, of_recipes: Mapping[str, Any], problems: Problems
) -> Iterator[Rung]:
    name = of_study.folder.name
    if not rehearsal:
        yield Rung(owner, "published", owner.test_set, values={key: s.value for key, s in owner.scores.items()})
        for test_set, where in scored_in(of_study, runs, owner).items():
            rung = Rung(owner, "predictions", test_set)
            absent = owner.predictions.absent if owner.predictions else None
            rung.problem = problems.get((owner.name, "predictions"), absent)
            scored = None if rung.problem else released.read_released(where)
            if scored:
                rung.verified = scored.verified
                _take(rung, of_study, scored)
            elif not rung.problem:
                rung.problem = f"not scored yet; `recipe reproduce {name} --from predictions` does that"
            yield rung
    if owner.recipe is None:
        return
    rung = Rung(owner, "adapter", owner.test_set)
    rung.problem = problems.get((owner.name, "adapter")) or (None if owner.adapter else "none is published")
    made = None if rung.problem else current(adapter_folder(of_study, runs, owner, rehearsal))
    if made:
        files = adapter_files(of_study.data, str(owner.adapter))
        rung.verified = all(of_study.data.files[file].sha256 for file in files)
        _take(rung, of_study, made)
    elif not rung.problem:
        rung.problem = f"not evaluated yet; `recipe reproduce {name} --from adapter` does that"
    yield rung
    rung = Rung(owner, "training", owner.test_set)
    full = of_recipes.get(owner.recipe) or {}
    trained = current(Path(full["run"])) if full.get("run") else None
    if trained and full.get("rows") and full["state"] == "finished" and full["generated_by"] != ELSEWHERE:
        _take(rung, of_study, trained)
        for name in rung.values:  # means over several seeds, where there are these
            rung.values[name] = full[name]
            if full[f"{name}_low"] is not None:
                rung.intervals[name] = [full[f"{name}_low"], full[f"{name}_high"]]
    else:
        rung.problem = f"no finished run whose model was evaluated here; `recipe reproduce {name}` makes one"
    yield rung


def _take(rung: Rung, of_study: Study, scored: released.Released | Evaluation) -> None:
    """Give a rung its scores: those of the metrics as the study declares them."""
    rung.rows = scored.scores["rows"]
    same = [name for name, column in of_study.columns.items() if column.same_scores(scored.columns.get(name))]
    rung.values = {name: scored.scores.get(name) for name in same}
    rung.intervals = {name: scored.scores["intervals"][name] for name in same if name in scored.scores["intervals"]}
    if isinstance(scored, Evaluation):
        settings = scored.settings
        rung.test_set = settings.test_set
        rung.alike = settings.model_dump(include={"data_sha256", "rows", "decoding"})
        rung.whole = settings.limit is None and settings.decoding == of_study.decoding


def _row(of_study: Study, rung: Rung, above: Sequence[Rung]) -> dict[str, Any]:
    row: dict[str, Any] = {"of": rung.owner.name, "rung": rung.name, "test_set": rung.test_set, "rows": rung.rows}
    for name, column in of_study.columns.items():
        ours, interval = rung.values.get(name), rung.intervals.get(name)
        comparable = [one for one in above if one.values.get(name) is not None and rung.compares_with(one)]
        top = comparable[0] if comparable and comparable[0].name == "published" else None
        row |= {
            name: ours,
            f"{name}_low": interval[0] if interval else None,
            f"{name}_high": interval[1] if interval else None,
            f"{name}_published": top.values[name] if top and ours is not None else None,
            f"{name}_difference": _step(rung, top, name),
            f"{name}_step": _step(rung, comparable[-1], name) if comparable else None,
            f"{name}_says": _says(of_study, rung, comparable, column),
        }
    return row | {"verified": rung.verified, "problem": rung.problem}


def _step(rung: Rung, other: Rung | None, name: str) -> float | None:
    ours, theirs = rung.values.get(name), other.values.get(name) if other else None
    return None if ours is None or theirs is None else ours - theirs


def _says(of_study: Study, rung: Rung, comparable: Sequence[Rung], column: Column) -> str | None:
    """What the difference from the rung above means: which of scoring, generation and training agree or differ."""
    name = column.name
    if rung.name == "published" or rung.values.get(name) is None:
        return None
    if not comparable:
        return f"no other score is on {of_study.data.title_of(rung.test_set)}" if rung.test_set else None
    above = comparable[-1]
    parts = BETWEEN[RUNGS.index(above.name) : RUNGS.index(rung.name)]
    if not parts:
        return None
    *first, last = parts
    what = f"{', '.join(first)} and {last}" if first else last
    step = _step(rung, above, name) or 0.0
    theirs = above.owner.scores[name] if above.name == "published" else Score(value=above.values[name] or 0.0)
    if parts == ("scoring",):  # of the same texts, so that nothing but rounding may differ
        agrees = abs(step) <= _half_a_digit(theirs.value) + (theirs.spread or 0)
    else:
        how_near = verdict.verdict(theirs.value + step, rung.intervals.get(name), theirs, of_study.tolerances.get(name))
        if how_near is None:
            return f"{what}: {_signed(step)}"
        agrees = how_near != verdict.OFF
    if agrees:
        return f"{what} {'agree' if first else 'agrees'}"
    return f"{what} {'differ' if first else 'differs'} by {_signed(step)}"


def _half_a_digit(value: float) -> float:
    """Half a unit of the last digit that a number is printed with."""
    return 0.5 * 10.0 ** -len(f"{value!r}".partition(".")[2]) * (1 + 1e-9)


def _signed(step: float) -> str:
    return f"{'+' if step > 0 else ''}{tables.text_of(float(step))}"


def of_metric(rows: Sequence[Mapping[str, Any]], column: Column) -> list[dict[str, Any]]:
    """The rungs by one metric, as they are printed."""
    name = column.name
    return [
        {
            "of": row["of"],
            "rung": row["rung"],
            "test set": row["test_set"],
            "rows": row["rows"],
            column.label: row[name],
            "95 %": None if row[f"{name}_low"] is None else [row[f"{name}_low"], row[f"{name}_high"]],
            "published": row[f"{name}_published"],
            "difference": row[f"{name}_difference"],
            "what that says": "missing, see below" if row["problem"] else row[f"{name}_says"],
        }
        for row in rows
    ]


def by_metric(rows: Sequence[Mapping[str, Any]], of_study: Study) -> dict[str, list[dict[str, Any]]]:
    """The rungs by each metric that one below the published scores has, and always by the first."""
    of_ours = [row for row in rows if row["rung"] != "published"]
    shown = [
        column
        for name, column in of_study.table.items()
        if name == of_study.first.name or any(row[name] is not None for row in of_ours)
    ]
    return {column.label: of_metric(rows, column) for column in shown}


def notes(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The lines under the tables: why rungs are missing, and what is not verified."""
    missing: dict[str, list[str]] = {}
    for row in rows:
        if row["problem"]:
            missing.setdefault(row["problem"], []).append(f"{row['of']}, {row['rung']}")
    for problem, which in missing.items():
        yield f"{'; '.join(dict.fromkeys(which))}: {problem}"
    if unverified := dict.fromkeys(f"{row['of']}, {row['rung']}" for row in rows if row["verified"] is False):
        yield f"Not verified, as study.yaml lacks a checksum: {'; '.join(unverified)}"


def show(of_study: Study, rows: Sequence[Mapping[str, Any]], form: tables.Form) -> None:
    """Print the rungs, in a form of `tables.Form` but JSON and CSV, which have `rows`."""
    for i, (label, of_one) in enumerate(by_metric(rows, of_study).items()):
        spare = ["published", "rows", "test set", "95 %", "difference"]
        tables.write(of_one, form, label if i else f"{TITLE}: {label}", empty=True, spare=spare)
    for line in notes(rows):
        tables.print_text(line)
