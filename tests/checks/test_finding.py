import pytest

from qlora_recipes.checks import finding
from qlora_recipes.checks.finding import Finding
from qlora_recipes.checks.rules import case


@pytest.mark.parametrize(
    ("rule", "key", "scope"),
    [
        ("value", "datasets.0.path", "step"),
        ("not-quantized", "adapter", "step"),
        ("two-precisions", "fp16", "config"),
        ("no-data", "datasets", "config"),
        ("missing-file", "test_datasets.0.path", "data"),
        ("bad-row", "datasets.0.path", "data"),
        ("missing-file", "deepspeed", "file"),
        ("gpu-lacks", "bf16", "gpu"),
        ("no-gpu", "fp16", "machine"),
    ],
)
def test_a_finding_knows_its_scope(rule: str, key: str, scope: str) -> None:
    assert Finding("error", rule, key, "").scope == scope


def test_scopes_are_those_of_rules_that_exist() -> None:
    rules = {rule.__name__.replace("_", "-") for rule in case.RULES}
    assert finding._SCOPES.keys() <= rules | {"value", "unknown-key", "too-big", "no-batch", "unfit"}
