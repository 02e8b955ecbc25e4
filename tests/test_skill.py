"""The skill for coding agents: its form, its length, and its steps from a recipe to a scored rehearsal."""

import shlex

import pytest
import yaml
from test_docs import COMMAND, FENCE, SKILL

NAME = "litgpt-alpaca2k/llama-3.2-1b-lora"  # scored by its loss, which the fake Axolotl reports


def test_tools_can_load_the_skill():
    _, front, text = SKILL.read_text().split("---\n", 2)
    described = yaml.safe_load(front)
    assert list(described) == ["name", "description"]
    assert described["name"] == SKILL.parent.name
    assert len(described["description"]) < 1024
    assert len(text.split()) <= 500


@pytest.mark.long
def test_its_steps_lead_to_a_scored_rehearsal(with_fake_axolotl, tmp_path):
    _, steps, on_gpu, *_ = FENCE.findall(SKILL.read_text())
    words = {"NAME": NAME, "STUDY": NAME.partition("/")[0]}
    for line in COMMAND.findall(steps) + COMMAND.findall(on_gpu)[-2:]:
        command = [words.get(word, word) for word in shlex.split(line, comments=True)[1:]]
        finished = with_fake_axolotl(*command)
        assert finished.returncode == 0, (line, finished.stderr)
        if "--rehearse" in command:
            words |= dict.fromkeys(("RUN", "RUN_A", "RUN_B"), finished.stdout.strip())
    assert (tmp_path / words["RUN"] / "scores.json").is_file()
