"""Sweeps: the members of one, the record that it leaves, and how its members compare."""

import itertools
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from .. import places
from ..base import paths, yamlfiles
from ..base.errors import UserError, did_you_mean
from ..base.files import tensor_shapes, write_atomically
from ..base.machine import now
from ..base.yamlfiles import Config
from ..configs import models
from ..planning import lora
from ..results import run_rows
from ..runs import lookup
from ..runs.lookup import all_runs
from ..runs.rundir import Run, RunDir
from ..scores import evaluations, intervals
from ..scores.metrics import PER_ROW

PAIRED, NAME = "_", "name"
QUALITY = {"eval_loss": min} | {name: max if metric.higher_is_better else min for name, metric in PER_ROW.items()}
CRITERIA: dict[str, Callable[..., dict[str, Any]]] = {**QUALITY, "memory": min, "time": min, "bleu4_per_gib": max}
"""By what a member can be the best, and whether the least or the most of it is."""


class Member(BaseModel):
    """One config of a sweep; with several seeds there are as many members of a name.

    Attributes:
        values: what it sets, by dotted key.
        digest: of its config and data, by which its run is found.
        planned_gib: what the recipe itself needs so on a GPU.
    """

    name: str
    values: dict[str, Any]
    seed: int | None = None
    digest: str | None = None
    planned_gib: float | None = None

    @property
    def label(self) -> str:
        """Its name, and its seed where there are several."""
        return self.name if self.seed is None else f"{self.name}, seed {self.seed}"

    @property
    def overrides(self) -> list[str]:
        """Its values as --set takes them."""
        values = self.values if self.seed is None else self.values | {"seed": self.seed}
        return [f"{key}={yamlfiles.write_flow(value)}" for key, value in values.items()]


class Sweep(BaseModel):
    """A sweep over a recipe.

    Attributes:
        keys: in whose values its members differ.
        profiles: what is laid over every member.
    """

    name: str
    recipe: str
    rehearsal: bool
    keys: list[str]
    profiles: list[str] = Field(default_factory=list)
    members: list[Member]
    made: str = Field(default_factory=now)

    @property
    def label(self) -> str:
        """The name that no other sweep has."""
        return f"{self.name}/{self.recipe}{'/rehearsal' if self.rehearsal else ''}"

    def file(self, runs: Path) -> Path:
        """Where its record is."""
        kind = ".rehearsal" if self.rehearsal else ""
        return runs / "sweeps" / self.name / f"{self.recipe.replace('/', '--')}{kind}.json"

    def lock(self, runs: Path) -> Path:
        """What a command that carries it out holds."""
        return self.file(runs).with_suffix(".lock")

    def write(self, runs: Path) -> None:
        """Write its record, in the place of one of an earlier start."""
        write_atomically(self.file(runs), self.model_dump_json(indent=1) + "\n")


def read(file: Path | None, sets: Sequence[str]) -> tuple[str, list[Member]]:
    """The name and the members of a sweep, in their order: every entry of `_` with every combination of the lists.

    Args:
        file: a YAML file in Axolotl's sweep format; an entry of `_` can have a `name`.
        sets: `key=value,value` as given to --set.

    Raises:
        UserError: there is neither, it has another form, or two members have one name.
    """
    if not file and not sets:
        raise UserError("name a sweep's file, or values to try, as in --set lora_r=16,32")
    content = yamlfiles.read_yaml(file) if file else {}
    paired = content.pop(PAIRED, [{}])
    grid = {}
    for key, values in content.items():
        if not isinstance(values, list) or not values:
            raise UserError(f"{file}:{yamlfiles.line_of(file, key) if file else 0}: {key}: expected a list of values")
        grid[key] = values
    for text in sets:
        key, equals, value = text.partition("=")
        if not equals or not key.strip() or not value:
            raise UserError(f"--set {text}: expected key=value,value, as in --set lora_r=16,32")
        grid[key.strip()] = yamlfiles.parse(f"[{value}]", f"--set {text}")
    if not isinstance(paired, list) or not paired or not all(isinstance(entry, dict) for entry in paired):
        raise UserError(f"{file}: {PAIRED}: expected a list of mappings, as in `- {{name: Wide, lora_r: 64}}`")
    several = [key for key, values in grid.items() if len(values) > 1]
    members = []
    for entry, combination in itertools.product(paired, itertools.product(*grid.values())):
        chosen = dict(zip(grid, combination, strict=True))
        own = {key: value for key, value in entry.items() if key != NAME}
        named = [str(entry[NAME])] if NAME in entry else [_said(key, value) for key, value in own.items()]
        named += [_said(key, chosen[key]) for key in several]
        members.append(Member(name=", ".join(named) or "as it is", values=chosen | own))
    names = [member.name for member in members]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{file or '--set'}: two members are called {name}; give each entry of _ its own name")
    return file.stem if file else "+".join(several or grid), members


