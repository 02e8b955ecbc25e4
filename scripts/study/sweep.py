"""Sweeps: trials, records, and the runs of unfinished trials."""

import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, Field

from ..base import paths, yamlfiles
from ..base.errors import UserError, meant, recipe_command
from ..base.files import parse_json, read_bytes, write_atomically
from ..base.paths import find_recipe
from ..base.processes import held, now
from ..base.terminal import Bar, warn
from ..base.yamlfiles import Config
from ..config import merging
from ..config.compose import Request
from ..config.gpus import Gpu
from ..config.merging import Override
from ..config.origin import origin_of
from ..data import studies
from ..data.studies import Study
from ..evaluate.evaluate import EvaluationRequest
from ..evaluate.score import columns_of
from ..metrics.metric import Column
from ..run import backends
from ..run.backends import SKIPPED, Backend, TaskResult
from ..run.rundir import RunDir, all_runs, find_run, is_run, readable, run_names
from .pipeline import (
    Pipeline,
    pipelines_of,
    require_known,
    require_scorer_models,
    seeds_of,
    validate_all,
)

PAIRED = "_"
NAME = "name"
"""Key of an entry of `_` that names the entry's trials."""


class Trial(BaseModel):
    """One config of a sweep. Trials that differ only in seed have the same name.

    Attributes:
        settings: values of the settings by dotted key.
        digest: hash of config and data; identifies the trial's run.
        planned_gib: planned GPU memory of the recipe with these values, even if the sweep is a rehearsal.
    """

    name: str
    settings: Config
    seed: int | None = None
    digest: str | None = None
    planned_gib: float | None = None

    @property
    def label(self) -> str:
        """Name, with the seed if the sweep has several seeds."""
        return self.name if self.seed is None else f"{self.name}, seed {self.seed}"

    @property
    def overrides(self) -> list[Override]:
        """Overrides with the settings and the seed."""
        settings = self.settings if self.seed is None else self.settings | {"seed": self.seed}
        return [Override(key, value) for key, value in settings.items()]


class Sweep(BaseModel):
    """A sweep over a recipe.

    Attributes:
        keys: keys in which the trials differ.
    """

    name: str
    recipe: str
    rehearsal: bool
    keys: list[str]
    trials: list[Trial]
    started: str = Field(default_factory=now)

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


@dataclass
class Grid:
    """Values to combine, from a sweep file, from --set, or from both.

    Attributes:
        source: the sweep file, or --set, for messages.
        values: values to combine, by dotted key.
        titles: parts of the sweep's name.
        entries: settings that are tried together, see `PAIRED`; by default a single entry without settings.
    """

    source: str
    values: dict[str, list[Any]]
    titles: list[str]
    entries: list[Config] = field(default_factory=lambda: [{}])

    @classmethod
    def from_file(cls, file: Path) -> Self:
        """Read a YAML file in Axolotl's sweep format, in which entries of `_` can have a `name`.

        Raises:
            UserError: the file is malformed.
        """
        values = yamlfiles.read_yaml(file)
        entries = values.pop(PAIRED, [{}])
        for key, tried in values.items():
            if not isinstance(tried, list) or not tried:
                raise UserError("expected a list of values", file=file, line=yamlfiles.line_of(file, [key]), key=key)
        if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
            problem = "expected a list of mappings, as in `- {name: Wide, lora_r: 64}`"
            raise UserError(problem, file=file, key=PAIRED)
        return cls(str(file), values, [file.stem], entries)

    @classmethod
    def from_overrides(cls, texts: Sequence[str]) -> Self:
        """Parse `key=value,value` from --set.

        Raises:
            UserError: a text is malformed, or two have the same key.
        """
        grid = cls("--set", {}, [])
        for text in texts:
            key, values = merging.parse_overrides(text)
            if key in grid.values:
                remedy = f"give all values at once, as in --set {key}=1,2"
                raise UserError(f"{key} is given twice", key="--set", remedy=remedy)
            grid.values[key] = values
            title = f"{key}={','.join(map(yamlfiles.write_flow, values))}"
            grid.titles.append(re.sub(r"(?a)[^\w.,=+-]+", "-", title))  # usable in a file name
        return grid

    def merged(self, overrides: "Grid") -> "Grid":
        """Grid with the values of another grid, which replace those of the same key."""
        return replace(self, values=self.values | overrides.values, titles=[*self.titles, *overrides.titles])

    @property
    def name(self) -> str:
        """Name of the sweep: its file and its values from --set, because each such sweep has a record of its own."""
        name = "+".join(self.titles)
        if len(name) <= 200:
            return name
        return f"{name[:191]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"

    def trials(self) -> list[Trial]:
        """Trials: every combination of an entry with a value of each key.

        Raises:
            UserError: there are no values, or two trials have the same name.
        """
        if not self.titles:
            raise UserError("no values to try; give a sweep file, or values as in --set lora_r=16,32")
        trials = []
        for entry in self.entries:
            for combination in itertools.product(*self.values.values()):
                trials.append(self._trial(entry, dict(zip(self.values, combination, strict=True))))
        name, count = Counter(trial.name for trial in trials).most_common(1)[0]
        if count > 1:
            remedy = "give each entry of _ a different name"
            raise UserError(f"two trials are called {name}", file=self.source, remedy=remedy)
        return trials

    def _trial(self, entry: Config, values: Config) -> Trial:
        """Trial with an entry's settings and one value of each key, named after them."""
        settings = {key: value for key, value in entry.items() if key != NAME}
        titles = [str(entry[NAME])] if NAME in entry else _texts(settings)
        titles += _texts({key: values[key] for key in self._varied})
        return Trial(name=", ".join(titles) or "as it is", settings=values | settings)

    @property
    def _varied(self) -> list[str]:
        """Keys with several values to combine."""
        return [key for key, values in self.values.items() if len(values) > 1]

    def keys(self) -> list[str]:
        """Keys in which the trials differ."""
        keys = self._varied
        for entry in self.entries:
            keys += entry
        return [key for key in dict.fromkeys(keys) if key != NAME]


