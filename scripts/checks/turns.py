"""The turns of a chat, and the segments of an input_output row, as Axolotl reads them: what fails or is not learnt."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import orjson

from ..base import yamlfiles
from ..base.yamlfiles import Config

Mistake = tuple[str, str, str]
"""A rule of `rows`, what of a row breaks it, and an example where it has one."""

# prompt_strategies/chat_template.py
_ROLES = {"user": ["human", "user"], "assistant": ["gpt", "assistant"], "system": ["system"], "tool": ["tool"]}
_OPTIONAL = ("tool_calls", "tool_call_id", "reasoning_content", "name")
_ELSEWHERE = ("messages", "conversations", "conversation", "chat", "turns")
"""What data sets call their list of messages."""

_MARKERS = re.compile(r"<[|｜]\w+[|｜]?>|<\w+\|>|<(?:start|end)_of_turn>|\[/?INST\]|\[\|\w+\|\]|### \w+:")
_WITHIN_A_TURN = re.compile("image|audio|video|vision|think|tool|python|action|response|pad", re.IGNORECASE)


def markers_in(template: str) -> tuple[str, ...]:
    """What a prompt template puts between turns; not what separates the parts of one, such as an image."""
    found = dict.fromkeys(_MARKERS.findall(template))
    return tuple(marker for marker in found if "#" in marker or not _WITHIN_A_TURN.search(marker))


@lru_cache(1000)
def misspelt(names: tuple[str, ...], known: tuple[str, ...]) -> dict[str, str]:
    """Names of fields that are missing from a row, and of the ones beside them that must have been meant for them.

    A name that is meant resembles the missing one closely: `inptu`, `sytem`, but not `output` for `input`.
    """
    missing = [name for name in known if name not in names]
    unknown = [name for name in names if name not in known]
    near = {name: get_close_matches(name, missing, 1, 0.75) for name in unknown}
    return {close[0]: name for name, close in near.items() if close}


def template_files() -> dict[str, Path]:
    """Axolotl's chat templates by name (utils/chat_templates); found without importing Axolotl."""
    spec = find_spec("axolotl")
    places = (spec and spec.submodule_search_locations) or ()
    return {
        file.stem: file for place in places for file in Path(place, "utils/chat_templates/templates").glob("*.jinja")
    }


def chosen_template(config: Config, dataset: Config) -> tuple[str, str | None]:
    """The name of the chat template that a data set uses, and the one written out (chat_template_jinja), or its file.

    As in utils/chat_templates/base.py and schemas/datasets.py: what the data set names comes first, then the config's,
    then the tokenizer's template. A template written out in a data set that names none is not used (seen).
    """
    if name := dataset.get("chat_template"):
        return str(name), dataset.get("chat_template_jinja")
    written = config.get("chat_template_jinja")
    return str(config.get("chat_template") or ("jinja" if written else "tokenizer_default")), written


FALLBACK = "tokenizer_default_fallback_"


def template_text(config: Config, dataset: Config, own: str | None) -> str | None:
    """The text of the chat template that a data set uses; None where it is not known.

    Args:
        own: the tokenizer's own template.
    """
    name, written = chosen_template(config, dataset)
    if name == "jinja":
        return read_template(written) if isinstance(written, str) else None
    if name.startswith("tokenizer_default"):
        if own or name == "tokenizer_default":
            return own
        name = name.removeprefix(FALLBACK)
    file = template_files().get(name)
    return file.read_text(encoding="utf-8") if file else None


def read_template(written: str) -> str:
    """A template that is written out, or the content of the file that it names, as Axolotl takes it."""
    is_file = len(written) < 1000 and "\n" not in written and Path(written).is_file()
    return yamlfiles.read_text(Path(written)) if is_file else written


def compiled(template: str) -> Any:
    """A chat template as transformers compiles it (utils/chat_template_utils.py).

    Raises:
        jinja2.TemplateSyntaxError: it is not Jinja.
    """
    from jinja2 import TemplateRuntimeError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise TemplateRuntimeError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": lambda form: form}
    # marks what the assistant said, and changes nothing
    return environment.from_string(re.sub(r"{%-?\s*(?:end)?generation\s*-?%}", "", template))


