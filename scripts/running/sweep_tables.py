"""How the members of a sweep are printed."""

from collections import Counter
from typing import Any

from .. import tables
from ..base import yamlfiles
from ..results.listing import REHEARSALS
from . import sweeps
from .sweeps import Columns, Sweep


def show(sweep: Sweep, scored: Columns, rows: list[dict[str, Any]], best: str | None, form: tables.Form) -> None:
    """Print the rows of `sweeps.rows` with the columns of `sweeps.columns`, in a form of `tables.Form`."""
    if form in ("json", "csv"):
        tables.write(rows if form == "json" else [_flat(sweep, row) for row in rows], form)
        return
    title = f"{sweep.name}: {sweep.recipe}"
    if sweep.rehearsal:
        title = f"{title}. {REHEARSALS}"
    spare = ("minutes", "trained", "95 %", "planned GiB", "eval loss")
    asked = {best: scored[best]} if best and best in scored else {}
    tables.write([cells(sweep, dict([*scored.items()][:1]) | asked, row) for row in rows], form, title, spare=spare)
    for line in notes(sweep, scored, rows, best):
        tables.print_text(line)


def notes(sweep: Sweep, scored: Columns, rows: list[dict[str, Any]], best: str | None) -> list[str]:
    """The notes below the table."""
    front = [row["member"] for row in rows if row["pareto"]]
    lines = [f"Pareto front over peak memory and {sweeps.LOSS}: {'; '.join(front)}"] if front else []
    found = next((row["member"] for row in rows if row["best"]), "none: not measured, or on test rows only")
    lines += [f"Best by {best}: {found}"] if best else []
    if any(row["planned_gib"] is not None for row in rows):
        of_what = "Memory planned is the recipe's on a GPU"
        lines.append(f"{of_what}, measured the rehearsal's process on the CPU." if sweep.rehearsal else f"{of_what}.")
    methods = dict.fromkeys(row[f"{name}_interval_method"] for name in scored for row in rows)
    if known := [method for method in methods if method]:
        lines.append(f"Intervals are of {'; '.join(known)}.")
    return lines


def cells(sweep: Sweep, scored: Columns, row: dict[str, Any]) -> dict[str, Any]:
    """A member's row: its values of the keys that vary, its scores, the first with its interval, and its costs."""
    first, *others = scored.values()
    values = {key: _yaml(row["values"].get(key)) for key in sweep.keys if not row["member"].startswith(f"{key}=")}
    wanted = max(len(row["seeds"]), 1)
    states = Counter(row["states"] + ["not begun"] * (wanted - len(row["states"])))
    share = row["trainable_share"]
    seconds = row["train_seconds"]
    return {
        "member": row["member"],
        **values,
        "state": next(iter(states)) if wanted == 1 else ", ".join(f"{n} {state}" for state, n in states.items()),
        "eval loss": row["eval_loss"],
        first.label: row[first.name],
        "95 %": row[f"{first.name}_interval"],
        **{column.label: row[column.name] for column in others},
        "trained": None if share is None else f"{share:.2%}",
        "planned GiB": row["planned_gib"],
        "measured GiB": row["peak_memory_gib"],
        "minutes": None if seconds is None else f"{seconds / 60:.1f}",
        "front": "*" if row["pareto"] else None,
        "best": "*" if row["best"] else None,
    }


def _yaml(value: Any) -> str | None:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    return None if value is None else yamlfiles.write_flow(value)


def _flat(sweep: Sweep, row: dict[str, Any]) -> dict[str, Any]:
    """A row without nested values, as CSV needs it."""
    flat = {key: value for key, value in row.items() if key not in ("values", "runs", "states", "seeds")}
    for score in [key.removesuffix("_interval") for key in row if key.endswith("_interval")]:
        flat[f"{score}_low"], flat[f"{score}_high"] = flat.pop(f"{score}_interval") or (None, None)
    return {"member": flat.pop("member")} | {key: _yaml(row["values"].get(key)) for key in sweep.keys} | flat
