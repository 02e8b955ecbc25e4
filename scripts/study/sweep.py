"""Sweeps: members, records, and the runs of unfinished members."""

import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field

from ..base import paths, yamlfiles
from ..base.errors import UserError, meant, require_plain
from ..base.files import parse_json, read_bytes, write_atomically
from ..base.paths import find_recipe
from ..base.processes import held, now
from ..base.terminal import Bar, say
from ..check import schema
from ..config import merging, variants
from ..config.compose import Request
from ..config.gpus import Gpu
from ..config.merging import Override
from ..data import studies
from ..data.studies import Study
from ..evaluate.evaluate import EvaluationRequest
from ..evaluate.score import columns_of
from ..metrics.metric import Column
from ..run.backends import SKIPPED, Backend, TaskResult
from ..run.rundir import RunDir, find_run, is_run, run_names
from .pipeline import Pipeline, existing_runs, require_known, require_scorer_models, seeds_of, validate_all

PAIRED = "_"


class SweepMember(BaseModel):
    """One config of a sweep. Members that differ only in seed have the same name.

    Attributes:
        values: values of the settings by dotted key.
        digest: hash of config and data; identifies the member's run.
        planned_gib: planned GPU memory of the recipe with these values, even if the sweep is a rehearsal.
    """

    name: str
    values: dict[str, Any]
    seed: int | None = None
    digest: str | None = None
    planned_gib: float | None = None

    @property
    def label(self) -> str:
        """Name, with the seed if the sweep has several seeds."""
        return self.name if self.seed is None else f"{self.name}, seed {self.seed}"

    @property
    def overrides(self) -> list[Override]:
        """Overrides with the values and the seed."""
        values = self.values if self.seed is None else self.values | {"seed": self.seed}
        return [Override(key, value) for key, value in values.items()]


class Sweep(BaseModel):
    """A sweep over a recipe.

    Attributes:
        keys: keys with different values among the members.
    """

    name: str
    recipe: str
    rehearsal: bool
    keys: list[str]
    members: list[SweepMember]
    made: str = Field(default_factory=now)

    @property
    def label(self) -> str:
        """Unique name of the sweep."""
        return f"{self.name}/{self.recipe}{'/rehearsal' if self.rehearsal else ''}"

    def file(self, runs: Path) -> Path:
        """File of the sweep's record."""
        kind = ".rehearsal.json" if self.rehearsal else ".json"
        return runs / "sweeps" / self.name / f"{self.recipe.replace('/', '--')}{kind}"

    def lock(self, runs: Path) -> Path:
        """Lock file that a command holds while it carries out the sweep."""
        return self.file(runs).with_suffix(".lock")

    def write(self, runs: Path) -> None:
        """Write the record, replacing an earlier record."""
        write_atomically(self.file(runs), self.model_dump_json(indent=1) + "\n")


def sweep(
    name: str,
    members: list[SweepMember],
    requests: Sequence[Request],
    evaluation: EvaluationRequest,
    backend: Backend,
    *,
    seeds: int = 1,
    gpu: Gpu | None = None,
    dry_run: bool = False,
) -> tuple[list[Sweep], list[TaskResult]]:
    """Train and score every member of a sweep over one or several recipes.

    All members are checked and planned before the first one starts. A member that does not fit the GPU, or fails, does
    not stop the others.

    Args:
        name: name of the sweep.
        members: see `read_members`.
        requests: one request per recipe, with overrides for all members.
        evaluation: settings of each evaluation.
        backend: backend that carries out the members.
        seeds: number of seeds per member, beginning with the recipe's seed.
        gpu: GPU for which a dry run composes and plans; by default the backend's.
        dry_run: check and plan only.

    Raises:
        UserError: a member has errors, two members have the same config, or --force names an error that no member has;
            nothing was started.
        WorkFailed: BERTScore's model cannot be loaded.
    """
    records: list[Sweep] = []
    pipelines: list[Pipeline] = []
    for request in requests:
        recipe, _ = find_recipe(request.name)
        seeded = _seeded(members, request.name, seeds)
        records.append(
            Sweep(name=name, recipe=recipe, rehearsal=request.rehearse, keys=varying(members), members=seeded)
        )
        pipelines += [
            Pipeline(
                TaskResult(recipe, f"{recipe}, " * (len(requests) > 1) + re.sub(r"[/\0]", "-", member.label)),
                replace(request, overrides=member.overrides),
                evaluation,
                backend,
                gpu,
            )
            for member in seeded
        ]
    _check(pipelines, starts=not dry_run)
    _refuse_twins(pipelines)
    require_known(requests[0].force, pipelines, dry_run)
    _plan([member for record in records for member in record.members], pipelines, starts=not dry_run)
    if not dry_run:
        _carry_out(records, pipelines, evaluation, backend)
    return records, [pipeline.result for pipeline in pipelines]