def _said(key: str, value: Any) -> str:
    return f"{key}={yamlfiles.write_flow(value)}"


def varying(members: Sequence[Member]) -> list[str]:
    """The keys in whose values some members differ."""
    keys = dict.fromkeys(key for member in members for key in member.values)
    return [key for key in keys if any(m.values.get(key) != members[0].values.get(key) for m in members)]


def find(name: str, runs: Path) -> Sweep:
    """The sweep of a name: as it was given, the whole of its label or an end of that, or `latest`.

    Raises:
        UserError: none, or more than one, is meant.
    """
    known = []
    for file in runs.glob("sweeps/*/*.json"):
        with suppress(OSError, ValidationError):
            known.append(Sweep.model_validate_json(file.read_bytes()))
    known.sort(key=lambda sweep: sweep.made)
    if name == "latest" and known:
        return known[-1]
    wanted = Path(name).stem if name.endswith((".yaml", ".yml")) else name
    meant = [sweep for sweep in known if f"/{wanted}/" in f"/{sweep.label}/"]
    if len(meant) == 1:
        return meant[0]
    labels = [sweep.label for sweep in meant or known]
    if meant:
        raise UserError(f"{name}: several sweeps are called so: {', '.join(labels)}")
    there = f"; there are {', '.join(labels)}" if labels else "; `recipe sweep` makes one"
    raise UserError(f"{name}: no sweep of that name below {runs}/{did_you_mean(name, labels) or there}")


def find_file(name: str) -> Path:
    """The file of a sweep given as a shipped one's name or as FILE.

    Raises:
        UserError: there is neither.
    """
    shipped = {file.stem: file for file in sorted((paths.RECIPES / "sweeps").glob("*.yaml"))}
    if name in shipped or Path(name).is_file():
        return shipped.get(name) or Path(name)
    hint = did_you_mean(name, shipped) or f"; there are {', '.join(shipped)}, or any YAML file"
    raise UserError(f"{name}: no sweep of that name{hint}")


def rows(sweep: Sweep, runs: Path, best: str | None = None) -> list[dict[str, Any]]:
    """A row for each name among the members: what it sets and what its finished runs measured.

    Scores are means over its seeds, with Student's interval of 95 %, or of one run with the bootstrap's over rows.
    The front is Pareto's over peak memory and a quality, see `quality_of`.

    Args:
        sweep: the sweep.
        runs: the folder with the runs.
        best: one of `CRITERIA`, by which one row is the best.
    """
    by_digest: dict[str | None, tuple[RunDir, Run]] = {}
    for folder, run in lookup.readable(all_runs(runs / sweep.recipe), places.read):
        former = by_digest.get(run.digest)
        if former is None or former[1].state != "finished" or run.state == "finished":
            by_digest[run.digest] = folder, run
    found = []
    for name, members in itertools.groupby(sweep.members, key=lambda member: member.name):
        of_name = list(members)
        found.append(_row(name, of_name, [by_digest[m.digest] for m in of_name if m.digest in by_digest]))
    quality = quality_of(found, best)
    for row in found:
        row["pareto"] = _on_front(row, found, quality)
        row["best"] = False
    if best and (ranked := [row for row in found if _criterion(row, best) is not None]):
        CRITERIA[best](ranked, key=lambda row: _criterion(row, best) or 0.0)["best"] = True
    return found


