"""The words of a text, for the length of texts and for metrics that count words."""

import re

_WORD = re.compile(r"[^\W_]+|_|[^\w\s]")


def words(text: str) -> list[str]:
    """Lower-case words, underscores and other single characters."""
    return _WORD.findall(text.lower())
