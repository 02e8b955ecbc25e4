"""Settings of a training, as Axolotl reads them from a config."""

import pytest

from qlora_recipes.config.training_settings import TrainingSettings

DEFAULTS = TrainingSettings(
    micro_batch_size=1,
    eval_batch_size=1,
    gradient_accumulation_steps=1,
    num_epochs=1,
    max_steps=0,
    sequence_len=512,
    eval_sequence_len=512,
    sample_packing=False,
    val_set_size=0,
    seed=42,
    optimizer="adamw_torch_fused",
    adapter=None,
    rank=8,
    dropout=0.0,
    targets=(),
    saved_modules=(),
)


@pytest.mark.parametrize(
    "config",
    [
        pytest.param({}, id="missing"),
        pytest.param({"micro_batch_size": None, "num_epochs": None, "seed": None, "optimizer": None}, id="null"),
        pytest.param({"micro_batch_size": 0, "max_steps": 0, "adapter": ""}, id="empty"),
        pytest.param({"micro_batch_size": "two", "sequence_len": 2.5, "lora_target_modules": 3}, id="refused"),
        pytest.param({"lora_dropout": 0, "val_set_size": False}, id="zero"),
    ],
)
def test_missing_and_invalid_values_take_axolotls_defaults(config):
    assert TrainingSettings.of(config) == DEFAULTS


@pytest.mark.parametrize(
    ("val_set_size", "left"),
    [(0.1, 27), (0.001, 29), (1, 0), (1.5, 29), (20.5, 10), (30, 0), (40, 0)],
)
def test_rows_are_held_out_as_axolotl_does(val_set_size, left):
    assert TrainingSettings.of({"val_set_size": val_set_size}).rows_left(30) == left


def test_a_seed_can_be_text():
    assert TrainingSettings.of({"seed": "7"}).seed == 7


def test_defaults_are_those_of_axolotl():
    from axolotl.utils.schemas.config import AxolotlInputConfig

    fields = AxolotlInputConfig.model_fields
    # a validator sets the seed; those of evaluation are those of training
    other_names = {"seed", "rank", "dropout", "targets", "saved_modules", "eval_batch_size", "eval_sequence_len"}
    keys = vars(DEFAULTS).keys() - other_names
    assert {key: fields[key].default or None for key in keys} == {key: vars(DEFAULTS)[key] or None for key in keys}
