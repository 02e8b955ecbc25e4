"""What generates predictions: transformers in this process, which is the reference, or something faster beside it."""

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Answer:
    """What a model wrote: the text, without special tokens and space around it, and the tokens, without padding; None
    from a server that does not tell them."""

    text: str
    tokens: list[int] | None


class Engine(Protocol):
    """A run's model, ready to answer.

    Where its answers are the tokens of the reference but for rounding, `agreement.compare` shows it.
    """

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
