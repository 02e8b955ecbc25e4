"""The number formats that Axolotl loads a model in and trains it in."""

from dataclasses import dataclass

from ..base.yamlfiles import Config


@dataclass(frozen=True)
class Precision:
    """What Axolotl makes of bf16, fp16, bfloat16 and float16; dtypes are named as in torch.

    Attributes:
        weights: the dtype that the model is loaded in, and that 4-bit layers compute in.
        autocast: the dtype of the forward pass under autocast; None where there is no autocast.
    """

    weights: str
    autocast: str | None


def precision(config: Config, on_gpu: bool) -> Precision:
    """The precision that Axolotl resolves for a config (axolotl/utils/config/__init__.py, resolve_dtype, and
    core/builders/base.py, _configure_precision_settings).

    bf16: auto, the default, is on for every NVIDIA GPU, because torch counts emulation as support. Without a GPU it
    becomes fp16, unless fp16 is switched off or float16 is on.

    Args:
        config: the config; values of these keys other than the schema's are not expected.
        on_gpu: whether it is trained on an NVIDIA GPU, and not on a CPU.
    """
    bf16, fp16, float16 = config.get("bf16", "auto"), config.get("fp16"), config.get("float16")
    if bf16 == "auto":
        bf16 = on_gpu and not fp16
        if not on_gpu and fp16 is None and not float16:
            fp16 = True
    if bf16 or config.get("bfloat16"):
        return Precision("bfloat16", "bfloat16")
    if fp16:
        return Precision("float16", "float16")
    return Precision("float16" if float16 or config.get("load_in_8bit") else "float32", None)


def quantized(config: Config) -> bool:
    """Whether bitsandbytes quantizes the base model (axolotl/loaders/model.py, _set_quantization_config)."""
    bits = {"qlora": "load_in_4bit", "mixlora": "load_in_4bit", "lora": "load_in_8bit"}.get(str(config.get("adapter")))
    return bool(bits and config.get(bits))
