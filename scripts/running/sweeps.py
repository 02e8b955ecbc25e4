"""Sweeps: the members of a sweep, its record, and how its members compare."""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from ..base import paths, yamlfiles
from ..base.errors import UserError, did_you_mean, meant
from ..base.files import tensor_shapes, write_atomically
from ..base.machine import now
from ..base.yamlfiles import Config
from ..configs import models, variants
from ..data import study
from ..metrics.metric import Column
from ..planning import lora
from ..results import repeats, run_rows
from ..runs.rundir import Run, RunDir
from ..scores import evaluation_rows, evaluations
from ..scores.columns import columns_of
from . import former

PAIRED = "_"
LOSS = "eval_loss"
_COSTS = {"memory": "peak_memory_gib", "time": "train_seconds"}
Columns = Mapping[str, Column]


class SweepMember(BaseModel):
    """One config of a sweep; with several seeds there are as many members of a name.

    Attributes:
        values: what it sets, by dotted key.
        digest: of its config and data; it identifies its run.
        planned_gib: what the recipe itself needs on a GPU with these values.
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
        return [_setting(key, value) for key, value in values.items()]


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
    members: list[SweepMember]
    made: str = Field(default_factory=now)

    @property
    def label(self) -> str:
        """The name that no other sweep has."""
        return f"{self.name}/{self.recipe}{'/rehearsal' if self.rehearsal else ''}"

    def file(self, runs: Path) -> Path:
        """The file of its record."""
        kind = ".rehearsal.json" if self.rehearsal else ".json"
        return runs / "sweeps" / self.name / f"{self.recipe.replace('/', '--')}{kind}"

    def lock(self, runs: Path) -> Path:
        """The lock that a command holds while it carries the sweep out."""
        return self.file(runs).with_suffix(".lock")

    def write(self, runs: Path) -> None:
        """Write its record, replacing that of an earlier start."""
        write_atomically(self.file(runs), self.model_dump_json(indent=1) + "\n")


def read(file: Path | None, sets: Sequence[str]) -> tuple[str, list[SweepMember]]:
    """The name and the members of a sweep, in order: every entry of `_` with every combination of the lists.

    Args:
        file: a YAML file in Axolotl's sweep format; an entry of `_` can have a `name`.
        sets: `key=value,value` as given to --set.

    Raises:
        UserError: neither is given, one is malformed, or two members have the same name.
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
        own = {key: value for key, value in entry.items() if key != "name"}
        named = [str(entry["name"])] if "name" in entry else [_setting(key, value) for key, value in own.items()]
        named += [_setting(key, chosen[key]) for key in several]
        members.append(SweepMember(name=", ".join(named) or "as it is", values=chosen | own))
    for name, count in Counter(member.name for member in members).items():
        if count > 1:
            raise UserError(f"{file or '--set'}: two members are called {name}; give each entry of _ its own name")
    return file.stem if file else "+".join(several or grid), members


def _setting(key: str, value: Any) -> str:
    return f"{key}={yamlfiles.write_flow(value)}"


def varying(members: Sequence[SweepMember]) -> list[str]:
    """The keys in whose values some members differ."""
    keys = dict.fromkeys(key for member in members for key in member.values)
    return [key for key in keys if any(m.values.get(key) != members[0].values.get(key) for m in members)]


def find(name: str, runs: Path) -> Sweep:
    """The sweep of a name: its label or a part of that, see `meant`, or `latest`.

    Raises:
        UserError: there is none, or more than one.
    """
    recorded = []
    for file in runs.glob("sweeps/*/*.json"):
        with suppress(OSError, ValidationError):
            recorded.append(Sweep.model_validate_json(file.read_bytes()))
    recorded.sort(key=lambda sweep: sweep.made)
    if name == "latest" and recorded:
        return recorded[-1]
    wanted = Path(name).stem if name.endswith((".yaml", ".yml")) else name
    labels = {sweep.label: sweep for sweep in recorded}
    there = f"there are {', '.join(labels)}" if labels else "`recipe sweep` makes one"
    found = meant(wanted, labels, "sweep", f" below {runs}/; {there}")
    if found != wanted and (rehearsal := f"{found}/rehearsal") in labels:  # one of them is not to stop for the other
        raise UserError(f"{name}: may be {found} or {rehearsal}; give its whole name")
    return labels[found]


