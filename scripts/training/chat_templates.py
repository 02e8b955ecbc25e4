"""Bounds on the use of chat templates, which come from other authors' models and configs."""

from typing import Any
from unittest.mock import patch

from axolotl.prompt_strategies.chat_template import ChatTemplatePrompter
from axolotl.prompt_strategies.jinja_template_analyzer import JinjaTemplateAnalyzer
from transformers import tokenization_utils_base
from transformers.utils.chat_template_utils import render_jinja_template

from ..base.processes import bounded
from ..data.raw_rows import MOST, size


def bound() -> None:
    """Bound time and memory for chat templates in this process and its forks, and the length of a rendered text."""
    patch.object(tokenization_utils_base, "render_jinja_template", _render).start()
    patch.object(ChatTemplatePrompter, "get_chat_template_msg_variables", _variables).start()


def _render(*, chat_template: str, **options: Any) -> Any:
    with bounded(chat_template):
        rendered = render_jinja_template(chat_template=chat_template, **options)
        if size(rendered) > 10 * size(options) + MOST:  # a tokenizer takes 100 bytes for each character
            raise MemoryError
    return rendered


def _variables(_: ChatTemplatePrompter, chat_template: str, field: str) -> Any:
    """Variables of messages, as in Axolotl; Jinja computes the template's constants for this."""
    with bounded(chat_template):
        return JinjaTemplateAnalyzer(chat_template).get_message_vars(field)
