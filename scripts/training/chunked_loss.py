"""Axolotl's chunked loss."""

from typing import Any
from unittest.mock import patch


def chunked_loss() -> Any:
    """Axolotl's loss in eight chunks, not compiled; its memory is an upper bound."""
    with patch("torch.compile", lambda function, **_: function):
        from axolotl.monkeypatch.loss.chunked import get_causal_lm_loss

        return get_causal_lm_loss()