def quality_of(found: Sequence[dict[str, Any]], best: str | None = None) -> str:
    """The quality that the front is over: what was asked for, else BLEU-4 where all are scored, else the loss."""
    if best in QUALITY:
        return str(best)
    measured = [row for row in found if row["eval_loss"] is not None]
    return "bleu4" if measured and all(row["bleu4"] is not None for row in measured) else "eval_loss"


def _row(name: str, members: Sequence[Member], of_runs: Sequence[tuple[RunDir, Run]]) -> dict[str, Any]:
    done = [(folder, run) for folder, run in of_runs if run.state == "finished"]
    measured = [run_rows.row(*one) for one in done]
    scored = [evaluations.of_run(folder.path, run) for folder, run in done]
    row: dict[str, Any] = {
        "member": name,
        "values": members[0].values,
        "seeds": [member.seed for member in members if member.seed is not None],
        "runs": [str(folder.path) for folder, _ in of_runs],
        "states": [run.state for _, run in of_runs],
    }
    for score in QUALITY:
        values = [one[score] for one in measured if one[score] is not None]
        within = None
        if len(values) > 1:
            within = intervals.of_few(values)
        elif values and scored[0] and len(members) == 1:
            within = scored[0].scores["intervals"].get(score)
        row |= {score: sum(values) / len(values) if values else None, f"{score}_interval": within}
    memory = [one["peak_memory_gib"] for one in measured if one["peak_memory_gib"] is not None]
    trainable, frozen = _parameters(*done[0]) if done else (None, None)
    return row | {
        "planned_gib": members[0].planned_gib,
        "peak_memory_gib": max(memory, default=None),
        "memory_kind": measured[0]["memory_kind"] if measured else None,
        "trainable": trainable,
        "trainable_share": trainable / (trainable + frozen) if trainable and frozen else None,
        "train_seconds": sum(one["train_seconds"] for one in measured) / len(measured) if measured else None,
        "tokens_per_second": measured[0]["tokens_per_second"] if measured else None,
    }


def _parameters(folder: RunDir, run: Run) -> tuple[int | None, int | None]:
    """A run's trainable and frozen parameters; those of an older run, which has no record of them, are counted in its
    adapter and from its base model's sizes. None where they are not known."""
    if run.summary.trainable_parameters and run.summary.parameters:
        return run.summary.trainable_parameters, run.summary.parameters - run.summary.trainable_parameters
    frozen = None
    cfg: Config = yamlfiles.read_yaml(folder.config)
    shapes = tensor_shapes(folder.output / "adapter_model.safetensors") or {}
    saved = cfg.get("lora_modules_to_save") or []  # an embedding that only grew is in the file and was not trained
    trained = [name for name in shapes if "lora_" in name or any(f".{module}." in name for module in saved)]
    trainable = sum(math.prod(shapes[name]) for name in trained) or None
    with suppress(UserError):
        local = Path(run.cwd, str(cfg.get("base_model")))
        named = cfg | {"base_model": str(local)} if local.is_dir() else cfg
        frozen = lora.total(models.architecture(named, download=False))
    return trainable, frozen


def _criterion(row: dict[str, Any], name: str) -> float | None:
    memory, bleu4 = row["peak_memory_gib"], row["bleu4"]
    if name == "bleu4_per_gib":
        return bleu4 / memory if memory and bleu4 is not None else None
    value: float | None = row[{"memory": "peak_memory_gib", "time": "train_seconds"}.get(name, name)]
    return value


def _on_front(row: dict[str, Any], others: Sequence[dict[str, Any]], quality: str) -> bool:
    """Whether no other row is as good in both memory and quality, and better in one."""
    sign = 1 if QUALITY[quality] is min else -1

    def costs(one: dict[str, Any]) -> tuple[float, float] | None:
        if one["peak_memory_gib"] is None or one[quality] is None:
            return None
        return one["peak_memory_gib"], sign * one[quality]

    own = costs(row)
    if own is None:
        return False
    rivals = (other for other in map(costs, others) if other is not None and other != own)
    return not any(memory <= own[0] and loss <= own[1] for memory, loss in rivals)
