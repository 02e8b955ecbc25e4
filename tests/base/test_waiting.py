"""A hub that accepts connections and never answers."""

import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import HfApi, hf_hub_download

from qlora_recipes.base import hub as base_hub
from qlora_recipes.base.errors import WorkFailed
from qlora_recipes.cli import ended


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a hub that is given up after half a second."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(base_hub, "REQUEST_TIMEOUT", 0.5)
    base_hub.limit_waiting.__wrapped__()
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
    monkeypatch.undo()
    base_hub.limit_waiting.__wrapped__()  # which knows nothing of that hub


def load(hub: str, cache: Path) -> None:
    hf_hub_download("owner/model", "config.json", endpoint=hub, cache_dir=cache)


@pytest.mark.parametrize("ask", [lambda hub, _: HfApi(endpoint=hub, token="t").whoami(), load])
def test_a_hub_that_hangs_is_given_up(hub: str, tmp_path: Path, ask: Callable[[str, Path], object]) -> None:
    for _ in range(2):  # transformers goes on to the next file
        with pytest.raises(WorkFailed):
            ask(hub, tmp_path)


def test_a_loader_that_cannot_reach_the_hub_ends_with_the_hubs_line(capsys: pytest.CaptureFixture[str]) -> None:
    def load() -> None:
        try:
            raise WorkFailed("hub:")
        except WorkFailed:
            raise OSError("cannot load a/b") from None

    assert ended(load) == 1
    assert capsys.readouterr().err == "recipe: hub:\n"
