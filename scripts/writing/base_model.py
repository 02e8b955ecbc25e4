"""What a recipe says of its base model, from models.yaml and the model's own files."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..base.files import read_json
from ..configs import models

SPECIAL_TOKENS = "this project: the tokenizer names no padding token"
_EOS = "EOS, as Axolotl falls back to; padding carries no label"
_NOT_KNOWN = "not known whether the tokenizer names a padding token; Axolotl pads with EOS where it names none"

# Gemma 2 passes attn_logit_softcapping to its attention (transformers/models/gemma2/modeling_gemma2.py); the one in
# transformers/integrations/sdpa_attention.py does not take it.
_SOFT_CAPS = "this project: sdpa leaves out the cap on attention scores that this model was trained with"


@dataclass
class BaseModel:
    """What a recipe says of its base model.

    Attributes:
        title: its name in words.
        about: its licence, and whether it is gated.
        revision: the commit to pin; None where none is known, for the reason that `revision_reason` gives.
        pad_token: the padding token to set; None where none is to be set. `pad_reason` says why.
        layers: the names of its linear layers; None where they are not known.
        soft_caps: why sdpa is not for it; empty where it is.
        unknown: the facts that are not known, in words.
    """

    title: str
    about: str
    revision: str | None
    revision_reason: str
    pad_token: str | None
    pad_reason: str
    layers: tuple[str, ...] | None
    soft_caps: str
    unknown: list[str] = field(default_factory=list)

    def targets(self, wanted: list[str]) -> list[str]:
        """Layers for LoRA under the names that they have in this model, as `models.renamed` gives them."""
        return models.renamed(wanted, self.layers) if self.layers else wanted


def describe(entry: dict[str, Any], name: str, folder: Path | None = None) -> BaseModel:
    """What a recipe says of a base model.

    Args:
        entry: the facts of models.yaml, none where it has none.
        name: its name on the hub, or its folder.
        folder: the folder with its files, which are believed before the entry.
    """
    sizes = dict(entry.get("config") or {}) | (read_json(folder / "config.json") if folder else {})
    is_folder = Path(name).is_dir()
    pad_token, pad_reason = _padding(entry, folder)
    layers = models.LAYERS.get(str(sizes.get("model_type")))
    facts = {
        "licence": entry.get("licence"),
        "whether it is gated": is_folder or entry.get("gated") is not None,
        "revision": is_folder or entry.get("revision"),
        "padding token": pad_reason != _NOT_KNOWN,
        "special tokens": entry.get("special_tokens") or (folder and (folder / "tokenizer.json").is_file()),
        "type and sizes": all(size in sizes for size in models.NEEDED),
        "context": sizes.get("max_position_embeddings"),
        "linear layers": layers,
    }
    unpinned = "a folder has none" if is_folder else "no commit of this model is listed, so that a run takes the newest"
    return BaseModel(
        title=str(entry.get("title", name)),
        about=f"licence {entry.get('licence', 'not known')}, {_access(entry, is_folder)}",
        revision=entry.get("revision"),
        revision_reason="this project: pinned" if entry.get("revision") else unpinned,
        pad_token=pad_token,
        pad_reason=pad_reason,
        layers=layers,
        soft_caps=_SOFT_CAPS if sizes.get("model_type") == "gemma2" else "",
        unknown=[fact for fact, is_known in facts.items() if not is_known],
    )


def _access(entry: dict[str, Any], is_folder: bool) -> str:
    if is_folder:
        return "a folder of this machine"
    if entry.get("gated"):
        return f"gated: accept it on the hub and log in{', or use --mirror' if 'mirror' in entry else ''}"
    return "not gated" if "gated" in entry else "not known whether it is gated"


def _padding(entry: dict[str, Any], folder: Path | None) -> tuple[str | None, str]:
    """The padding token that a recipe sets, or None; and the reason."""
    if folder and (folder / "tokenizer_config.json").is_file():
        own = models.token(folder, "pad_token")
    else:
        folder, own = None, entry.get("own_pad_token")
    if own:
        return None, f"the tokenizer has a padding token, {own}"
    if "pad_token" in entry:
        return str(entry["pad_token"]), str(entry.get("pad_reason", "the one in templates/models.yaml"))
    if not folder:
        return None, _NOT_KNOWN
    by_id = {
        added.get("id"): added.get("content") for added in read_json(folder / "tokenizer.json").get("added_tokens", [])
    }
    for file in ("generation_config.json", "config.json"):
        if token := by_id.get(read_json(folder / file).get("pad_token_id", -1)):
            return str(token), f"pad_token_id of the model's {file}"
    eos = models.token(folder, "eos_token")
    return (eos, _EOS) if eos else (None, _NOT_KNOWN)