def _plan(members: list[SweepMember], pipelines: list[Pipeline], starts: bool) -> None:
    with Bar("planning", len(members)) as bar:
        for done, (member, pipeline) in enumerate(zip(members, pipelines, strict=True), start=1):
            bar.begin(f"planning {pipeline.result.label}")
            member.digest = pipeline.digest()
            pipeline.plan()
            if pipeline.result.problem and starts:
                say(f"{pipeline.result.label}: {pipeline.result.problem}")
            member.planned_gib = pipeline.needed_gib
            if not starts:
                pipeline.look_up()
                left = pipeline.task().steps
                if pipeline.state == "finished":
                    pipeline.result.steps |= {step: SKIPPED for step in ("run", "evaluate") if step not in left}
            bar.update(done)


def _carry_out(
    records: list[Sweep], pipelines: list[Pipeline], evaluation: EvaluationRequest, backend: Backend
) -> None:
    runs, first = paths.runs(), records[0]
    with ExitStack() as locks:
        for record in records:
            locks.enter_context(held(record.lock(runs), f"the sweep {record.label} is already running"))
        for record in records:
            record.write(runs)
        fitting = [pipeline for pipeline in pipelines if not pipeline.result.problem]
        existing = {record.recipe: existing_runs(runs, record.recipe) for record in records}
        for pipeline in fitting:
            pipeline.existing = existing[pipeline.result.recipe].get(pipeline.digest() or "")
        tasks = [pipeline.task() for pipeline in fitting]
        require_scorer_models(tasks, of_recipe(first.recipe), evaluation, first.rehearsal)
        backend.submit(tasks, first.name)


def _seeded(members: list[SweepMember], recipe: str, seeds: int) -> list[SweepMember]:
    if seeds > 1 and any("seed" in member.values for member in members):
        raise UserError("--seeds: the sweep already sets seed; give only one of the two")
    return [member.model_copy(update={"seed": seed}) for member in members for seed in seeds_of(recipe, seeds)]


def _check(pipelines: list[Pipeline], starts: bool) -> None:
    """Check every member; before a start, also check each distinct set of rows.

    Raises:
        UserError: members have errors; each problem is listed once.
    """
    if starts:
        validate_all(pipelines)
    of_distinct_rows = list({pipeline.rows: pipeline for pipeline in pipelines}.values())
    for some, with_data in ((pipelines, False), (of_distinct_rows if starts else [], True)):
        wrong: dict[str, list[str]] = {}
        with Bar("reading the rows of members" if with_data else "checking members", len(some)) as bar:
            for done, pipeline in enumerate(some, start=1):
                if not pipeline.check(with_data, starts):
                    for problem in str(pipeline.result.problem).splitlines():
                        wrong.setdefault(problem, []).append(pipeline.result.label)
                bar.update(done)
        if wrong:
            raise UserError(
                "\n".join(
                    f"{'every member' if len(labels) == len(some) else '; '.join(labels)}: {problem}"
                    for problem, labels in wrong.items()
                )
            )


def _refuse_twins(pipelines: list[Pipeline]) -> None:
    for a, b in itertools.combinations(pipelines, 2):
        of_one = a.result.recipe == b.result.recipe
        if of_one and a.composed and b.composed and not merging.differences(a.composed.config, b.composed.config):
            raise UserError(f"{a.result.label} and {b.result.label} have the same config; remove one of them")


def of_recipe(recipe: str) -> dict[str, Column]:
    """Metrics of a recipe or variant."""
    file = file_of(recipe)
    return columns_of(variants.origin_of(recipe, file) if file else recipe)


def file_of(recipe: str) -> Path | None:
    """File of a recipe or variant; None if it was deleted, or if it is in another folder."""
    files = (paths.recipe_file(recipe), paths.VARIANTS / f"{recipe}.yaml")
    return next(filter(Path.is_file, files), None)


