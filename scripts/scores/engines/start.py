"""The engine of an evaluation, started where it has to be."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ...base.progress import Bar
from ..evaluations import REFERENCE
from ..prompter import Prompter
from .engine import Engine


@contextmanager
def started(prompter: Prompter, prompts: Sequence[list[int]], server: str | None, part: Path) -> Iterator[Engine]:
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

            engine = Reference(prompter)
        yield engine