def find_file(name: str) -> Path:
    """The file of a sweep given by the name of a shipped one or a part of that, or as FILE.

    Raises:
        UserError: there is none, or several are meant.
    """
    shipped = {file.stem: file for file in sorted((paths.RECIPES / "sweeps").glob("*.yaml"))}
    if name in shipped or Path(name).is_file():
        return shipped.get(name) or Path(name)
    return shipped[meant(name, shipped, "sweep", f"; there are {', '.join(shipped)}, or any YAML file")]


def columns(sweep: Sweep, runs: Path) -> dict[str, Column]:
    """What a sweep's runs were scored with; where there are none yet, what its recipe's would be."""
    of_digest = former.by_digest(runs, sweep.recipe)
    found: dict[str, Column] = {}
    for folder, run in (of_digest[m.digest] for m in sweep.members if m.digest in of_digest):
        found |= run_rows.columns(run, evaluations.current(folder.path, run))
    return found or of_recipe(sweep.recipe)


def of_recipe(recipe: str) -> dict[str, Column]:
    """What the runs of a recipe, or of a variant of one, are scored with."""
    origin: str | None = recipe
    with suppress(UserError):  # it is no longer there
        origin = variants.origin(*paths.find_recipe(recipe))
    return columns_of(origin)


def qualities(scored: Columns) -> dict[str, Callable[..., Any]]:
    """The eval loss and scores, and for each whether the least or the most of it is the best."""
    return {LOSS: min} | {name: column.better for name, column in scored.items()}


def criteria(scored: Columns) -> dict[str, Callable[..., Any]]:
    """Ranking criteria, and whether the least or the most of each is the best. Scores are of test rows, which choose no
    member: its score would then be too good."""
    of_loss = {name: column for name, column in scored.items() if column.metric.of_loss}
    return qualities(of_loss) | dict.fromkeys(_COSTS, min)


def check_best(best: str | None, scored: Columns) -> None:
    """Refuse what a member cannot be the best by.

    Raises:
        UserError: it is not one of `criteria`.
    """
    if best and best not in criteria(scored):
        hint = did_you_mean(best, criteria(scored))
        problem = "a score of test rows, which choose no member; name" if best in scored else "not"
        raise UserError(f"--best {best}: {problem} one of {', '.join(criteria(scored))}{hint}")


def rows(sweep: Sweep, runs: Path, best: str | None = None) -> list[dict[str, Any]]:
    """A row for each name among the members: what it sets and what its finished runs measured.

    Scores are means over seeds, with their 95 % interval, see `intervals.of_runs`. The Pareto front is over peak memory
    and eval loss. Where the runs validate on test rows, there is no front, and no best by eval loss.

    Args:
        sweep: the sweep.
        runs: the folder with the runs.
        best: one of `criteria`, to mark the best row by.

    Raises:
        UserError: see `check_best`.
    """
    scored = columns(sweep, runs)
    check_best(best, scored)
    of_digest = former.by_digest(runs, sweep.recipe)
    by_name = [list(of_name) for _, of_name in itertools.groupby(sweep.members, key=lambda member: member.name)]
    compared = [
        _row(of_name, [of_digest[m.digest] for m in of_name if m.digest in of_digest], scored) for of_name in by_name
    ]
    done = (of_digest[m.digest] for m in sweep.members if m.digest in of_digest)
    validated = next((_validates(*one) for one in done if one[1].state == "finished"), False)
    for row in compared:
        row["pareto"] = validated and on_front(row, compared, "peak_memory_gib")
        row["best"] = False
    key = _COSTS.get(best, best) if best else LOSS
    if best and (validated or best in _COSTS) and (ranked := [row for row in compared if row[key] is not None]):
        criteria(scored)[best](ranked, key=lambda row: row[key])["best"] = True
    return compared


