"""Facts about base models, without loading them: from files on this machine, from models.yaml and from the hub."""

import re
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from ..base import hub, paths, yamlfiles
from ..base.errors import UserError
from ..base.files import read_json
from ..base.yamlfiles import Config

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj", "gate_up_proj")
LINEAR_LAYERS = (*ATTENTION, *MLP[:3])
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""The layers of some families that hold several of Llama's in one."""
_LIKE_LLAMA = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "granite", "olmo2", "smollm3")
LAYERS = dict.fromkeys(_LIKE_LLAMA, LINEAR_LAYERS) | {"phi3": ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")}
"""The linear layers in each decoder layer, by model type; from transformers/models/<type>/modeling_<type>.py."""
NEEDED = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
"""Keys of config.json that an entry of models.yaml needs to replace it."""


@dataclass
class Model:
    """Facts about a base model; None is unknown.

    Attributes:
        gated: True if the hub asks for an accepted licence and a token.
        weights_here, tokenizer_here: True if they are on this machine, in a folder or in the hub's cache.
        context: the largest number of tokens that it was made for.
        layers: the number of its decoder layers.
        linear: the names of the linear layers in each of them that LoRA can adapt.
        special_tokens: a regular expression for its tokenizer's special tokens.
        pad_token: the padding token that its tokenizer names.
        chat: True if it was trained with a chat template.
        chat_template: the chat template of its tokenizer.
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
    chat_template: str | None = None


@cache
def catalogue() -> Config:
    """The models of templates/models.yaml."""
    return yamlfiles.read_yaml(paths.TEMPLATES / "models.yaml")


def find(composed: Config) -> Model:
    """Facts about a config's base model, from its local files, else from models.yaml."""
    name = composed.get("base_model")
    if not isinstance(name, str) or "\0" in name:
        return Model()
    entry = entry_of(name)
    sizes = entry.get("config") or {}
    special_tokens = entry.get("special_tokens")
    folder = folder_of(composed)
    if folder:
        sizes = sizes | read_json(folder / "config.json")
        special_tokens = _special_tokens(folder) or special_tokens
    context = sizes.get("max_position_embeddings")
    layers = sizes.get("num_hidden_layers")
    return Model(
        gated=False if Path(name).is_dir() else entry.get("gated"),
        weights_here=folder is not None and any(any(folder.glob(f"*{suffix}")) for suffix in _WEIGHTS),
        tokenizer_here=folder is not None and (folder / "config.json").is_file() and any(folder.glob("tokenizer*")),
        context=context if isinstance(context, int) else None,
        layers=layers if isinstance(layers, int) else None,
        linear=LAYERS.get(str(sizes.get("model_type"))),
        special_tokens=special_tokens,
        pad_token=token(folder, "pad_token") or entry.get("own_pad_token"),
        chat=entry.get("chat", False) if entry else None,
        chat_template=chat_template(folder),
    )


def architecture(composed: Config, download: bool = True) -> Config:
    """The content of a base model's config.json at the revision that a config names.

    It is that of the model's folder; of models.yaml, where the config names its revision or none; or of the hub's cache
    or the hub, which is waited for 10 s at most. Where they do not have that revision, models.yaml stands in for it.

    Args:
        composed: the config.
        download: ask the hub, too.

    Raises:
        UserError: it is in none of them, or does not name the type of the model.
    """
    name = composed.get("base_model")
    if not isinstance(name, str) or not name or "\0" in name:
        raise UserError("base_model: names no model")
    revision = _revision(composed)
    entry = entry_of(name)
    listed: Config = entry.get("config") or {}
    missing = [size for size in NEEDED if size not in listed]
    file = Path(name) / "config.json"
    if not Path(name).is_dir():
        if not missing and revision in (None, entry.get("revision")):
            return dict(listed)
        try:
            file = _config_file(name, revision, download)
        except Exception as error:  # of the hub, of the network, or of the name
            if not missing:
                return dict(listed)
            reason = hub.reason(error)
            lacks = f", and its entry in {paths.TEMPLATES / 'models.yaml'} lacks {', '.join(missing)}" if listed else ""
            raise UserError(f"base_model: the config.json of {name} is not available{lacks}: {reason}") from None
    content = read_json(file)
    if "model_type" not in content:
        raise UserError(f"base_model: {file} is missing, or not JSON that names a model_type")
    return content


def architecture_here(composed: Config) -> Config:
    """Architecture without asking the hub; empty if it is not found."""
    with suppress(UserError):
        return architecture(composed, download=False)
    return {}


def renamed(targets: list[str], layers: tuple[str, ...]) -> list[str]:
    """Names of LoRA layers in another family; layers without a counterpart stay.

    A layer that is part of a larger one there becomes that one, and a fused layer its parts.

    Args:
        targets: their names.
        layers: those of the other family, as in LAYERS.
    """
    whole = {part: name for name, parts in FUSED.items() if name in layers for part in parts}
    found: list[str] = []
    for name in targets:
        parts = [part for part in FUSED.get(name, ()) if part in layers]
        found += [name] if name in layers else parts or [whole.get(name, name)]
    return list(dict.fromkeys(found))


def _config_file(name: str, revision: Any, download: bool) -> Path:
    """config.json of a model from the hub's cache or the hub, within 10 s."""
    cached = _in_hub_cache(name, revision)
    if cached and (cached / "config.json").is_file():
        return cached / "config.json"
    if not download:
        raise FileNotFoundError("it is not on this machine")
    if (answer := hub.access(name)).access != "open":
        raise ConnectionError(answer.says)
    from huggingface_hub import hf_hub_download

    return Path(hub.within(hub.ANSWER_TIMEOUT, partial(hf_hub_download, name, "config.json", revision=revision)))


def is_copy(name: Any, of: Any) -> bool:
    """True if the first name is that of the second model, or of its mirror."""
    return name == of or (name is not None and name == catalogue().get(str(of), {}).get("mirror"))


def is_mirror(name: str) -> bool:
    """True if a model is another's mirror in models.yaml."""
    return any(entry.get("mirror") == name for entry in catalogue().values())


def is_path(name: str) -> bool:
    """True if a base model is named by a path, existing or not."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def entry_of(name: str) -> Config:
    """Entry of a model, or of its original, in models.yaml; empty without one."""
    for entry in catalogue().values():
        if entry.get("mirror") == name:
            return {key: fact for key, fact in entry.items() if key not in ("mirror", "revision")} | {"gated": False}
    return catalogue().get(name, {})


def folder_of(composed: Config) -> Path | None:
    """Folder of a config's base model, local or in the hub's cache, or None."""
    name = str(composed.get("base_model"))
    return Path(name) if Path(name).is_dir() else _in_hub_cache(name, _revision(composed))


def _revision(composed: Config) -> Any:
    return composed.get("revision_of_model") or composed.get("model_revision")  # the latter is deprecated


SMALL = 2**30
"""Bytes of the largest weights that a rehearsal trains, of half a billion parameters in 16 bits."""


def is_small(composed: Config) -> bool:
    """True if a base model on this machine is not quantized, and small enough for a CPU."""
    folder = folder_of(composed)
    content = read_json(folder / "config.json") if folder else {}
    if not folder or "model_type" not in content or "quantization_config" in content:
        return False
    return 0 < sum(file.stat().st_size for file in folder.glob("*.safetensors")) <= SMALL


_WEIGHTS = (".safetensors", ".bin", ".gguf", ".pt")


DEFAULT_TOKENS = {"Qwen2Tokenizer": {"pad_token": "<|endoftext|>"}, "GemmaTokenizer": {"pad_token": "<pad>"}}
"""Default tokens of these classes of transformers."""


def token(folder: Path | None, name: str) -> str | None:
    """The token, such as pad_token, that the tokenizer in a folder names, or None.

    A special_tokens_map.json counts where transformers reads it (tokenization_utils_base.py, _from_pretrained).
    """
    settings = read_json(folder / "tokenizer_config.json") if folder else {}
    if folder and "added_tokens_decoder" not in settings:
        settings |= read_json(folder / "special_tokens_map.json")
    kind = str(settings.get("tokenizer_class")).removesuffix("Fast")
    named = settings.get(name, DEFAULT_TOKENS.get(kind, {}).get(name))
    content = named.get("content") if isinstance(named, dict) else named
    return content if isinstance(content, str) else None


def read_template(written: str) -> str:
    """Text of a chat template, or of the file that it names, as in Axolotl."""
    is_file = len(written) < 1000 and "\n" not in written and Path(written).is_file()
    return yamlfiles.read_text(Path(written)) if is_file else written


def chat_template(folder: Path | None) -> str | None:
    """Chat template of a model's folder, from its file or the tokenizer's config."""
    if not folder:
        return None
    if (file := folder / "chat_template.jinja").is_file():
        return file.read_text(encoding="utf-8", errors="replace")
    named = read_json(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(named, list):
        named = {str(one.get("name")): one.get("template") for one in named if isinstance(one, dict)}.get("default")
    return named if isinstance(named, str) else None


def _special_tokens(folder: Path) -> str | None:
    """A regular expression for the special tokens in a tokenizer.json; None where it names none."""
    added = read_json(folder / "tokenizer.json").get("added_tokens") or ()
    special = [token for token in added if isinstance(token, dict) and token.get("special")]
    return "|".join(re.escape(str(token["content"])) for token in special if token.get("content")) or None


def _in_hub_cache(name: str, revision: Any) -> Path | None:
    """The cached snapshot of a model from the hub at a revision (main by default), or None.

    huggingface_hub has a function for this, which takes as long to import as `recipe check` may take in all.
    """
    from huggingface_hub.constants import HF_HUB_CACHE

    repository = Path(HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
    wanted = str(revision or "main")
    ref = repository / "refs" / wanted
    snapshot = repository / "snapshots" / (ref.read_text().strip() if ref.is_file() else wanted)
    return snapshot if snapshot.is_dir() else None