class Chats:
    """Reads the chats of one data set of type chat_template.

    Seen with Axolotl 0.21: a row fails the run if its messages are missing, empty or no mappings, if a message has no
    role or content, or if the template refuses the order of the roles (Gemma's and Mistral's do, ChatML's takes any).
    A row is dropped if none of its turns is trained on. No error, and nothing learnt: an empty answer, a turn after the
    last answer, a role that is spelt differently, parts of a content that are no mappings. A system text that only some
    rows have in a field of their own becomes None in the others, which fails, or is trained on as "None".

    Args:
        config: the config.
        dataset: the data set's entry in it.
        template: the text of its chat template, where it is known.
    """

    def __init__(self, config: Config, dataset: Config, template: str | None):
        self.field = str(dataset.get("field_messages") or "messages")
        older = {name: dataset.get(f"message_field_{name}") or name for name in ("role", "content")}
        mapped = (dataset.get("message_property_mappings") or {}).items()
        self.names: dict[str, str] = older | {name: field for name, field in mapped if field}
        roles = dataset.get("roles") or _ROLES
        self.roles = {source: target for target, sources in roles.items() for source in sources or ()}
        to_train = dataset.get("roles_to_train")
        self.trained = [
            self.roles.get(role, role) for role in (["assistant"] if to_train is None else to_train) if role
        ]
        self.train_all = bool(config.get("train_on_inputs"))
        self.flags = [name for key in ("training", "training_detail") if (name := dataset.get(f"message_field_{key}"))]
        self.drops_system = bool(dataset.get("drop_system_message"))
        self.template = template or ""
        self.refusals: dict[Sequence[Any], str] = {}
        self.judge = compiled(template) if template and _is_template(template) else None
        if self.judge and self._refusal((("user", True, False), ("assistant", True, False))):
            self.judge = None  # it needs what is not here, such as a processor

    def read(self, row: dict[str, Any]) -> tuple[str, list[Mistake]]:
        """The text of a row, in which rows are compared and markers found, and what is wrong with it."""
        messages = _from_json(row.get(self.field))
        if not isinstance(messages, list) or not messages:
            elsewhere = (*misspelt(tuple(row), (self.field,)).values(), *_ELSEWHERE)
            other = next((name for name in elsewhere if name != self.field and isinstance(row.get(name), list)), None)
            hint = f", but one in {other}: set field_messages" if other else ""
            return "", [_bad(f"no list in the field {self.field}{hint}")]
        turns = []
        mistakes: list[Mistake] = []
        if row.get("tools") is not None and not isinstance(_from_json(row["tools"]), list):
            mistakes.append(_bad("no list in the field tools"))
        for message in messages:
            turn, found = self._turn(message)
            mistakes += found
            if turn is None:
                return "", mistakes
            turns.append(turn)
        if turns[0].role != "system" and isinstance(row.get("system"), str):
            turns.insert(0, _Turn("system", row["system"], True, False, self.train_all))
        elif turns[0].role != "system":
            mistakes.append(("lacks-system", "", ""))
        if self.drops_system and turns[0].role == "system":
            del turns[0]
        mistakes += self._of_turns(turns) if turns else [_bad("only a turn that drop_system_message drops")]
        texts = [f"{turn.role}: {turn.text}" for turn in turns]
        extra = [row.get("tools"), *(message.get("tool_calls") for message in messages)]
        texts += [orjson.dumps(value, option=orjson.OPT_SORT_KEYS).decode() for value in extra if value]
        return "\n".join(texts), [*dict.fromkeys(mistakes)]

    def _turn(self, message: Any) -> tuple["_Turn | None", list[Mistake]]:
        """A message as Axolotl takes it, None where it fails the run, and what is wrong with it."""
        if not isinstance(message, dict):
            return None, [_bad(f"a message in {self.field} that is no mapping")]
        known = (*self.names.values(), *_OPTIONAL)
        meant = misspelt(tuple(message), known)
        role, content = (message.get(self.names[name]) for name in ("role", "content"))
        calls = bool(message.get(self.names.get("tool_calls", "tool_calls")))
        for name, value in ((self.names["role"], role), (self.names["content"], content)):
            is_text = isinstance(value, str) or (isinstance(value, list) and value is content)
            if not is_text and not (value is None and value is content and role and calls):
                hint = f", but with {meant[name]}" if name in meant else ""
                if {"from", "value"} <= message.keys():
                    hint = ", but with from and value: set message_property_mappings"
                what = "nothing" if value is None else "no text"
                return None, [_bad(f"{what} in {name} of a message{hint}")]
        mistakes = [
            ("misspelt-field", f"{wrong} in a message, which Axolotl does not read; did you mean {name}?", "")
            for name, wrong in meant.items()
        ]
        parts = content if isinstance(content, list) else []
        if any(not isinstance(part, dict) for part in parts):
            return None, [_bad("a content in parts that are no mappings, whose text Axolotl leaves out")]
        texts = [part.get("text") or part.get("content") or part.get("value") for part in parts]
        text = content if isinstance(content, str) else "".join(text for text in texts if isinstance(text, str))
        role = self.roles.get(str(role), str(role))
        flags = [message.get(name) for name in self.flags]
        flags += [part.get(name) for part in parts for name in ("train", "weight")]
        given = [flag for flag in flags if flag is not None]
        trained = any(given) if given else self.train_all or role in self.trained
        more = calls or bool(message.get("reasoning_content"))
        return _Turn(role, text, content is not None, more, trained), mistakes

    def _of_turns(self, turns: list["_Turn"]) -> Iterable[Mistake]:
        roles = [turn.role for turn in turns]
        known = {*self.roles, *self.roles.values(), *self.trained}
        for role in roles:
            if role not in known and not re.search(rf"['\"]{re.escape(role)}['\"]", self.template):
                if near := get_close_matches(role.lower(), [*known], 1):
                    yield "misspelt-role", f"{role}; did you mean {near[0]}?", ""
                else:
                    yield "unknown-role", "a role that neither roles nor the template names", role[:60]
        shape = tuple((turn.role, turn.has_content, turn.more) for turn in turns)
        if refusal := self._refusal(shape):
            yield "refused-turns", refusal, ""
        elif "system" in roles[1:]:
            yield "odd-turns", "a turn of system that is not the first", ""
        else:
            said = [role for role in roles if role != "system"]
            if said[:1] == ["assistant"]:
                yield "odd-turns", "a turn of assistant before any other", ""
            for role, following in pairwise(said):
                if role == following and role != "tool":
                    yield "odd-turns", f"two turns of {role} in a row", ""
        learnt = [turn for turn in turns if turn.trained]
        if not learnt:
            about = f"turn of {' or '.join(self.trained)}" if self.trained else "turn to train on"
            yield "nothing-learnt", about, ""
        elif not turns[-1].trained:
            yield "unlearnt-end", turns[-1].role, ""
        for turn in learnt:
            if not turn.text.strip() and not turn.more:
                yield "empty-turn", turn.role, ""

    def _refusal(self, shape: Sequence[tuple[str, bool, bool]]) -> str:
        """Why the template refuses a chat of some roles, tried with texts of one letter; empty where it does not.

        A template may ask much of tools, which cannot be tried like that: only a missing content is then found.
        """
        if self.judge is None:
            return ""
        if shape not in self.refusals:
            messages = [{"role": role} | ({"content": "x"} if content else {}) for role, content, _ in shape]
            special = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), "")
            problem = ""
            try:
                self.judge.render(messages=messages, add_generation_prompt=False, tools=None, **special)
            except Exception as error:  # a template may do anything
                problem = str(error)
            tools = any(more or role == "tool" for role, _, more in shape)
            self.refusals[shape] = "" if tools and "'content'" not in problem else problem[:150]
        return self.refusals[shape]


