"""A pattern that would match for ever is told of instead."""

import re
import signal
import threading
import time

import pytest
from conftest import Recipe, config_with

from qlora_recipes.checks import rules
from qlora_recipes.checks.patience import TooLong, matching

FOR_EVER = "(([a-z.]+)+)+!"
LAYER = "model.layers.0.self_attn.q_proj.of.a.name.that.is.long"


def test_a_pattern_that_takes_too_long_is_stopped() -> None:
    before = signal.getsignal(signal.SIGALRM)
    begun = time.monotonic()
    with pytest.raises(TooLong, match="perhaps for ever"):
        matching(FOR_EVER, [LAYER.replace("_", "").replace("0", "")])
    assert time.monotonic() - begun < 2
    assert matching(r".*\.[qv]_proj", ["a.q_proj", "a.k_proj"]) == ["a.q_proj"]
    assert signal.getsignal(signal.SIGALRM) == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


@pytest.mark.parametrize("pattern", ["(", "(" * 5000 + ")" * 5000, "a{99999999999999999999}"])
def test_what_is_no_pattern_is_said_to_be_none(pattern: str) -> None:
    with pytest.raises(re.error):
        matching(pattern, [LAYER])


def test_in_another_thread_it_matches_too() -> None:
    found: list[str] = []
    thread = threading.Thread(target=lambda: found.extend(matching("a+", ["aa", "b"])))
    thread.start()
    thread.join()
    assert found == ["aa"]


@pytest.mark.parametrize("model", ["meta-llama/Llama-3.2-3B-Instruct", "nobody/knows-this"])
def test_the_rule_finds_it_whether_or_not_the_model_is_known(model: str) -> None:
    cfg = config_with({"lora_target_modules": FOR_EVER, "base_model": model})
    found = [one for one in rules.findings(rules.Case(cfg, set())) if one.rule == "unknown-lora-target"]
    assert [(one.level, one.scope) for one in found] == [("error", "step")]


def test_a_plan_refuses_it_within_seconds(recipe: Recipe) -> None:
    begun = time.monotonic()
    done = recipe("plan", "haider2024/llama-3.2-3b", "--set", f'lora_target_modules="{FOR_EVER}"', "--gpu", "T4")
    assert (done.returncode, "perhaps for ever" in done.stderr) == (2, True)
    assert time.monotonic() - begun < 4
