"""What is known about a base model without loading it."""

import os
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ..base import paths, yamlfiles
from ..base.errors import UserError
from ..base.files import read_json
from ..base.yamlfiles import Config

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
LINEAR_LAYERS = (*ATTENTION, "gate_proj", "up_proj", "down_proj")
_SAME_LAYERS = {"llama", "mistral", "qwen2", "qwen3"}  # model types whose decoder layers have just these


@dataclass
class Model:
    """A base model, as far as it is known; None is unknown.

    Attributes:
        gated: whether the hub asks for an accepted licence and a token.
        weights_here, tokenizer_here: whether they are on this machine, in a folder or in the hub's cache.
        context: the most tokens that it was made for.
        layers: how many layers its decoder has.
        linear: the names of the linear layers in each of them that LoRA can adapt.
        special_tokens: a regular expression for its tokenizer's special tokens.
        pad_token: the padding token that its tokenizer names.
        chat: whether it was trained to follow a chat template.
    """

    gated: bool | None = None
    weights_here: bool = False
    tokenizer_here: bool = False
    context: int | None = None
    layers: int | None = None
    linear: tuple[str, ...] | None = None
    special_tokens: str | None = None
    pad_token: str | None = None
    chat: bool | None = None


@cache
def catalogue() -> dict[str, Any]:
    """The models of templates/models.yaml."""
    return yamlfiles.read_yaml(paths.TEMPLATES / "models.yaml")


def find(composed: Config) -> Model:
    """The base model of a config: its files where they are on this machine, else what models.yaml says."""
    name = composed.get("base_model")
    if not isinstance(name, str) or "\0" in name:
        return Model()
    known = _known(name)
    tokens = known.get("special_tokens")
    folder, sizes = _sizes(name, _revision(composed))
    if folder:
        tokens = _special_tokens(read_json(folder / "tokenizer.json")) or tokens
    context, layers = sizes.get("max_position_embeddings"), sizes.get("num_hidden_layers")
    return Model(
        gated=False if Path(name).is_dir() else known.get("gated"),
        weights_here=folder is not None and any(any(folder.glob(f"*{suffix}")) for suffix in _WEIGHTS),
        tokenizer_here=folder is not None and (folder / "config.json").is_file() and any(folder.glob("tokenizer*")),
        context=context if isinstance(context, int) else None,
        layers=layers if isinstance(layers, int) else None,
        linear=LINEAR_LAYERS if str(sizes.get("model_type")) in _SAME_LAYERS else None,
        special_tokens=tokens,
        pad_token=_pad_token(folder),
        chat=known.get("chat", False) if known else None,
    )


def is_copy(name: Any, of: Any) -> bool:
    """Whether two names are of the same model, as far as that is known by name."""
    return name == of or (name is not None and name == catalogue().get(str(of), {}).get("mirror"))


def is_path(name: str) -> bool:
    """Whether the name of a base model is that of a folder, there or not, and of no model of the hub."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def _known(name: str) -> dict[str, Any]:
    """What models.yaml says of a model, or of the one that it is a copy of."""
    mirrored: dict[str, Any] = next((known for known in catalogue().values() if known.get("mirror") == name), {})
    return mirrored | {"gated": False} if mirrored else catalogue().get(name, {})


def architecture(composed: Config, download: bool = True) -> dict[str, Any]:
    """The content of a base model's config.json at the config's revision: of its folder, of the hub's cache, of
    models.yaml or of the hub.

    Args:
        composed: the config.
        download: whether the hub may be asked.

    Raises:
        UserError: it is in none of them, or names no kind of model.
    """
    name = composed.get("base_model")
    if not isinstance(name, str) or not name or "\0" in name:
        raise UserError("base_model: names no model")
    folder, content = _sizes(name, _revision(composed))
    if "model_type" not in content and not Path(name).is_dir():
        from huggingface_hub import hf_hub_download

        try:
            file = hf_hub_download(name, "config.json", revision=_revision(composed), local_files_only=not download)
        except Exception as error:  # of the hub, of the network, or of the name
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise UserError(f"base_model: the config.json of {name} cannot be had: {reason}") from None
        folder = Path(file).parent
        content = read_json(Path(file))
    if "model_type" not in content:
        raise UserError(f"base_model: {folder}/config.json is not there, or no JSON that names a model_type")
    return content


def _revision(composed: Config) -> Any:
    return composed.get("revision_of_model") or composed.get("model_revision")


def _sizes(name: str, revision: Any) -> tuple[Path | None, dict[str, Any]]:
    """The folder of a base model where it is on this machine, and its config.json there over what models.yaml says."""
    folder = Path(name) if Path(name).is_dir() else _in_hub_cache(name, revision)
    return folder, _known(name).get("config", {}) | (read_json(folder / "config.json") if folder else {})


_WEIGHTS = (".safetensors", ".bin", ".gguf", ".pt")


def _pad_token(folder: Path | None) -> str | None:
    named = read_json(folder / "tokenizer_config.json").get("pad_token") if folder else None
    token = named.get("content") if isinstance(named, dict) else named
    return token if isinstance(token, str) else None


def _special_tokens(tokenizer: dict[str, Any]) -> str | None:
    """A regular expression for the special tokens in a tokenizer.json; None where it names none."""
    added = tokenizer.get("added_tokens")
    special = [token for token in added if isinstance(token, dict) and token.get("special")] if added else []
    return "|".join(re.escape(str(token["content"])) for token in special if token.get("content")) or None


def _in_hub_cache(name: str, revision: Any) -> Path | None:
    """The folder of a model that was fetched from the hub before, at a revision (by default main); None without."""
    from huggingface_hub.constants import HF_HUB_CACHE

    repository = Path(HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
    wanted = str(revision or "main")
    try:
        commit = (repository / "refs" / wanted).read_text() if not re.fullmatch("[0-9a-f]{40}", wanted) else wanted
    except (OSError, ValueError):
        return None
    folder = repository / "snapshots" / commit.strip()
    return folder if folder.is_dir() else None


def has_token() -> bool:
    """Whether there is a token for the hub, as huggingface_hub looks for one."""
    from huggingface_hub.constants import HF_TOKEN_PATH

    if any(os.environ.get(name) for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")):
        return True
    return Path(HF_TOKEN_PATH).is_file() and bool(Path(HF_TOKEN_PATH).read_text().strip())


def is_offline() -> bool:
    """Whether the hub must not be asked."""
    from huggingface_hub.constants import HF_HUB_OFFLINE

    return bool(HF_HUB_OFFLINE)
