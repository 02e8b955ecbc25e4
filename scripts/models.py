"""What is known about a base model without loading it."""

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import orjson

from . import config, paths
from .config import Config

LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_SAME_LAYERS = {"llama", "mistral", "qwen2", "qwen3"}  # model types whose decoder layers have just these


@dataclass
class Model:
    """A base model, as far as it is known; None is unknown.

    Attributes:
        gated: whether the hub asks for an accepted licence and a token.
        on_this_machine: whether its files are here, as a folder or in the hub's cache.
        context: the most tokens that it was made for.
        layers: the names of the linear layers in its decoder that LoRA can adapt.
        special_tokens: a regular expression for its tokenizer's special tokens.
        chat: whether it was trained to follow a chat template.
    """

    gated: bool | None = None
    on_this_machine: bool = False
    context: int | None = None
    layers: tuple[str, ...] | None = None
    special_tokens: str | None = None
    chat: bool | None = None


@cache
def catalogue() -> dict[str, Any]:
    """The models of templates/models.yaml."""
    return config.read_yaml(paths.TEMPLATES / "models.yaml")


def find(composed: Config) -> Model:
    """The base model of a config: its files where they are on this machine, else what models.yaml says."""
    name, revision = composed.get("base_model"), composed.get("revision_of_model") or composed.get("model_revision")
    if not isinstance(name, str) or "\0" in name:
        return Model()
    entry = catalogue().get(name, {})
    mirrored: dict[str, Any] = next((known for known in catalogue().values() if known.get("mirror") == name), {})
    known = mirrored | {"gated": False} if mirrored else entry
    folder = Path(name) if Path(name).is_dir() else _in_hub_cache(name, revision)
    kind, tokens = known.get("model_type"), known.get("special_tokens")
    context, chat = known.get("context"), known.get("chat", False) if known else None
    if folder:
        sizes = _json(folder / "config.json")
        kind, context = sizes.get("model_type", kind), sizes.get("max_position_embeddings", context)
        added = _json(folder / "tokenizer.json").get("added_tokens", [])
        tokens = "|".join(re.escape(token["content"]) for token in added if token.get("special")) or tokens
    return Model(
        gated=False if Path(name).is_dir() else known.get("gated"),
        on_this_machine=folder is not None,
        context=context if isinstance(context, int) else None,
        layers=LINEAR_LAYERS if kind in _SAME_LAYERS else None,
        special_tokens=tokens,
        chat=chat,
    )


def _in_hub_cache(name: str, revision: Any) -> Path | None:
    """The folder of a model that was fetched from the hub before, at a revision (by default main); None without."""
    from huggingface_hub.constants import HF_HUB_CACHE

    repository = Path(HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
    wanted = str(revision or "main")
    try:
        commit = (repository / "refs" / wanted).read_text() if not re.fullmatch("[0-9a-f]{40}", wanted) else wanted
    except (OSError, ValueError):
        return None
    folder = repository / "snapshots" / commit
    return folder if (folder / "config.json").is_file() else None


def has_token() -> bool:
    """Whether there is a token for the hub, as huggingface_hub looks for one."""
    import os

    from huggingface_hub.constants import HF_TOKEN_PATH

    return any(os.environ.get(name) for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")) or Path(HF_TOKEN_PATH).is_file()


def is_offline() -> bool:
    """Whether the hub must not be asked."""
    from huggingface_hub.constants import HF_HUB_OFFLINE

    return bool(HF_HUB_OFFLINE)


def _json(file: Path) -> dict[str, Any]:
    """The mapping in a JSON file; empty where there is none."""
    try:
        content = orjson.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