def _validates(folder: RunDir, run: Run) -> bool:
    """True if the run's eval loss is of validation rows, which may choose a member."""
    return evaluation_rows.validation(run, yamlfiles.read_yaml(folder.config)) is not None


def on_front(row: dict[str, Any], compared: Sequence[dict[str, Any]], cost: str) -> bool:
    """Whether a row is on the Pareto front: no other is as good in both a cost and eval loss, and better in one."""

    def losses(some: dict[str, Any]) -> tuple[float, float] | None:
        return None if None in (some.get(cost), some.get(LOSS)) else (some[cost], some[LOSS])

    own = losses(row)
    rivals = [other for other in map(losses, compared) if other not in (None, own)]
    return own is not None and not any(rival[0] <= own[0] and rival[1] <= own[1] for rival in rivals if rival)


def _row(members: Sequence[SweepMember], of_runs: Sequence[tuple[RunDir, Run]], scored: Columns) -> dict[str, Any]:
    """The row of the members of a name; of the finished runs of these, the first stands for what is alike in all."""
    done = [(folder, run) for folder, run in of_runs if run.state == "finished"]
    measured = [run_rows.row(folder, run) for folder, run in done]
    row: dict[str, Any] = {
        "member": members[0].name,
        "values": members[0].values,
        "seeds": [member.seed for member in members if member.seed is not None],
        "runs": [str(folder.path) for folder, _ in of_runs],
        "states": [run.state for _, run in of_runs],
    }
    of_study = study.of(done[0][1].origin) if done and not done[0][1].rehearsal else None
    for score in qualities(scored):
        of_score = [(each, run[score]) for each, run in zip(done, measured, strict=True) if run.get(score) is not None]
        values = [value for _, value in of_score]
        known = of_study.repeats(done[0][1].origin, score) if of_study else []
        within = repeats.interval(score, [each for each, _ in of_score], values, known) if values else None
        row |= {
            score: sum(values) / len(values) if values else None,
            f"{score}_interval": [within.low, within.high] if within else None,
            f"{score}_interval_method": within.method if within else None,
        }
    trainable, frozen = _parameters(*done[0]) if done else (None, None)
    first = measured[0] if measured else {}
    return row | {
        "planned_gib": members[0].planned_gib,
        "peak_memory_gib": max((run["peak_memory_gib"] for run in measured if run["peak_memory_gib"]), default=None),
        "memory_kind": first.get("memory_kind"),
        "trainable": trainable,
        "trainable_share": trainable / (trainable + frozen) if trainable and frozen else None,
        "train_seconds": sum(run["train_seconds"] for run in measured) / len(measured) if measured else None,
        "tokens_per_second": first.get("tokens_per_second"),
    }


def _parameters(folder: RunDir, run: Run) -> tuple[int | None, int | None]:
    """A run's trainable and frozen parameters; those of an older run, which has no record of them, are counted in its
    adapter and from its base model's sizes. None where they are not known."""
    if run.summary.trainable_parameters and run.summary.parameters:
        return run.summary.trainable_parameters, run.summary.parameters - run.summary.trainable_parameters
    frozen = None
    cfg: Config = yamlfiles.read_yaml(folder.config)
    shapes = tensor_shapes(folder.output / "adapter_model.safetensors") or {}
    saved = cfg.get("lora_modules_to_save") or []  # an embedding that only grew is in the file, but was not trained
    trained = [name for name in shapes if "lora_" in name or any(f".{module}." in name for module in saved)]
    trainable = sum(math.prod(shapes[name]) for name in trained) or None
    with suppress(UserError):
        local = Path(run.cwd, str(cfg.get("base_model")))
        named = cfg | {"base_model": str(local)} if local.is_dir() else cfg
        frozen = lora.total(models.architecture(named, download=False), anew=False)
    return trainable, frozen
