"""What the ledgers of studies hold, as tables: `recipe results --ledger`."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..base.progress import say
from ..data import ledger
from ..data.ledger_record import Record
from ..data.study import Study
from ..runs import provenance
from ..terminal import tables
from .catalogue import published

TITLE = "Measured by those who ran them"
REHEARSALS = "Records of rehearsals (small stand-in model, few rows; no recipe's numbers)"
APART = "Records of variants, or of recipes as they were before: no recipe's numbers"
Found = tuple[Study, list[tuple[Path, Record]]]
_SPARE = ("planned GiB", "tokens/s", "published", "range", "hours", "peak GiB")


def table(of_study: Study, rows: Sequence[dict[str, Any]], compared: bool = True) -> list[dict[str, Any]]:
    """The rows of `ledger.summary` as a table's.

    Args:
        compared: whether the published scores stand beside them.
    """
    first, *others = of_study.table
    shown = []
    for row in rows:
        aim = of_study.aimed_at(row["recipe"])
        theirs = {"published": published(aim.scores.get(first) if aim else None)} if compared else {}
        shown.append(
            {
                "recipe": row["recipe"],
                "hardware": row["hardware"],
                "records": row["records"],
                of_study.columns[first].label: row[first],
                "range": None if row[f"{first}_low"] is None else [row[f"{first}_low"], row[f"{first}_high"]],
                **theirs,
                **{of_study.columns[name].label: row[name] for name in others},
                "peak GiB": row["peak_gib"],
                "planned GiB": row["planned_gib"],
                "tokens/s": round(row["tokens_per_second"]) if row["tokens_per_second"] else None,
                "hours": row["hours"],
            }
        )
    return shown


def show(studies: Sequence[Study], rehearsal: bool, form: tables.Form) -> None:
    """Print what the ledgers of studies hold, in a form of `tables.Form`; as JSON the records themselves."""
    of_studies = [(of_study, ledger.records(of_study, rehearsal)) for of_study in studies]
    if form == "json":
        tables.write([_as_json(*found) for _, records in of_studies for found in records], form)
        return
    if not any(records for _, records in of_studies):
        kind = "record of a rehearsal" if rehearsal else "record"
        say(f"no {kind} in any ledger here; `recipe results --export RUN` writes one, and CONTRIBUTING.md says more")
    if form == "csv":
        tables.write(_of_one_shape(of_studies), form)
        return
    for of_study, found in of_studies:
        records = [record for _, record in found]
        name = f": {of_study.folder.name}" if len(studies) > 1 else ""
        spare = [*(column.label for column in [*of_study.table.values()][:0:-1]), *_SPARE]
        if rows := ledger.summary(of_study, records):
            of_form = table(of_study, rows, not rehearsal)
            tables.write(of_form, form, f"{REHEARSALS if rehearsal else TITLE}{name}", spare=spare)
        notes = Counter(provenance.other_axolotl(record.packages) for record in records)
        for note, count in notes.items():
            if note:
                say(f"{count} of the {len(records)} records{name}: {note}")
        apart = [record for record in records if not (record.is_the_recipes or rehearsal)]
        if apart:
            tables.write(
                [_apart(of_study, record) for record in apart], form, f"{APART}{name}", spare=spare, below=["changed"]
            )


def _of_one_shape(of_studies: Sequence[Found]) -> list[dict[str, Any]]:
    """The rows of `ledger.summary` of several studies with the same keys, those of scores that a study lacks empty."""
    rows = [
        {"study": of_study.folder.name} | row
        for of_study, found in of_studies
        for row in ledger.summary(of_study, [record for _, record in found])
    ]
    keys = dict.fromkeys(key for row in rows for key in row)
    return [{key: row.get(key) for key in keys} for row in rows]


def _as_json(file: Path, record: Record) -> dict[str, Any]:
    derived = {"file": file.name, "hardware": str(record.machine), "is_the_recipes": record.is_the_recipes}
    return derived | record.model_dump(mode="json")


def _apart(of_study: Study, record: Record) -> dict[str, Any]:
    """A record that stands behind no recipe's number, as a row."""
    scores = {column.label: record.evaluation.scores.get(name) for name, column in of_study.table.items()}
    changes = ", ".join(f"{key}: {tables.text_of(value)}" for key, value in record.changed.items())
    return {
        "recipe": record.recipe,
        "hardware": str(record.machine),
        **{label: score and score.value for label, score in scores.items()},
        "peak GiB": record.training.peak_gib,
        "tokens/s": round(record.training.tokens_per_second) if record.training.tokens_per_second else None,
        "hours": record.training.seconds / 3600,
        "changed": changes or "the recipe, since",
    }