def read_members(file: Path | None, sets: Sequence[str]) -> tuple[str, list[SweepMember]]:
    """Read the name and members of a sweep.

    Each member combines one entry of `_` with one value of every other key; the sweep has all such combinations. A
    member is named after its entry's `name`, or that entry's settings, and its value of each key with several values. A
    sweep is named after its file and `sets`, because a sweep with other values has a record of its own.

    Args:
        file: a YAML file in Axolotl's sweep format, in which entries of `_` can have a `name`.
        sets: `key=value,value` from --set, or `key=[value, value]` if the key takes no list.

    Raises:
        UserError: both arguments are empty, an argument is malformed, or two members have the same name.
    """
    if not file and not sets:
        raise UserError("no values to try; give a sweep file, or values as in --set lora_r=16,32")
    grid = yamlfiles.read_yaml(file) if file else {}
    paired = grid.pop(PAIRED, [{}])
    for key, values in grid.items():
        if not isinstance(values, list) or not values:
            raise UserError(f"{file}:{yamlfiles.line_of(file, key) if file else 0}: {key}: expected a list of values")
    names = [file.stem] if file else []
    for text in sets:
        key, values = merging.parse_overrides(text)
        if len(values) == 1 and values[0] and isinstance(values[0], list) and not schema.takes(key, values[0]):
            [values] = values
        grid[key] = values
        shown = f"{key}={','.join(map(yamlfiles.write_flow, values))}"
        names.append(re.sub(r"(?a)[^\w.,=+-]+", "-", shown))  # usable in a file name
    if not isinstance(paired, list) or not paired or not all(isinstance(entry, dict) for entry in paired):
        raise UserError(f"{file}: {PAIRED}: expected a list of mappings, as in `- {{name: Wide, lora_r: 64}}`")
    several = [key for key, values in grid.items() if len(values) > 1]
    members = []
    for entry, combination in itertools.product(paired, itertools.product(*grid.values())):
        chosen = dict(zip(grid, combination, strict=True))
        own = {key: value for key, value in entry.items() if key != "name"}
        named = [str(entry["name"])] if "name" in entry else settings(own)
        named += settings({key: chosen[key] for key in several})
        members.append(SweepMember(name=", ".join(named) or "as it is", values=chosen | own))
    for name, count in Counter(member.name for member in members).items():
        if count > 1:
            raise UserError(f"{file or '--set'}: two members are called {name}; give each entry of _ a different name")
    full_name = "+".join(names)
    short_name = f"{full_name[:191]}-{hashlib.sha256(full_name.encode()).hexdigest()[:8]}"
    return full_name if len(full_name) <= 200 else short_name, members


def settings(values: Mapping[str, Any]) -> list[str]:
    """Values as key=value texts for --set."""
    return [f"{key}={yamlfiles.write_flow(value)}" for key, value in values.items()]


def varying(members: Sequence[SweepMember]) -> list[str]:
    """Keys with different values among the members."""
    keys = dict.fromkeys(key for member in members for key in member.values)
    return [key for key in keys if any(m.values.get(key) != members[0].values.get(key) for m in members)]


def find_any(name: str) -> RunDir | Sweep | Study:
    """Find a run, sweep or study by part of its name, see `meant`.

    Raises:
        UserError: no name or several names match.
    """
    runs = paths.runs()
    if name == "latest" or is_run(Path(name)):
        return find_run(name, runs)
    sweeps = recorded_sweeps()
    folders = {folder.name: folder for folder in paths.studies()}
    named = run_names(runs)
    choices = [*named, *sweeps, *folders]
    recipes, hint = paths.recipe_names(), f" below {runs}/; there are {', '.join([*folders, *sweeps])}"
    try:
        chosen = meant(name, choices, "run, sweep or study", hint)
    except UserError:
        chosen = meant(name, [*choices, *recipes], "run, sweep, study or recipe", hint)
        if chosen in recipes:
            raise UserError(f"{name}: no run of {chosen} below {runs}/; `recipe run {chosen}` starts one") from None
    also = f"{chosen}/rehearsal"
    if choices.count(chosen) > 1 or (chosen != name and also in sweeps):  # `recipe cancel` must not stop the wrong run
        several = f"{chosen} or {also}" if also in sweeps else "a run, a sweep or a study"
        raise UserError(f"{name}: ambiguous: {several}; give the full name, or a run folder")
    if chosen in folders:
        return studies.load(folders[chosen])
    return sweeps[chosen] if chosen in sweeps else find_run(chosen, runs)


def recorded_sweeps() -> dict[str, Sweep]:
    """Started sweeps by label, oldest first."""
    recorded = []
    for file in paths.runs().glob("sweeps/*/*.json"):
        with suppress(OSError, ValueError):
            recorded.append(Sweep.model_validate(parse_json(read_bytes(file))))
    return {sweep.label: sweep for sweep in sorted(recorded, key=lambda sweep: sweep.made)}


def find_sweep_file(name: str) -> Path:
    """Find a sweep file by path, or a shipped sweep file by partial name.

    Raises:
        UserError: no name or several names match, or the name has a control character.
    """
    require_plain(name)
    shipped = {file.stem: file for file in sorted((paths.RECIPES / "sweeps").glob("*.yaml"))}
    if name in shipped or Path(name).is_file():
        return shipped.get(name) or Path(name)
    return shipped[meant(name, shipped, "sweep", f"; there are {', '.join(shipped)}, or any YAML file")]
