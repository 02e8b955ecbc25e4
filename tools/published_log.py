"""Published log of a training beside a plan with the log's inputs: schedule, adapter and memory.

tools/plans.py calls it. Learning rates and the size of an adapter need torch, whose import takes some seconds.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from warnings import catch_warnings

from qlora_recipes.base.errors import UserError
from qlora_recipes.base.hub import importing_axolotl
from qlora_recipes.base.yamlfiles import Config
from qlora_recipes.check import schema
from qlora_recipes.config.finding import refuse
from qlora_recipes.config.gpus import Gpu
from qlora_recipes.config.merging import merge
from qlora_recipes.config.training_settings import TrainingSettings
from qlora_recipes.data.published import Figure, Log, Point, read_points
from qlora_recipes.data.studies import Study
from qlora_recipes.plan.step_plan import StepPlan, plan_step
from qlora_recipes.plan.steps import Step

TOLERANCE = 1e-18
"""Largest difference of equal learning rates; rounding makes some 1e-20."""
_OWN_SCHEDULES = ("cosine_min_lr_ratio", "lr_quadratic_warmup", "jagged_restart_steps")
"""Keys of schedules that are not transformers' (axolotl/core/trainers/mixins/scheduler.py)."""


@dataclass(frozen=True)
class ComparedFigure:
    """Published figure beside the planned one.

    Attributes:
        figure: key of the figure in study.yaml.
        planned: None if it is unknown.
        equal: whether the two are equal; learning rates within `TOLERANCE`.
        remark: known reason for a difference, or what the figures are; empty without a remark.
    """

    figure: str
    planned: float | None
    published: float
    equal: bool
    remark: str = ""


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
        """Plan with the inputs of a recipe's log; None without a log.

        Args:
            study: study of the recipe.
            recipe: the recipe.
            config: the recipe's config.
            gpu: see `plan_step`.

        Raises:
            UserError: the learning rates cannot be read, a setting is wrong, or planning does not support the config.
        """
        log = study.log(recipe)
        if log is None:
            return None
        config = merge(config, log.settings)
        wrong = [finding for finding in schema.findings(config) if finding.top_key in log.settings]
        for finding in wrong:
            finding.where = f"{study.folder.name}/study.yaml, log of {recipe}"
        refuse(wrong)
        step_plan, _ = plan_step(config, gpu)
        steps = TrainingSettings.of(config).steps(log.rows or study.data.rows_of("train"))
        points = []
        if log.learning_rates:
            points = read_points(study.folder / log.learning_rates, "learning_rate")
        return cls(log, config, step_plan, steps, points)

    def compare(self) -> list[ComparedFigure]:
        """Compare the log with the plan, figure by figure.

        Raises:
            UserError: the step cannot be traced, or transformers refuses the schedule.
        """
        memory = self.step_plan.memory
        with importing_axolotl():
            figures = [*self._rates()]
            figures += self._compared_figure("steps", self.steps)
            figures += self._compared_figure("trainable", memory.total("trainable"))
            if self.log.adapter_bytes and self.step_plan.step.adapter:
                figures += self._compared_figure("adapter_bytes", adapter_bytes(self.step_plan.step))
        figures += self._compared_figure("reserved_bytes", memory.usage.reserved)
        return figures

    def _compared_figure(self, figure: Figure, planned: int | None) -> Iterator[ComparedFigure]:
        """Planned figure beside that of the log, if the log has it."""
        published = getattr(self.log, figure)
        if published is not None:
            yield ComparedFigure(figure, planned, published, planned == published, self.log.remarks.get(figure, ""))

    def _rates(self) -> Iterator[ComparedFigure]:
        """Learning rates of a schedule with the log's number of steps, and of one with the planned number.

        Each is a row with the planned and the published rate after the step where the two differ most.
        """
        if not self.points:
            return
        for steps in dict.fromkeys((self.log.steps, self.steps)):
            rate = learning_rate(self.config, steps) if steps else None
            if rate is None:
                continue
            planned = {}
            for logged, _ in self.points:
                skipped = sum(other <= logged for other in self.log.skipped_steps)
                planned[logged] = rate(logged - skipped)
            step, published = max(self.points, key=lambda point: abs(planned[point[0]] - point[1]))
            equal = abs(planned[step] - published) <= TOLERANCE
            remark = f"of {len(self.points)} rates, that which differs most, after step {step:,} of {steps:,}"
            yield ComparedFigure("learning_rates", planned[step], published, equal, remark)


def adapter_bytes(step: Step) -> int:
    """Size of adapter_model.safetensors, which PEFT writes for a model without weights; needs twice as much memory."""
    import torch
    from peft import get_peft_model, get_peft_model_state_dict
    from safetensors.torch import save

    from qlora_recipes.plan.fake_step import base_model, lora_config

    with torch.device("meta"), catch_warnings(action="ignore"):  # warnings about embeddings in the file
        model = get_peft_model(base_model(step), lora_config(step), autocast_adapter_dtype=step.fp32_adapters)
        tensors = get_peft_model_state_dict(model)
    content = {name: torch.empty_like(tensor, device="cpu") for name, tensor in tensors.items()}
    return len(save(content, {"format": "pt"}))  # peft/peft_model.py, save_pretrained


Rate = Callable[[int], float]
"""Learning rate after a number of optimizer steps. transformers 5 logs for a step the rate after the step before."""


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

    warmup, options = warmup_steps(config, steps), config.get("lr_scheduler_kwargs")
    try:
        peak = float(config["learning_rate"])
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=peak)
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
