"""What the hub answers, in words; test_examination.py has it not answer."""

import pytest
from huggingface_hub import constants

from qlora_recipes.data import hub
from qlora_recipes.data.hub import Answer
from qlora_recipes.doctor import network
from qlora_recipes.doctor.line import Line


@pytest.mark.parametrize(
    ("answer", "token", "state", "found", "command"),
    [
        (Answer("unknown", "status 404"), True, "note", "unexpected answer: status 404", "export HF_HUB_OFFLINE=1"),
        (Answer("unknown", "timed out"), True, "note", "no answer: timed out", "export HF_HUB_OFFLINE=1"),
        (Answer("refused"), True, "note", "answers, and rejects this token", ""),
        (Answer("gated"), True, "note", "answers; 1 of the recipes' 1 models are closed to you: a/b", ""),
        (Answer("gated"), False, "note", "answers; 1 of the recipes' 1 models are closed to you: a/b", "hf auth login"),
        (Answer("open"), True, "ok", "answers; all of the recipes' 1 models can be had", ""),
    ],
)
def test_the_hubs_answer_for_the_recipes_models(
    answer: Answer, token: bool, state: str, found: str, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(network, "_models", lambda: ["a/b"])
    monkeypatch.setattr(hub, "access", lambda name: answer)
    monkeypatch.setattr(hub, "has_token", lambda: token)
    monkeypatch.setattr(network, "_token_line", lambda refused: Line("hub token", "ok", "not asked about"))
    line = network.hub_lines()[0]
    assert (line.state, line.found, line.command) == (state, found, command)
    assert state == "ok" or line.remedy
