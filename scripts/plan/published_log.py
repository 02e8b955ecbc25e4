"""Published log of a training beside a plan with the log's inputs: schedule, adapter and memory.

Figures of shipped logs are read from a file; for others, torch is imported, which takes some seconds.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, get_args

import orjson

from ..base.errors import UserError
from ..base.files import read_json
from ..base.hub import importing_axolotl
from ..base.yamlfiles import Config
from ..config.gpus import Gpu
from ..config.merging import merge
from ..config.training_settings import TrainingSettings
from ..data.published import Figure, Log, Point, read_points
from ..data.studies import Study
from .step_plan import StepPlan, packages, plan_step

SHIPPED = Path(__file__).with_name("logs.json")
"""Figures of the shipped recipes' logs, by `PlannedLog.key`; tools/plans.py writes it."""
TOLERANCE = 1e-18
"""Largest difference of equal learning rates; rounding makes some 1e-20."""
_OWN_SCHEDULES = ("cosine_min_lr_ratio", "lr_quadratic_warmup", "jagged_restart_steps")
"""Keys of schedules that are not transformers' (axolotl/core/trainers/mixins/scheduler.py)."""


@dataclass(frozen=True)
class Compared:
    """Published figure beside the planned one.

    Attributes:
        figure: key of the figure in study.yaml.
        planned: None if it is unknown.
        equal: whether the two are equal; learning rates within `TOLERANCE`.
        reason: known reason for a difference.
        unverified: true if nobody has read the published figure in its source.
        rates, step, of_steps: number of learning rates, the logged step after which they differ most, and the number of
            steps of the planned schedule; `planned` and `published` are the rates after that step.
    """

    figure: str
    planned: float | None
    published: float
    equal: bool
    reason: str = ""
    unverified: bool = False
    rates: int | None = None
    step: int | None = None
    of_steps: int | None = None


@dataclass(frozen=True)
class ComparedLog:
    """Published log beside a plan with the log's inputs.

    Attributes:
        rows, settings: inputs that are not the recipe's; see `Log`.
        skipped_steps: number of skipped steps.
    """

    source: str
    rows: int | None
    settings: Config
    skipped_steps: int
    figures: list[Compared]


@cache
def shipped() -> dict[str, Any]:
    """Shipped figures by key; empty for a damaged file."""
    return read_json(SHIPPED)


