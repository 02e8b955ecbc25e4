"""Facts about base models, from local files, models.yaml and the hub, without loading them."""

import json
import os
import re
import shlex
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from ..base import hub, paths, yamlfiles
from ..base.errors import UserError, did_you_mean, first_line
from ..base.files import read_bytes, read_json
from ..base.hardware import GIB
from ..base.run_files import RunFile
from ..base.yamlfiles import Config
from .merging import listed, merge

MLP = ("gate_proj", "up_proj", "down_proj", "gate_up_proj")
LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", *MLP[:3])
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""Fused layers of some families, each with the Llama layers that it combines."""
_LIKE_LLAMA = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "granite", "olmo2", "smollm3")
LAYERS = dict.fromkeys(_LIKE_LLAMA, LINEAR_LAYERS) | {"phi3": ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")}
"""Linear layers of a decoder layer, by model type; from transformers/models/<type>/modeling_<type>.py."""
NO_FOLDER = Path(os.devnull)
"""Folder of a model whose files do not matter."""
NEEDED = {"model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"}
"""Keys that an entry of models.yaml needs to replace config.json."""


@dataclass
class Model:
    """Facts about a base model; None means unknown.

    Attributes:
        gated: True if the hub requires a token and an accepted licence.
        weights_here, tokenizer_here: True if this machine has them, in a folder or the hub's cache.
        context: the maximum number of tokens.
        layers: the number of decoder layers.
        linear: the names of a decoder layer's linear layers, which LoRA can adapt.
        special_tokens: a regular expression for the tokenizer's special tokens.
        pad_token: the tokenizer's padding token.
        chat: True if the model was trained with a chat template; for unlisted models, if the tokenizer has one.
        chat_template: the tokenizer's chat template.
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


def find(config: Config) -> Model:
    """Find facts about a config's base model, in local files or models.yaml."""
    name = config.get("base_model")
    if not isinstance(name, str) or "\0" in name:
        return Model()
    entry, folder = entry_of(name), folder_of(config)
    sizes = entry.get("config", {}) | read_json(folder / "config.json")
    files = _file_names(folder)
    model = Model(
        gated=entry.get("gated"),
        context=sizes.get("max_position_embeddings") or sizes.get("n_positions"),
        layers=sizes.get("num_hidden_layers"),
        linear=LAYERS.get(str(sizes.get("model_type"))),
        special_tokens=_special_tokens(folder) or entry.get("special_tokens"),
        pad_token=token(folder, "pad_token") or entry.get("own_pad_token"),
        chat_template=chat_template(folder),
    )
    model.weights_here = any(file.endswith(WEIGHTS) for file in files)
    model.tokenizer_here = "config.json" in files and any(file.startswith("tokenizer") for file in files)
    if entry:
        model.chat = entry.get("chat", False)
    elif model.tokenizer_here:
        model.chat = model.chat_template is not None
    return model


def architecture(config: Config, download: bool = True) -> Config:
    """Content of the base model's config.json, at the revision in the config.

    Sources in order: a local model folder; models.yaml, if the config names no other revision; the hub's cache; the
    hub, for at most 10 s. If no source has the revision, the entry in models.yaml is used for it.

    Args:
        config: the config.
        download: also ask the hub.

    Raises:
        UserError: no source has the file, or the file lacks model_type.
    """
    name = config.get("base_model")
    if not isinstance(name, str) or not name or "\0" in name:
        raise UserError("not set", key="base_model", remedy="name a model")
    if Path(name).is_dir():
        return _read_architecture(Path(name) / "config.json")
    listed = dict(entry_of(name).get("config", {}))
    is_complete = listed.keys() >= NEEDED
    if is_complete and _is_listed(name, revision(config)):
        return listed
    try:
        file = _config_file(name, revision(config), download)
    except Exception as error:  # raised by the hub, by the network, or for an invalid name
        if is_complete:
            return listed
        problem = f"the config.json of {name} is not available: {first_line(error)}"
        raise UserError(problem, key="base_model") from None
    return _read_architecture(file)


def _read_architecture(file: Path) -> Config:
    content = read_json(file)
    if "model_type" not in content:
        raise UserError(f"{file} is missing, is not JSON, or lacks model_type", key="base_model")
    return content


def _is_listed(name: str, revision: Any) -> bool:
    """True if models.yaml lists a model at a revision."""
    entry = entry_of(name)
    return bool(entry) and revision in (None, entry.get("revision"))


def architecture_here(config: Config) -> Config:
    """Content of config.json without asking the hub; empty if not found."""
    with suppress(UserError):
        return architecture(config, download=False)
    return {}


def stop_ids(config: Config) -> set[int]:
    """Tokens at which generation with a config's base model stops, without the tokenizer's; empty if unknown."""
    stops = read_json(folder_of(config) / "generation_config.json").get("eos_token_id")
    if stops is None:
        stops = architecture_here(config).get("eos_token_id")
    return set(stops if isinstance(stops, list) else [stops]) - {None}