def _texts(values: Mapping[str, Any]) -> list[str]:
    """Values as `key=value`."""
    return [Override(key, value).text for key, value in values.items()]


def sweep(
    grid: Grid,
    requests: Sequence[Request],
    evaluation: EvaluationRequest,
    backend: Backend,
    *,
    seeds: int = 1,
    gpu: Gpu | None = None,
    dry_run: bool = False,
) -> tuple[list[Sweep], list[TaskResult]]:
    """Train and score every trial of a sweep over one or several recipes.

    All trials are checked and planned before the first one starts. A trial that does not fit the GPU, or fails, does
    not stop the others.

    Args:
        grid: values to combine.
        requests: one request per recipe, with overrides for all trials.
        evaluation: settings of each evaluation.
        backend: backend that carries out the trials.
        seeds: number of seeds per trial, beginning with the recipe's seed.
        gpu: GPU for which a dry run composes and plans; by default the backend's.
        dry_run: check and plan only.

    Raises:
        UserError: a trial has errors, two trials have the same config, or --force names an error that no trial has;
            nothing was started.
        WorkFailed: BERTScore's model cannot be loaded.
    """
    trials = grid.trials()
    records = []
    requested = []
    for request in requests:
        recipe, _ = find_recipe(request.name)
        seeded = _seeded(trials, request.name, seeds)
        record = Sweep(name=grid.name, recipe=recipe, rehearsal=request.rehearse, keys=grid.keys(), trials=seeded)
        records.append(record)
        for trial in record.trials:
            label = re.sub(r"[/\0]", "-", trial.label)
            if len(requests) > 1:
                label = f"{recipe}, {label}"
            requested.append((TaskResult(recipe, label), replace(request, overrides=trial.overrides)))
    results = [result for result, _ in requested]
    pipelines = pipelines_of(requested, evaluation, backend, gpu)
    _check(pipelines, results, starts=not dry_run)
    _refuse_twins(pipelines)
    require_known(requests[0].force, pipelines, dry_run)
    _plan([trial for record in records for trial in record.trials], pipelines, starts=not dry_run)
    if not dry_run:
        _carry_out(records, pipelines, evaluation, backend)
    return records, results


def _plan(trials: list[Trial], pipelines: list[Pipeline], starts: bool) -> None:
    """Plan every trial, and record its memory and its digest.

    Args:
        starts: False to leave out the steps that existing runs have finished.
    """
    with Bar("planning", len(trials)) as bar:
        for done, (trial, pipeline) in enumerate(zip(trials, pipelines, strict=True), start=1):
            bar.begin(f"planning {pipeline.result.label}")
            trial.digest = pipeline.digest()
            pipeline.look_up()
            pipeline.plan()
            trial.planned_gib = pipeline.needed_gib
            if not starts:
                _skip_finished_steps(pipeline)
            elif pipeline.result.problem:
                warn(f"{pipeline.result.label}: {pipeline.result.problem}")
            bar.update(done)


def _skip_finished_steps(pipeline: Pipeline) -> None:
    """Record the steps that a trial's existing run has finished."""
    if pipeline.state == "finished":
        remaining = pipeline.task().steps
        for step in ("run", "evaluate"):
            if step not in remaining:
                pipeline.result.steps[step] = SKIPPED


def _carry_out(
    records: list[Sweep], pipelines: list[Pipeline], evaluation: EvaluationRequest, backend: Backend
) -> None:
    runs, first = paths.runs(), records[0]
    with ExitStack() as locks:
        for record in records:
            locks.enter_context(held(record.lock(runs), f"the sweep {record.label} is already running"))
        for record in records:
            record.write(runs)
        tasks = [pipeline.task() for pipeline in pipelines if not pipeline.result.problem]
        require_scorer_models(tasks, default_columns(first.recipe), evaluation, first.rehearsal)
        backend.submit(tasks, first.name)


def _seeded(trials: list[Trial], recipe: str, seeds: int) -> list[Trial]:
    """Trials, each with several seeds if these are requested."""
    seeded = []
    for trial in trials:
        for seed in seeds_of(recipe, seeds, trial.settings):
            seeded.append(trial.model_copy(update={"seed": seed}))
    return seeded