@dataclass
class _Turn:
    """A message as the template gets it.

    Attributes:
        role: its role, by the name that the template knows.
        text: its content as one text.
        has_content: whether it has a content, be it an empty one.
        more: whether it has tool calls, or reasoning.
        trained: whether it is trained on.
    """

    role: str
    text: str
    has_content: bool
    more: bool
    trained: bool


def _bad(about: str) -> Mistake:
    return "bad-row", about, ""


def _from_json(value: Any) -> Any:
    """A value, or what the JSON says that Axolotl takes in its place; None where that is none."""
    if not isinstance(value, str):
        return value
    try:
        return orjson.loads(value)
    except orjson.JSONDecodeError:
        return None


def _is_template(text: str) -> bool:
    """Whether a text is Jinja that can be compiled."""
    from jinja2 import TemplateError

    try:
        compiled(text)
    except TemplateError:
        return False
    return True


def read_segments(row: dict[str, Any]) -> tuple[str, list[Mistake]]:
    """The text of an input_output row, and what is wrong with it (prompt_strategies/input_output.py).

    Seen: a missing label or text fails the run; a label that is text, such as "false", counts as true; a row without a
    true label is dropped.
    """
    segments = row.get("segments")
    if not isinstance(segments, list) or not segments:
        return "", [_bad("no list in the field segments")]
    for segment in segments:
        if not isinstance(segment, dict):
            return "", [_bad("a segment that is no mapping")]
        meant = misspelt(tuple(segment), ("label", "text"))
        for name, kind in (("text", str), ("label", bool | int)):
            if not isinstance(segment.get(name), kind):
                hint = f", but with {meant[name]}" if name in meant else ""
                what = (
                    "nothing" if segment.get(name) is None else "no text" if kind is str else "neither true nor false"
                )
                return "", [_bad(f"a segment with {what} in {name}{hint}")]
    learnt = "".join(segment["text"] for segment in segments if segment["label"])
    text = "\n".join(f"{bool(segment['label'])}: {segment['text']}" for segment in segments)
    return text, [] if learnt.strip() else [("nothing-learnt", "text whose label is true", "")]