def ties_embeddings(architecture: Config) -> bool:
    """True if a model's lm_head is its embed_tokens, as by default for Gemma, whose config.json lacks the key."""
    is_gemma = str(architecture.get("model_type")).startswith("gemma")
    return bool(architecture.get("tie_word_embeddings", is_gemma))


TRAINABLE = ("embed_tokens", "lm_head")
"""Modules outside the layers that can be trained beside LoRA."""


def lost_in_merge(config: Config, architecture: Config) -> list[str]:
    """Trained modules that `axolotl merge-lora` leaves out, without a message (seen).

    It merges no LoRA on embed_tokens, and writes one matrix for a head that is tied to the embedding.
    """
    is_tied = ties_embeddings(architecture)
    names = listed(config, "lora_target_modules")
    if is_tied and not config.get("peft_ensure_weight_tying"):
        names += listed(config, "lora_modules_to_save")
    endings = ("embed_tokens", "lm_head") if is_tied else ("embed_tokens",)
    return [name for name in names if name.endswith(endings)]


def renamed(targets: list[str], layers: tuple[str, ...]) -> list[str]:
    """Rename LoRA layers for another model family; keep layers without a counterpart.

    For example, Llama's q_proj becomes Phi-3's qkv_proj. Phi-3's qkv_proj becomes Llama's q_proj, k_proj and v_proj.

    Args:
        targets: the names of the layers.
        layers: the names of the other family's layers, as in LAYERS.
    """
    names = []
    for target in targets:
        names += _counterparts(target, layers)
    return list(dict.fromkeys(names))


def _counterparts(target: str, layers: tuple[str, ...]) -> list[str]:
    """Layers of another family that compute what one layer computes; the layer itself if there are none."""
    if target in layers:
        return [target]
    for fused, parts in FUSED.items():
        if target in parts and fused in layers:
            return [fused]
    counterparts = [part for part in FUSED.get(target, ()) if part in layers]
    return counterparts or [target]


def _config_file(name: str, revision: Any, download: bool) -> Path:
    """config.json of a model from the hub's cache or the hub, within 10 s."""
    cached = hub.snapshot("models", name, revision)
    if (cached / "config.json").is_file():
        return cached / "config.json"
    if not download:
        raise FileNotFoundError("not on this machine")
    answer = hub.access(name)
    if answer.access != "open":
        raise ConnectionError(answer.says)
    from huggingface_hub import hf_hub_download

    return Path(hub.within(hub.ANSWER_TIMEOUT, partial(hf_hub_download, name, "config.json", revision=revision)))


def original(name: Any) -> Any:
    """Model whose mirror has this name in models.yaml; the name itself if it is not a mirror's."""
    return next((model for model, entry in catalogue().items() if name and entry.get("mirror") == name), name)


def is_copy(name: Any, of: Any) -> bool:
    """True if `name` equals `of` or is the mirror of the model `of`."""
    return of in (name, original(name))


def is_path(name: str) -> bool:
    """True if a base model's name is a path, existing or not."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def entry_of(name: str) -> Config:
    """Entry of a model in models.yaml; for a mirror, its original's entry; empty if unlisted."""
    entry: Config = catalogue().get(original(name), {})
    if original(name) == name:
        return entry
    return merge(entry, {"gated": False, "mirror": None, "revision": None})


def similar(name: str) -> str:
    """Hint with similar names of known models; empty for a known model."""
    return "" if entry_of(name) else did_you_mean(name, catalogue())


def folder_of(config: Config) -> Path:
    """Folder of a config's base model, local or in the hub's cache, existing or not."""
    name = str(config.get("base_model"))
    if Path(name).is_dir():
        return Path(name)
    return hub.snapshot("models", name, revision(config))


def tokenizer_command(config: Config) -> str:
    """Command that fetches config.json and tokenizer of a config's base model from the hub."""
    words = ["hf", "download", str(config["base_model"])]
    if revision(config):
        words += ["--revision", str(revision(config))]
    return f"`{shlex.join([*words, '--include', 'config.json', '--include', 'tokenizer*'])}`"


def fetch_tokenizer(config: Config) -> None:
    """Fetch the tokenizer of a config's base model from the hub, if this user has access."""
    name = str(config["base_model"])
    if not (is_path(name) or Path(name).is_dir()):
        hub.fetch_tokenizer(name, revision(config))


def _file_names(folder: Path) -> list[str]:
    """Names of the files in a folder; empty if the folder is missing."""
    if not folder.is_dir():
        return []
    return [file.name for file in folder.iterdir()]


def revision(config: Config) -> Any:
    """Revision of a config's base model; None for the default."""
    return config.get("revision_of_model") or config.get("model_revision")  # model_revision is deprecated


