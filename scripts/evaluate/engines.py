"""Inference engines by name: whether one can run, whether its answers are compared, and how it starts."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..base.registry import Registry
from ..base.terminal import Bar
from .settings import REFERENCE, SERVER, VLLM, Engine, EvaluationSettings

if TYPE_CHECKING:
    from .prompter import Prompter  # imports torch and Axolotl, which `require` does not need


@dataclass(frozen=True)
class Starter(ABC):
    """Engine before its start.

    Attributes:
        server: URL of the server, for engine `SERVER`.
    """

    server: str | None = None

    def require(self, settings: EvaluationSettings, on_gpu: bool) -> None:
        """Raise UserError if the engine is unavailable, before any slow step.

        Args:
            settings: model and adapter.
            on_gpu: True if the evaluation runs on a GPU.

        Raises:
            UserError: the engine is not installed, is unreachable, lacks the model, or cannot serve the adapter.
        """
        return

    def is_compared(self, settings: EvaluationSettings, reference_runs_here: bool) -> bool:
        """True if the engine's answers are compared with those of the reference engine."""
        return False

    @abstractmethod
    def start(self, prompter: "Prompter", prompts: Sequence[list[int]], part: Path) -> AbstractContextManager[Engine]:
        """Start the engine, for a `with` block.

        Args:
            prompter: prompter of the run.
            prompts: all prompts.
            part: file of the predictions; an engine's log is written beside it.

        Raises:
            UserError: the engine cannot serve the base model, or the URL is invalid.
            WorkFailed: the engine does not start.
        """


ENGINES = Registry[type[Starter]]("engine")


@ENGINES.register(REFERENCE)
class TransformersStarter(Starter):
    """transformers, in this process."""

    def start(self, prompter: "Prompter", prompts: Sequence[list[int]], part: Path) -> AbstractContextManager[Engine]:
        with Bar("loading the model"):
            from .transformers_engine import TransformersEngine

            return nullcontext(TransformersEngine(prompter))


@ENGINES.register(VLLM)
class VllmStarter(Starter):
    """vLLM, as a server for one evaluation."""

    def require(self, settings: EvaluationSettings, on_gpu: bool) -> None:
        from . import vllm

        vllm.require(settings, on_gpu)

    def is_compared(self, settings: EvaluationSettings, reference_runs_here: bool) -> bool:
        return settings.agreement is None

    def start(self, prompter: "Prompter", prompts: Sequence[list[int]], part: Path) -> AbstractContextManager[Engine]:
        from . import vllm

        return vllm.running_server(prompter, prompts, part)


@ENGINES.register(SERVER)
class ServerStarter(Starter):
    """Server of vLLM or llama.cpp that a user has started."""

    def require(self, settings: EvaluationSettings, on_gpu: bool) -> None:
        from .server import api_at

        api_at(str(self.server)).require_model(settings.model)

    def is_compared(self, settings: EvaluationSettings, reference_runs_here: bool) -> bool:
        if settings.file:  # compared by its log-probabilities
            return False
        return reference_runs_here  # the server's model can change between calls, so its answers are compared again

    def start(self, prompter: "Prompter", prompts: Sequence[list[int]], part: Path) -> AbstractContextManager[Engine]:
        from .server import AT_ONCE, Server, api_at

        settings = prompter.settings
        api, at_once = api_at(str(self.server)), settings.batch_size or AT_ONCE
        if settings.file:
            from .llama import LlamaServer

            return nullcontext(LlamaServer(prompter, api, settings.file, at_once))
        return nullcontext(Server(prompter, api, str(settings.model), at_once))
