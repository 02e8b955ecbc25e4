"""The engine of an evaluation, started where it has to be."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ...base.progress import Bar
from ..evaluations import REFERENCE, SERVER, VLLM, EvaluationSettings
from .engine import Engine

if TYPE_CHECKING:
    from ..prompter import Prompter  # with torch and Axolotl, which `require` does without


def require(settings: EvaluationSettings, server: str | None, on_gpu: bool) -> None:
    """Refuse an engine that is not there, before anything takes time.

    Args:
        settings: which engine and model.
        server: its address, where that is the engine.
        on_gpu: whether it is to run on a GPU.

    Raises:
        UserError: it is not installed, or cannot be reached, or does not have the model, or cannot serve the adapter.
    """
    if settings.engine == VLLM:
        from . import vllm

        vllm.require(settings, on_gpu)
    if settings.engine == SERVER:
        from . import server as servers

        servers.at(str(server)).require_model(settings.model)


@contextmanager
def started(prompter: "Prompter", prompts: Sequence[list[int]], server: str | None, part: Path) -> Iterator[Engine]:
    """The engine that the prompter's settings name; it ends with the block, unless somebody else had started it.

    Args:
        prompter: of the run.
        prompts: all that it will be asked.
        server: the address of a server, where that is the engine.
        part: the file of the predictions, beside which it can leave its log.

    Raises:
        UserError: it is not installed, or cannot be reached, or has no model of that name.
        WorkFailed: it does not start.
    """
    if prompter.settings.engine == REFERENCE:
        with Bar("loading the model"):
            from .reference import Reference

            reference = Reference(prompter)
        yield reference
    elif prompter.settings.engine == VLLM:
        from . import vllm

        with vllm.started(prompter, prompts, part) as engine:
            yield engine
    else:
        from .server import AT_ONCE, Server, at

        at_once = prompter.settings.batch_size or AT_ONCE
        yield Server(prompter, at(str(server)), str(prompter.settings.model), prompts, at_once)