def _check(pipelines: list[Pipeline], results: list[TaskResult], starts: bool) -> None:
    """Check every trial; before a start, also check each distinct set of rows.

    Args:
        pipelines: pipelines of the trials with a valid config.
        results: results of all trials.

    Raises:
        UserError: trials have errors; each error is listed once.
    """
    if starts:
        validate_all(pipelines)
    with Bar("checking trials", len(pipelines)) as bar:
        for done, pipeline in enumerate(pipelines, start=1):
            pipeline.check_config(starts)
            bar.update(done)
    _refuse_errors(results)
    if not starts:
        return
    distinct = {pipeline.rows_digest: pipeline for pipeline in pipelines}
    with Bar("reading the rows of trials", len(distinct)) as bar:
        for done, pipeline in enumerate(distinct.values(), start=1):
            pipeline.check_rows()
            bar.update(done)
    _refuse_errors([pipeline.result for pipeline in distinct.values()])


def _refuse_errors(results: Sequence[TaskResult]) -> None:
    """Raise UserError if trials have errors: each error once, with the labels of its trials."""
    labels: dict[str, list[str]] = {}
    for result in results:
        for error in result.errors:
            labels.setdefault(error, []).append(result.label)
    lines = []
    for error, trials in labels.items():
        lines.append(f"{'every trial' if len(trials) == len(results) else '; '.join(trials)}: {error}")
    if lines:
        raise UserError("\n".join(lines))


def _refuse_twins(pipelines: list[Pipeline]) -> None:
    for a, b in itertools.combinations(pipelines, 2):
        if (a.result.recipe, a.composed.config) == (b.result.recipe, b.composed.config):
            raise UserError(f"{a.result.label} and {b.result.label} have the same config; remove one of them")


def cancel(sweep: Sweep) -> list[str]:
    """Ask the command that carries out a sweep to stop, or else its runs; return a message per process or job."""
    return backends.cancel(runs_of_sweep(sweep), [sweep.lock(paths.runs())])


def runs_of_sweep(sweep: Sweep) -> list[RunDir]:
    """Runs of a sweep's trials, oldest first."""
    digests = {trial.digest for trial in sweep.trials}
    return [folder for folder, run in readable(all_runs(paths.runs() / sweep.recipe)) if run.digest in digests]


def default_columns(recipe: str) -> dict[str, Column]:
    """Metrics of a recipe or variant, see `columns_of`."""
    file = file_of(recipe)
    origin = origin_of(recipe, file) if file else None
    return columns_of(origin or recipe)


def file_of(recipe: str) -> Path | None:
    """File of a recipe or variant; None if it was deleted, or if it is in another folder."""
    files = (paths.recipe_file(recipe), paths.VARIANTS / f"{recipe}.yaml")
    return next(filter(Path.is_file, files), None)


def find_run_sweep_or_study(name: str) -> RunDir | Sweep | Study:
    """Find a run, sweep or study by its folder, `latest`, or a part of its name.

    `recipe cancel` must not stop the wrong run. So a name that several things share is refused, and so is part of the
    name of a sweep that was also rehearsed.

    Raises:
        UserError: no name or several names match.
    """
    runs = paths.runs()
    if name == "latest" or is_run(Path(name)):
        return find_run(name, runs)
    sweeps = recorded_sweeps()
    study_folders = {folder.name: folder for folder in paths.studies()}
    run_folders = run_names(runs)
    names = [*run_folders, *sweeps, *study_folders]
    full_name = _full_name(name, names, f" below {runs}/; there are {', '.join([*study_folders, *sweeps])}")
    if names.count(full_name) > 1:
        raise _ambiguous(name, "a run, a sweep or a study")
    rehearsal = f"{full_name}/rehearsal"
    if name != full_name and rehearsal in sweeps:
        raise _ambiguous(name, f"{full_name} or {rehearsal}")
    if full_name in study_folders:
        return studies.load(study_folders[full_name])
    return sweeps[full_name] if full_name in sweeps else run_folders[full_name]


def _full_name(name: str, names: list[str], hint: str) -> str:
    """Full name of a run, sweep or study.

    Raises:
        UserError: no name or several names match; a recipe without a run is named.
    """
    try:
        return meant(name, names, "run, sweep or study", hint)
    except UserError:
        recipe = meant(name, [*names, *paths.recipe_names()], "run, sweep, study or recipe", hint)
        problem = f"{name}: no run of {recipe} below {paths.runs()}/; {recipe_command('run', recipe)} starts one"
        raise UserError(problem) from None


def _ambiguous(name: str, choices: str) -> UserError:
    return UserError(f"{name}: ambiguous: {choices}; give the full name, or a run folder")


def recorded_sweeps() -> dict[str, Sweep]:
    """Started sweeps by label, oldest first."""
    recorded = []
    for file in paths.runs().glob("sweeps/*/*.json"):
        with suppress(OSError, ValueError):
            recorded.append(Sweep.model_validate(parse_json(read_bytes(file))))
    return {sweep.label: sweep for sweep in sorted(recorded, key=lambda sweep: sweep.started)}
