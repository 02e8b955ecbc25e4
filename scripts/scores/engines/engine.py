"""What generates predictions: transformers in this process, which is the reference, or something faster beside it."""

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from ..evaluations import EvaluationSettings


@dataclass(frozen=True)
class Answer:
    """What a model wrote: the text, without special tokens and space around it, and the tokens, without padding; None
    from a server that does not tell them."""

    text: str
    tokens: list[int] | None


class Engine(Protocol):
    """A run's model, ready to answer.

    Attributes:
        settings: how it decodes, among the rest; read whenever it generates.
        served: in which form it has the weights and takes the prompts; None of the reference.
    """

    settings: EvaluationSettings
    served: str | None

    def generate(self, prompts: Sequence[list[int]], done: Container[int]) -> Iterator[dict[int, Answer]]:
        """The answers that are not there yet, in groups as they get ready.

        Args:
            prompts: the tokens of each, of all rows of the evaluation.
            done: the positions in `prompts` of those that have an answer.

        Yields:
            Answers by the positions of their prompts.

        Raises:
            WorkFailed: it cannot go on; what was yielded is kept.
        """