@dataclass
class PlannedLog:
    """Plan of a recipe with the inputs of a published log.

    Attributes:
        log: the log.
        config: the recipe's config with the log's settings.
        step_plan: plan of the config's step.
        steps: number of optimizer steps; None if unknown.
        points: logged steps and learning rates.
    """

    log: Log
    config: Config
    step_plan: StepPlan
    steps: int | None
    points: list[Point]

    @classmethod
    def of(cls, study: Study, recipe: str, config: Config, gpu: Gpu | None = None) -> "PlannedLog | None":
        """Plan with the inputs of a recipe's log; None without a log of figures that a plan has.

        Args:
            study: study of the recipe.
            recipe: the recipe.
            config: the recipe's config.
            gpu: see `plan_step`.

        Raises:
            UserError: the learning rates cannot be read, or planning does not support the config.
        """
        log = study.log(recipe)
        if log is None or all(getattr(log, figure) is None for figure in get_args(Figure)):
            return None
        config = merge(config, log.settings)
        step_plan, _ = plan_step(config, gpu)
        steps = TrainingSettings.of(config).steps(log.rows or study.data.rows_of("train"))
        points: list[Point] = []
        if log.learning_rates:
            points = read_points(study.folder / log.learning_rates, "learning_rate")
        return cls(log, config, step_plan, steps, points)

    @property
    def key(self) -> str:
        """Hash of the inputs of `compute`."""
        depends = [packages(), self.config, self.step_plan.step.model, self.log.model_dump(), self.steps, self.points]
        return hashlib.sha256(orjson.dumps(depends, option=orjson.OPT_SORT_KEYS)).hexdigest()[:24]

    @property
    def stored(self) -> list[Compared]:
        """Shipped figures; empty without any."""
        return [Compared(**figure) for figure in shipped().get(self.key, [])]

    @property
    def status(self) -> str:
        """Shipped figures that equal the log, in words; empty if none does."""
        equal = [figure.figure for figure in self.stored if figure.equal and not figure.unverified]
        words = dict.fromkeys(_WORDS[figure] for figure in equal)
        return f"{', '.join(words)} equal log" if words else ""

    def compute(self) -> list[Compared]:
        """Figures that a plan should equal; takes some seconds.

        Raises:
            UserError: the step cannot be traced, or transformers refuses the schedule.
        """
        with importing_axolotl():
            figures = [*self._rates()]
            figures += self._compared("steps", self.steps)
            figures += self._compared("trainable", self.step_plan.memory.total("trainable"))
            if self.log.adapter_bytes and self.step_plan.step.adapter:
                from .fake_step import adapter_bytes

                figures += self._compared("adapter_bytes", adapter_bytes(self.step_plan.step))
        return figures

    def compared(self) -> ComparedLog:
        """The log beside the plan, with its memory; raises the errors of `compute`."""
        log = self.log
        figures = self.stored or self.compute()
        figures += self._compared("reserved_bytes", self.step_plan.memory.usage.reserved)
        return ComparedLog(log.source, log.rows, log.settings, len(log.skipped_steps), figures)

    def _compared(self, figure: Figure, planned: int | None) -> Iterator[Compared]:
        """Planned figure beside that of the log, if the log has it."""
        published = getattr(self.log, figure)
        if published is not None:
            reason, unverified = self.log.reasons.get(figure, ""), figure in self.log.unverified
            yield Compared(figure, planned, published, planned == published, reason, unverified)

    def _rates(self) -> Iterator[Compared]:
        """Learning rates of a schedule with the log's number of steps, and of one with the planned number."""
        if not self.points:
            return
        for steps in dict.fromkeys((self.log.steps, self.steps)):
            rate = learning_rate(self.config, steps) if steps else None
            if steps is None or rate is None:
                continue
            planned = {}
            for logged, _ in self.points:
                skipped = sum(other <= logged for other in self.log.skipped_steps)
                planned[logged] = rate(logged - skipped)
            step, published = max(self.points, key=lambda point: abs(planned[point[0]] - point[1]))
            equal = abs(planned[step] - published) <= TOLERANCE
            gap = Compared("learning_rates", planned[step], published, equal)
            yield replace(gap, rates=len(self.points), step=step, of_steps=steps)


_WORDS = {"learning_rates": "schedule", "steps": "steps", "trainable": "parameters", "adapter_bytes": "adapter"}
"""Words for figures in a status."""

Rate = Callable[[int], float]
"""Learning rate after a number of optimizer steps. Today's trainer logs the rate of a step, after one step fewer."""


def learning_rate(config: Config, steps: int) -> Rate | None:
    """Learning rate in a training of a number of steps, by transformers' scheduler.

    None for a schedule of Axolotl's own, and for one that follows the loss.

    Raises:
        UserError: transformers refuses the schedule, for example because `lr_scheduler_kwargs` lacks a key.
    """
    name = config.get("lr_scheduler") or "cosine"  # axolotl/core/builders/base.py, _configure_scheduler
    if name in ("one_cycle", "rex") or any(config.get(key) for key in _OWN_SCHEDULES):
        return None
    import torch
    from transformers import get_scheduler

    peak = float(config["learning_rate"])
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=peak)
    warmup, options = warmup_steps(config, steps), config.get("lr_scheduler_kwargs")
    try:
        scheduler = get_scheduler(name, optimizer, warmup, steps, options)
    except (TypeError, ValueError) as error:
        raise UserError(f"transformers refuses {name}: {error}", key="lr_scheduler") from None
    if not isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
        return None
    factor = scheduler.lr_lambdas[0]
    return lambda step: peak * factor(step)


def warmup_steps(config: Config, steps: int) -> int:
    """Warm-up steps of a training (axolotl/core/builders/base.py, _configure_warmup_and_logging)."""
    warmup = config.get("warmup_steps")
    if warmup is None:
        ratio = config.get("warmup_ratio")
        warmup = min(int(0.03 * steps), 100) if ratio is None else int(ratio * steps)
    return 2 if warmup == 1 else int(warmup)
