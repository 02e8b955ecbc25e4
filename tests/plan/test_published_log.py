"""Published logs beside plans with their inputs."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import plans
import published_log
import pytest
from conftest import config_with, recipe_config, train_runs
from published_log import PlannedLog

from qlora_recipes.base import paths, yamlfiles
from qlora_recipes.base.errors import UserError
from qlora_recipes.base.files import read_json
from qlora_recipes.config import merging
from qlora_recipes.config.training_settings import TrainingSettings
from qlora_recipes.data import published, studies
from qlora_recipes.data.published import Ablation, Log
from qlora_recipes.plan import fake_step, step_plan
from qlora_recipes.run.rundir import PLUGIN, RunDir

REFINEMENT = "haider2024/as-released/llama-3-8b"
PEFTS = ("rank32", "rank64", "rank64-rslora", "rank32-dora", "rank10-target-mlp")
# windows of 100 steps, by their last step, in which the log's rate falls less: one step was skipped by the scaler
SKIPPED = [
    *(4700, 5100, 11200, 13300, 13400, 17700, 20400, 22500, 24500, 24900, 26700, 33500, 33600, 37600, 39700, 41800),
    *(42100, 45700, 49800, 51900, 54300, 56500, 58600, 59400, 63400, 65500, 67500, 69100, 72400, 75400, 79400, 81400),
    *(81500, 85400, 89400, 90100, 93900),
]


def log_of(name: str) -> PlannedLog:
    study = studies.study_of(name)
    assert study
    planned = PlannedLog.of(study, name, recipe_config(name))
    assert planned
    return planned


@pytest.fixture(scope="module")
def refinement() -> PlannedLog:
    return log_of(REFINEMENT)


def largest_difference(planned: PlannedLog, steps: int) -> float:
    rate = published_log.learning_rate(planned.config, steps)
    assert rate
    return max(abs(rate(step - sum(end <= step for end in SKIPPED)) - logged) for step, logged in planned.points)


def test_the_940_rates_of_the_refinement_are_its_formulas(refinement):
    """Linear to 2e-4 within 500 steps, then to 0 at 94,000; a skipped step does not count."""
    assert refinement.log.skipped_steps == SKIPPED
    assert [step for step, _ in refinement.points] == list(range(100, 94_001, 100))
    for step, logged in refinement.points:
        taken = step - sum(end <= step for end in SKIPPED)
        assert logged == 2e-4 * min(taken / 500, (94_000 - taken) / 93_500)


def test_all_rates_are_planned_with_the_logs_steps_and_differ_with_todays(refinement):
    from transformers import Trainer

    trainer = SimpleNamespace(get_total_train_batch_size=lambda _: 8, get_sp_size=lambda: 1, num_examples=len)
    arguments = SimpleNamespace(max_steps=-1, gradient_accumulation_steps=4, num_train_epochs=5)
    *_, transformers_own = Trainer.set_initial_training_values(trainer, arguments, range(150_406 // 2))
    assert (refinement.log.steps, refinement.steps, transformers_own) == (94_000, 94_004, 94_005)
    assert largest_difference(refinement, 94_000) <= 1e-18
    assert largest_difference(refinement, 94_004) == pytest.approx(8.552e-9, rel=1e-3)
    assert largest_difference(refinement, 94_005) == pytest.approx(1.069e-8, rel=1e-3)
    rates = [figure for figure in refinement.compare() if figure.figure == "learning_rates"]
    most = "of 940 rates, that which differs most, after step"
    assert [(figure.equal, figure.remark) for figure in rates] == [
        (True, f"{most} 100 of 94,000"),
        (False, f"{most} 94,000 of 94,004"),
    ]
    assert rates[1].published == 7.914438502673798e-08


def test_without_the_skipped_steps_the_rates_differ(refinement):
    planned = PlannedLog(
        Log(source="a", steps=94_000), refinement.config, refinement.step_plan, None, refinement.points
    )
    [rates] = [figure for figure in planned.compare() if figure.figure == "learning_rates"]
    assert not rates.equal
    assert rates.planned
    assert rates.published - rates.planned == pytest.approx(37 * 2e-4 / 93_500)


@pytest.mark.parametrize("name", PEFTS)
def test_the_adapters_of_pefts_comparison_have_the_published_bytes(name):
    planned = log_of(f"peft-metamathqa/lora-{name}")
    figures = {figure.figure: (figure.planned, figure.equal) for figure in planned.compare()}
    assert figures.pop("reserved_bytes")[1] is False
    assert figures == {
        "steps": (5000, True),
        "trainable": (planned.log.trainable, True),
        "adapter_bytes": (planned.log.adapter_bytes, True),
    }


def test_the_bytes_are_those_of_a_saved_adapter(tmp_path, tiny):
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    config = config_with({"base_model": str(tiny), "adapter": "lora", "load_in_4bit": False})
    step = step_plan.plan_step(config, None)[0].step
    model = AutoModelForCausalLM.from_pretrained(tiny)
    get_peft_model(model, fake_step.lora_config(step)).save_pretrained(tmp_path)
    assert published_log.adapter_bytes(step) == (tmp_path / "adapter_model.safetensors").stat().st_size


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        pytest.param({"warmup_steps": 10}, 7, id="more steps than there are"),
        pytest.param({"warmup_steps": 0}, 100, id="no warm-up"),
        pytest.param({"warmup_steps": 1}, 100, id="one step"),
        pytest.param({"warmup_ratio": 0.1}, 5000, id="ratio"),
        pytest.param({"warmup_ratio": 0.1}, 12, id="ratio of one step"),
        pytest.param({"warmup_ratio": 0.03}, 781, id="ratio rounded down"),
        pytest.param({}, 781, id="default"),
        pytest.param({}, 90_000, id="highest default"),
        pytest.param({"warmup_ratio": 0.1, "warmup_steps": 3}, 100, id="both"),
    ],
)
def test_warm_up_steps_are_axolotls(changes, steps):
    from axolotl.core.builders.base import TrainerBuilderBase
    from axolotl.utils.dict import DictDefault

    arguments: dict[str, Any] = {}
    builder = SimpleNamespace(cfg=DictDefault(changes))
    TrainerBuilderBase._configure_warmup_and_logging(builder, steps, arguments)
    assert published_log.warmup_steps(changes, steps) == arguments["warmup_steps"]


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"lr_scheduler": "rex"}, id="rex"),
        pytest.param({"lr_scheduler": "one_cycle"}, id="one_cycle"),
        pytest.param({"lr_scheduler": "cosine", "cosine_min_lr_ratio": 0.1}, id="cosine_min_lr_ratio"),
        pytest.param({"lr_scheduler": "cosine", "lr_quadratic_warmup": True}, id="lr_quadratic_warmup"),
        pytest.param({"jagged_restart_steps": 3}, id="jagged_restart_steps"),
        pytest.param({"lr_scheduler": "reduce_lr_on_plateau"}, id="follows the loss"),
    ],
)
def test_a_schedule_that_is_not_transformers_is_unknown(changes):
    assert published_log.learning_rate({"learning_rate": 1e-4} | changes, 10) is None


def test_a_schedule_that_lacks_a_setting_is_refused():
    with pytest.raises(UserError) as refused:
        published_log.learning_rate({"learning_rate": 1e-4, "lr_scheduler": "warmup_stable_decay"}, 10)
    assert refused.value.key == "lr_scheduler"
    assert refused.value.problem.startswith("transformers refuses warmup_stable_decay: ")


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        pytest.param({"warmup_steps": "a"}, "warmup_steps: a is not an integer [value:warmup_steps]", id="text"),
        pytest.param({"learning_rate": None}, "learning_rate: missing; set it [missing-key:learning_rate]", id="none"),
    ],
)
def test_a_wrong_setting_of_a_log_is_refused(settings, problem):
    study = studies.study_of(REFINEMENT)
    assert study
    log = Log(source="a", steps=10, settings=settings)
    study = study.model_copy(update={"ablations": {REFINEMENT: Ablation(parent="a", reproduces=False, log=log)}})
    with pytest.raises(UserError) as refused:
        PlannedLog.of(study, REFINEMENT, recipe_config(REFINEMENT))
    place = f"haider2024/study.yaml, log of {REFINEMENT}"
    assert str(refused.value).splitlines()[0] == f"{place}: error: {problem}"


def test_each_figure_of_a_log_is_compared(refinement):
    assert [(figure.figure, figure.equal) for figure in refinement.compare()] == [
        ("learning_rates", True),
        ("learning_rates", False),
        ("steps", False),
        ("trainable", True),
        ("reserved_bytes", False),
    ]


STATUSES = {
    REFINEMENT: "schedule, parameters",
    **dict.fromkeys([f"peft-metamathqa/lora-{name}" for name in PEFTS], "steps, parameters, adapter"),
    "neuralhermes-dpo/mistral-7b-qlora": "steps",
    "pissa-metamathqa/llama-2-7b-qlora": "steps",
    "qlora-guanaco/llama-7b": "steps",  # its number of parameters is not verified
    **dict.fromkeys(
        [f"tinker-tulu3/llama-{size}-lora" for size in ("3.2-1b", "3.2-3b", "3.1-8b")], "steps, parameters"
    ),
    "zephyr/dpo-qlora": "steps",
}


def test_built_in_statuses_are_those_of_new_plans():
    statuses = {name: plans.equal_to_log(log) for name, log in plans.logs().items()}
    assert {name: status for name, status in statuses.items() if status} == STATUSES
    assert read_json(paths.HOURS)["logs"] == STATUSES, "run `.venv/bin/python tools/plans.py` and `recipe render`"


@pytest.mark.parametrize(("name", "status"), STATUSES.items())
def test_the_list_of_recipes_names_what_equals_the_log(name, status):
    cell = row_of(name).rstrip(" |").rpartition(" | ")[2]
    assert cell.rpartition("; ")[2] == f"{status} equal log"


def row_of(name: str) -> str:
    """Row of a recipe in recipes/README.md."""
    lines = (paths.RECIPES / "README.md").read_text().splitlines()
    return next(line for line in lines if line.startswith(f"| [{name}]"))


def test_learning_rates_that_cannot_be_read_are_refused(tmp_path):
    (tmp_path / "r.csv").write_text("step,rate\n1,2\n")
    with pytest.raises(UserError) as refused:
        published.read_points(tmp_path / "r.csv", "learning_rate")
    place = tmp_path / "r.csv"
    expected = (
        f"{place}: expected the columns step and learning_rate with a number in each row (KeyError('learning_rate'))"
    )
    assert str(refused.value) == expected


SCHEDULES: dict[str, dict[str, Any]] = {
    "linear": {"lr_scheduler": "linear", "warmup_steps": 3},
    "cosine": {"lr_scheduler": "cosine", "warmup_steps": None, "warmup_ratio": 0.3},
    "default": {"lr_scheduler": None, "warmup_steps": None, "num_epochs": 2},
    "constant": {"lr_scheduler": "constant_with_warmup", "warmup_steps": 2, "max_steps": 5},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_profile: Path) -> dict[str, tuple[dict[str, Any], RunDir]]:
    """Configs and real trainings with them, by name."""
    base = merging.merge(recipe_config("haider2024/llama-2-7b"), yamlfiles.read_yaml(tiny_profile))
    base |= {"save_strategy": "no", "saves_per_epoch": None, "num_epochs": 1, "logging_steps": 1, "plugins": [PLUGIN]}
    configs = {name: merging.merge(base, changes) for name, changes in SCHEDULES.items()}
    runs = train_runs(tmp_path_factory.mktemp("schedules"), configs)
    return {name: (configs[name], run) for name, run in runs.items()}


@pytest.mark.long
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_training_has_the_planned_learning_rates(trained, name):
    config, run = trained[name]
    records = run.read_metrics()
    rows = next(record["training_rows"] for record in records if "training_rows" in record)
    rates = [record["learning_rate"] for record in records if "loss" in record]
    steps = TrainingSettings.of(config).steps(rows)
    assert steps == len(rates) >= 5
    rate = published_log.learning_rate(config, steps)
    assert rate
    assert rates == [rate(step) for step in range(steps)]