SMALL = GIB
"""Maximum size of weights in a rehearsal, in bytes: half a billion parameters in 16 bits."""


def is_small(config: Config) -> bool:
    """True if a local base model is unquantized, and small enough for a CPU."""
    folder = folder_of(config)
    content = read_json(folder / "config.json")
    if "model_type" not in content or "quantization_config" in content:
        return False
    return 0 < weights_bytes(folder) <= SMALL


def weights_bytes(folder: Path) -> int:
    """Size of a model's weights; 0 if the folder has none."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


WEIGHTS = (".safetensors", ".bin", ".gguf", ".pt")


@dataclass
class ModelFiles:
    """Files of a model or adapter, in a folder or on the hub.

    Attributes:
        names: the names of the files.
        read: a function that returns a file's content.
    """

    names: Collection[str]
    read: Callable[[str], bytes]

    @classmethod
    def find(cls, name: str, revision: Any, ask_hub: bool) -> "ModelFiles":
        """Files on this machine; else on the hub, unless models.yaml lists the model at this revision."""
        folder = folder_of({"base_model": name, "revision_of_model": revision})
        names = _file_names(folder)
        is_local = Path(name).is_dir() or is_path(name) or any(file.endswith(WEIGHTS) for file in names)
        if is_local or _is_listed(name, revision) or not ask_hub or hub.is_offline():
            return cls(names, lambda file: read_bytes(folder / file))
        return cls(hub.files(name, revision), lambda file: hub.content(name, file, revision))

    def json(self, name: str) -> Config:
        """Content of a JSON file, read as by transformers and PEFT; empty if they cannot read it."""
        try:
            content = json.loads(self.read(name))
        except (OSError, ValueError, RecursionError):
            return {}
        return content if isinstance(content, dict) else {}

    def pickles(self) -> list[str]:
        """Files that from_pretrained can load, and that are not safetensors.

        See `_get_resolved_checkpoint_files` in transformers/modeling_utils.py, and load_peft_weights in PEFT. A model's
        config.json can name any index, or adapter_model.bin.
        """
        loaded = []
        if not {"model.safetensors", "model.safetensors.index.json"}.intersection(self.names):
            loaded += ["pytorch_model.bin", "pytorch_model.bin.index.json"]
        if "config.json" in self.names or RunFile.ADAPTER not in self.names:
            loaded.append("adapter_model.bin")
        loaded = [name for name in loaded if name in self.names]
        for index in self.names:
            if index.endswith(".safetensors.index.json"):
                shards = self.json(index).get("weight_map")
                loaded += map(str, shards.values()) if isinstance(shards, dict) else [index]
        return [name for name in loaded if not name.endswith(".safetensors")]


DEFAULT_TOKENS = {"Qwen2Tokenizer": {"pad_token": "<|endoftext|>"}, "GemmaTokenizer": {"pad_token": "<pad>"}}
"""Default tokens of tokenizer classes in transformers."""


def token(folder: Path, name: str) -> str | None:
    """A tokenizer's token by name, such as pad_token; None if missing.

    special_tokens_map.json is read only if transformers would read it (tokenization_utils_base.py, _from_pretrained).
    """
    settings = read_json(folder / "tokenizer_config.json")
    if "added_tokens_decoder" not in settings:
        settings |= read_json(folder / "special_tokens_map.json")
    kind = str(settings.get("tokenizer_class")).removesuffix("Fast")
    content = settings.get(name, DEFAULT_TOKENS.get(kind, {}).get(name))
    if isinstance(content, dict):
        content = content.get("content")
    return content if isinstance(content, str) else None


def read_template(written: str) -> str:
    """Text of a chat template, given as text or as a file name, as in Axolotl."""
    if os.path.isfile(written):  # noqa: PTH113 (Path.is_file raises OSError for a name that is too long)
        return yamlfiles.read_text(Path(written))
    return written


def chat_template(folder: Path) -> str | None:
    """Chat template in a model's folder, from a template file or tokenizer_config.json."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return read_bytes(file).decode(errors="replace")
    template = read_json(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):
        template = _default_template(template)
    return template if isinstance(template, str) else None


def _default_template(templates: list[Any]) -> Any:
    """Template called default among several; None if there is none."""
    default = None
    for template in templates:
        if isinstance(template, dict) and template.get("name") == "default":
            default = template.get("template")
    return default


def _special_tokens(folder: Path) -> str | None:
    """A regular expression for the special tokens in tokenizer.json; None if it has none."""
    patterns = []
    for token in read_json(folder / "tokenizer.json").get("added_tokens") or ():
        if isinstance(token, dict) and token.get("special") and token.get("content"):
            patterns.append(re.escape(str(token["content"])))
    return "|".join(patterns) or None
