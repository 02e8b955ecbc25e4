"""Configs for older releases of Axolotl, from YAML files and model cards, brought to the supported release.

templates/old-axolotl.yaml has the tables: renamed and removed keys, changed defaults, each with its source.
"""

import json
import re
from collections.abc import Collection, Iterable
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from textwrap import shorten
from typing import Any

from packaging.version import Version

from ..base import paths, yamlfiles
from ..base.errors import UserError
from ..base.files import Row, read_json
from ..base.tables import print_table
from ..base.terminal import say
from ..base.yamlfiles import Config
from ..check import schema
from ..config import datafiles, keys, merging, models
from ..config.datafiles import DatasetRef
from ..config.merging import Override, Source
from ..config.numerics import attention
from ..config.origin import header_of
from ..config.training_settings import TrainingSettings
from ..data.raw_rows import RawFile

TABLES = paths.TEMPLATES / "old-axolotl.yaml"
_NO_SIGN = "no key of an older release"
_SHAREGPT = re.compile(r"sharegpt(?:_simple|:chat)?(?:\.(.*))?")
# v0.5.0 refuses it: src/axolotl/utils/config/models/input/v0_4_1/__init__.py:786
_LAST_WITH_SHAREGPT = Version("0.4.1")
_OF_SHAREGPT = ("conversation", "strict", "field_human", "field_model")
"""Keys of a data set that only type sharegpt reads."""
_OF_ROLES = {"user": "field_human", "assistant": "field_model"}
_ROWS = (".jsonl", ".json", ".parquet")
_EVALUATION = ("evals_per_epoch", "eval_steps", "eval_strategy")


@cache
def tables() -> Config:
    """Tables of what older releases read differently."""
    return yamlfiles.read_yaml(TABLES)


@dataclass(frozen=True)
class OldConfig:
    """A config of another release, as its author published it.

    Attributes:
        file: the YAML file or model card.
        text: the YAML, at its lines in the file.
        release: the release from --axolotl, or the one that the file states; empty without one.
        is_current: True for a recipe, a variant, or a file for the supported release, which stay as they are.
        sign: the reason to take a file for one of the supported release; empty if that is certain.
    """

    file: Path
    text: str
    release: str = ""
    is_current: bool = False
    sign: str = ""

    @property
    def config(self) -> Config:
        """Content of the YAML."""
        return yamlfiles.parse_mapping(self.text, self.file)

    def place(self, key: str) -> str:
        """File and line of a dotted key, or of its nearest existing parent."""
        line = yamlfiles.line_in(self.text, key.split("."))
        return f"{paths.shown(self.file)}:{line}"


def read(file: Path) -> OldConfig:
    """Read a YAML file, or a model card with a config in it.

    Raises:
        UserError: the file cannot be read, or is a card without a config.
    """
    return OldConfig(file, yamlfiles.recipe_text(file), yamlfiles.card_release(file))


@dataclass(frozen=True)
class KeyChange:
    """A change of a setting; values are None if a key is not set.

    Attributes:
        key: the old dotted key.
        to: the new dotted key, often the same.
        reason: the reason for the change.
    """

    key: str
    old: Any
    to: str
    new: Any
    reason: str

    def row(self) -> Row:
        """Row of a table for people."""
        new = "removed"
        if self.new is not None:
            new = f"{self.to}: {_shown(self.new)}"
        return {"key": self.key, "old": _shown(self.old), "new": new, "reason": self.reason}


def _shown(value: Any) -> str:
    """The beginning of a value as YAML on one line."""
    if value is None:
        return "not set"
    return shorten(yamlfiles.write_flow(value), 60, placeholder=" …")


@dataclass(frozen=True, kw_only=True)
class MigratedOverride(Override):
    """A migrated setting, which messages name by its place in the old file."""

    place: str

    @property
    def source(self) -> Source:
        return Source("recipe", self.place)


@dataclass
class Migration:
    """An old config on its way to the supported release; its methods are the steps, in their order.

    Attributes:
        release: the release of Axolotl that the config was written for; of a guess, the last possible one.
        sign: the key from which the release is guessed; empty if it is stated.
        config: the config so far.
        empty: the top-level keys without a value, which go.
        steps: the changes so far.
        undecided: what the user has to decide.
        profiles: the profile that replaces the config's DeepSpeed file, if there is one.
    """

    old: OldConfig
    release: Version
    sign: str
    config: Config
    empty: list[str] = field(default_factory=list)
    steps: list[KeyChange] = field(default_factory=list)
    undecided: list[UserError] = field(default_factory=list)
    profiles: list[str] = field(default_factory=list)

    def replace(self, step: KeyChange) -> None:
        """Carry out a step."""
        if step.to != step.key:
            self.config = merging.override(self.config, step.key, None)
        self.config = merging.override(self.config, step.to, step.new)
        self.steps.append(step)

    def set(self, key: str, value: Any, reason: str) -> None:
        """Set a top-level key; None removes it."""
        self.replace(KeyChange(key, self.config.get(key), key, value, reason))

    def refuse(self, key: str, problem: str, remedy: str) -> None:
        """Note a setting that the user has to decide."""
        self.undecided.append(UserError(problem, file=self.old.place(key), key=key, remedy=remedy))

    def pack(self) -> None:
        """Limit packed rows to max_packed_sequence_len, as its release did."""
        packed = self._number("max_packed_sequence_len")
        if 0 < packed < self._number("sequence_len"):
            self.set("sequence_len", packed, "max_packed_sequence_len limited it")

    def separate_packs(self) -> None:
        """Keep packed rows apart, and a micro batch in one pack, as releases before 0.5.0 did.

        v0.3.0: src/axolotl/utils/models.py:149-156; v0.4.0: same file, lines 363-367, and core/trainer_builder.py:207;
        v0.5.0: core/trainer_builder.py:1562, and transformers 4.46, in which a patch of masks has no effect.
        """
        is_newer = self.release >= Version("0.5.0") and not self.sign  # a guess is the latest possible release
        if is_newer or "multipack_real_batches" in self.config:  # which 0.5.0 introduced
            return
        if not self._has("sample_packing", "max_packed_sequence_len"):
            return
        if not attention(self.config) and self._is_llama():
            reason = "before 0.5.0, packed rows of Llama models were masked; 0.21 needs an attention that does this"
            self.set("attn_implementation", "sdpa", reason)
        if self._has("sample_packing") and attention(self.config) in ("sdpa", "eager"):
            reason = "before 0.5.0, a micro batch was one pack of micro_batch_size x sequence_len tokens"
            self.set("multipack_real_batches", False, reason)

    def _is_llama(self) -> bool:
        """True for a model that older releases took for a Llama (v0.4.0: src/axolotl/utils/config.py:112-117)."""
        names = [str(self.config.get(key)).lower() for key in ("base_model", "model_type", "type_of_model")]
        return self._has("is_llama_derived_model") or "llama" in " ".join(names)

    def accumulate(self) -> None:
        """Turn batch_size into gradient_accumulation_steps, which since v0.5.0 has a default that wins."""
        if self.release >= Version("0.5.0") or "gradient_accumulation_steps" in self.config:
            return
        batch, micro = self._number("batch_size"), self._number("micro_batch_size")
        if 0 < micro <= batch:
            reason = "Axolotl no longer divides batch_size by micro_batch_size"
            self.replace(KeyChange("batch_size", batch, "gradient_accumulation_steps", batch // micro, reason))

    def accumulate_devices(self) -> None:
        """Keep the number of rows per step of a model card's devices."""
        devices = yamlfiles.card_figures(self.old.file).get("num_devices", "1")
        if devices.isdecimal() and devices != "1":
            steps = int(devices) * TrainingSettings.of(self.config).gradient_accumulation_steps
            reason = f"the card's {devices} devices; `--gpus {devices}` divides it among as many"
            self.set("gradient_accumulation_steps", steps, reason)

    def _number(self, key: str) -> int:
        """Whole number at a key; 0 for other values, which the check reports."""
        value = self.config.get(key)
        return value if isinstance(value, int) else 0

    def use_profile(self) -> None:
        """Replace a DeepSpeed file of Axolotl by this project's profile."""
        file = self.config.get("deepspeed")
        if not isinstance(file, str) or Path(file).is_file():
            return
        profile = tables()["deepspeed"].get(Path(file).stem)
        if profile:  # the check reports other files
            self.profiles.append(profile)
            self.set("deepspeed", None, f"a file of another machine; `--profile {profile}` has the same stage")

    def update_fsdp(self) -> None:
        """Turn FSDP1's settings into FSDP2's; the list `fsdp` is removed later."""
        options, settings = self._fsdp_options(), self.config.get("fsdp_config") or {}
        if not isinstance(settings, dict):
            return  # the check reports it
        names = {key.removeprefix("fsdp_"): value for key, value in settings.items()}
        of_fsdp2 = names == settings and self.config.get("fsdp_version") == 2 and "sharding_strategy" not in names
        if not options and (of_fsdp2 or not settings):
            return
        strategy = str(names.pop("sharding_strategy", "full_shard")).lower()
        updated = self._fsdp2_settings([strategy, *options])
        updated |= {name: names[name] for name in names if name not in tables()["fsdp_without_effect"]}
        self.set("fsdp_config", updated, "FSDP2's names; Axolotl has no FSDP1 any more")
        self.set("fsdp_version", 2, "Axolotl has no FSDP1 any more")

    def _fsdp2_settings(self, options: list[str]) -> Config:
        """Settings of FSDP2 with the meaning of FSDP1's options."""
        settings: Config = {}
        for option in options:
            if option not in tables()["fsdp"]:
                remedy = "delete fsdp and fsdp_config, and use --profile fsdp2 or zero2"
                self.refuse("fsdp_config", f"FSDP2 has no counterpart of {option}", remedy)
            settings |= tables()["fsdp"].get(option, {})
        return settings

    def _fsdp_options(self) -> list[str]:
        """Options of the list `fsdp`, as transformers reads it."""
        options = self.config.get("fsdp")
        if options is True:
            return ["full_shard"]
        if isinstance(options, str):
            return options.split()
        return merging.listed(self.config, "fsdp")

    def replace_keys(self) -> None:
        """Rename and remove keys, and keep those that are gone for the user to decide."""
        for key, change in _concerned(self.config).items():
            value, new = self.config[key], change.get("to", key)
            if not value:
                self.set(key, None, "off, so without effect")
            elif "gone" in change:
                self.refuse(key, "Axolotl no longer has this feature", f"delete the key; {change['gone']}")
            elif "to" not in change:
                self.set(key, None, change["why"])
            elif new != key and new in self.config:
                self.set(key, None, f"{new} is set, too, and decides")
            else:
                self.replace(KeyChange(key, value, new, change.get("value", value), change["why"]))
                for name, text in change.get("also", {}).items():
                    self.set(name, text, change["why"])

    def update_rope(self) -> None:
        """Turn overrides of RoPE into rope_parameters, to which transformers 5 adds nothing (seen: KeyError)."""
        overrides = deepcopy(self.config.get("overrides_of_model_config"))
        model = read_json(models.folder_of(self.config) / "config.json")
        if not model or not isinstance(overrides, dict) or not {"rope_scaling", "rope_theta"} & overrides.keys():
            return  # the check reports unknown parameters
        former = model.get("rope_parameters") or model.get("rope_scaling") or {}
        settings = {"rope_theta": 10000.0} | model | former | overrides
        scaling = overrides.pop("rope_scaling", None) or former
        parameters = scaling | {"rope_type": scaling.get("rope_type", scaling.get("type", "default"))}
        parameters["rope_theta"] = settings["rope_theta"]
        overrides.pop("rope_theta", None)
        reason = "transformers 5 reads rope_parameters only, and needs all of them"
        self.set("overrides_of_model_config", overrides | {"rope_parameters": parameters}, reason)

    def list_tokens(self) -> None:
        """Turn `tokens` into a list; of a mapping, older releases read the keys."""
        tokens = self.config.get("tokens")
        if isinstance(tokens, str):
            self.set("tokens", [tokens], "Axolotl reads a list")
        elif isinstance(tokens, dict):
            self.set("tokens", list(tokens), "Axolotl reads a list")

    def leave(self, effects: Collection[str] = ()) -> None:
        """Remove the author's accounts and hosts, and all keys with some effects, see keys.yaml."""
        reason = "the author's account, project or host; `--profile wandb`, `recipe publish` use yours"
        for key, value in merging.flatten(self.config):
            if keys.affects(key) in effects or keys.find(key).kind in ("account", "host"):
                self.replace(KeyChange(key, value, key, None, reason))

    def update_datasets(self) -> None:
        """Turn rows of type sharegpt, and renamed keys of data sets, into today's."""
        for dataset in datafiles.datasets(self.config):
            kind = _SHAREGPT.fullmatch(dataset.type_name)
            if kind:
                self._chat_rows(dataset, kind[1] or "")
            for key, new in tables()["datasets"].items():
                value = dataset.entry.get(key)
                if value:
                    self.replace(
                        KeyChange(f"{dataset.key}.{key}", value, f"{dataset.key}.{new}", value, f"{key} was renamed")
                    )
        if self._has("default_system_message") and self.config.get("chat_template") != "chatml":
            self.set("default_system_message", None, "only for chatml; the template of conversation llama3 has it")

    def _chat_rows(self, dataset: DatasetRef, loader: str) -> None:
        """Turn a data set of type sharegpt into one of type chat_template with the same text."""
        entry = dataset.entry
        rows = tables()["sharegpt"].get(loader)
        name = str(entry.get("conversation") or self._default_conversation(loader))
        conversation = tables()["conversations"].get(name)
        if not rows or not conversation or "roles" in entry:
            problem = f"no counterpart of {entry['type']} with the conversation {name} and these roles"
            self.refuse(f"{dataset.key}.type", problem, "use type: chat_template with a template of your own")
            return
        updated = entry | deepcopy(rows) | entry | {"type": "chat_template", "chat_template": "jinja"}
        if not loader:
            updated["message_property_mappings"] = updated["message_property_mappings"] | _message_keys(updated)
        for role, key in _OF_ROLES.items():
            if updated.get(key):
                updated["roles"] = updated["roles"] | {role: [entry[key]]}
        updated = {key: value for key, value in updated.items() if key not in _OF_SHAREGPT}
        updated["chat_template_jinja"] = self._template(name, conversation["template"])
        text = f"the text of FastChat's conversation {name}, tokenized at once"
        if "{{ bos_token }}" in updated["chat_template_jinja"]:
            text += " and with BOS first"
        reason = f"type sharegpt is gone; {text}; no longer in the loss: {self._untrained(conversation)}"
        self.replace(KeyChange(dataset.key, entry, dataset.key, updated, reason))

    def _default_conversation(self, loader: str) -> str:
        """Conversation of rows that name none (v0.4.0: src/axolotl/utils/config.py:173-184, prompters.py:277-285)."""
        template = self.config.get("chat_template")
        if not loader and template in ("chatml", "llama3"):
            return str(template)
        return "vicuna_v1.1"

    def remove_unread(self) -> None:
        """Remove keys that Axolotl does not read."""
        for finding in schema.findings(self.config):
            value = merging.value_at(self.config, finding.key)
            reason = finding.problem
            if finding.key != finding.top_key:  # the comment in the variant is on the top-level key
                reason = f"{merging.last_key(finding.key)}: {reason}"
            if finding.rule in ("unknown-key", "plugin-key") and value is not None:
                self.replace(KeyChange(finding.key, value, finding.key, None, reason))

    def _template(self, name: str, template: str) -> str:
        """A template with the system prompt (ef22351: src/axolotl/cli/train.py:45-59), and BOS only if it was there."""
        message = self.config.get("default_system_message")
        if message and self.config.get("chat_template") == name:
            template = template.replace("'You are a helpful assistant.'", json.dumps(message, ensure_ascii=False))
        folder = models.folder_of(self.config)
        tokenizer, bos = read_json(folder / "tokenizer.json"), models.token(folder, "bos_token")
        if bos and tokenizer and bos not in json.dumps(tokenizer.get("post_processor"), ensure_ascii=False):
            template = template.replace("{{ bos_token }}", "")
        return template

    def _untrained(self, conversation: Config) -> str:
        """Tokens no longer in the loss; the token that ends a turn stays there if the tokenizer has it."""
        untrained = str(conversation["untrained"])
        if self.config.get("train_on_inputs"):
            untrained = "all but messages and their ends"
        end, settings = conversation.get("end"), dict(merging.flatten(self.config))
        if end in (None, settings.get("special_tokens.eos_token")):
            return untrained
        tokens = merging.listed(settings, "tokens") + merging.listed(
            settings, "special_tokens.additional_special_tokens"
        )
        special_tokens = models.find(self.config).special_tokens or conversation["special_tokens"]
        if end not in tokens and not re.fullmatch(special_tokens, end):
            return f"{untrained}, and {end} and what follows it; --set tokens=[{end}] keeps the end in the loss"
        ends = merging.listed(settings, "eot_tokens")
        if end not in ends:
            self.set("eot_tokens", [*ends, end], "type sharegpt trained on the end of each answer")
        return untrained

    def update_preferences(self) -> None:
        """Remove packing and held-out shares of preference pairs, which old releases read and ignored.

        v0.4.0: core/trainer_builder.py, utils/data.py; v0.9.0: utils/data/rl.py:207.
        """
        if not self.config.get("rl"):
            return
        if self._has("sample_packing"):
            self.set("sample_packing", None, "pairs of answers were not packed")
        if self._has("val_set_size") and self.release < Version("0.9.0"):
            self.set("val_set_size", None, "before 0.9.0, no pairs were held out")

    def skip_evaluation(self) -> None:
        """Remove times of evaluation if no rows are held out."""
        if self._has("val_set_size", "test_datasets"):
            return
        for key in _EVALUATION:
            if self.config.get(key):
                self.set(key, None, "no rows are held out, so it had no effect")

    def state_defaults(self) -> None:
        """State the defaults of the config's release where they have changed."""
        for default in tables()["defaults"]:
            if self.release < Version(default["before"]) and self._concerned(default):
                reason = f"{default['why']} (default before {default['before']})"
                for key, value in {default["key"]: default["old"], **default.get("also", {})}.items():
                    self.set(key, value, reason)

    def _concerned(self, change: Config) -> bool:
        """True if a changed default or meaning matters to this config."""
        if change.get("key") in self.config or self._has(*change.get("unless", ())):
            return False
        if not change.get("only", {}).items() <= self.config.items():
            return False
        if change.get("one") and len(datafiles.training_sets(self.config)) != 1:
            return False
        types = [dataset.type_name for dataset in datafiles.datasets(self.old.config)]
        if "type" in change and not any(re.fullmatch(change["type"], name) for name in types):
            return False
        return all(self._has(*names) for names in change.get("with", ()))

    def _has(self, *names: str) -> bool:
        """True if one of several keys is on."""
        return any(self.config.get(key) for key in names)

    def meanings(self) -> list[str]:
        """Changes since the config's release that no key undoes, and all changes since its first possible release."""
        first, _ = added(self.old.config)
        texts = []
        for change in [*tables()["meanings"], *tables()["defaults"]]:
            before, text = Version(change["before"]), change.get("text") or _default_text(change)
            if self.release < Version(change.get("from", "0")) or not self._concerned(change):
                continue
            if self.release < before:
                texts.append(f"since {self.release}: {text}")
            elif self.sign and first <= before:
                texts.append(f"if it was written before {before}: {text}")
        return texts

    def reasons(self) -> dict[str, str]:
        """Reasons for the changes of the old config, by top-level key; no reason for empty keys."""
        reasons: dict[str, list[str]] = {key: [] for key in self.empty}
        for step in self.steps:
            for key in dict.fromkeys((merging.top_key(step.key), merging.top_key(step.to))):
                reasons.setdefault(key, []).append(step.reason)
        return {key: "; ".join(dict.fromkeys(texts)) for key, texts in reasons.items()}

    def require_decided(self) -> None:
        """Refuse settings that the user has to decide.

        Raises:
            UserError: there are some; the error lists them.
        """
        if self.undecided:
            first, *first.further = self.undecided
            raise first

    def overrides(self) -> list[Override]:
        """The changes as overrides, except for keys that a run sets."""
        migrated: list[Override] = []
        for key in self.reasons():
            if keys.affects(key) != "run":
                migrated.append(MigratedOverride(key, self.config.get(key), place=self.old.place(key)))
        return migrated


def _message_keys(entry: Config) -> dict[str, str]:
    """Keys of messages by the first one on this machine, which decided (ef22351: prompt_strategies/sharegpt.py:123)."""
    files = [file for file in datafiles.present_files(entry) if file.suffix in _ROWS]
    if not files:
        return {}
    first = merging.value_at(next(RawFile(*files).rows(), {}), f"{entry['field_messages']}.0") or {}
    keys = {}
    for key, name in (("role", "role"), ("content", "content"), ("text", "content")):
        if key in first:
            keys[name] = key
    return keys


def _default_text(default: Config) -> str:
    """A changed default in one line."""
    return f"{default['why']} ({default['key']}: {yamlfiles.write_flow(default['old'])})"


def added(config: Config) -> tuple[Version, str]:
    """First release that reads a config, and a key or value that it added; empty if that is unknown."""
    first = Version("0"), ""
    signs = {*config, *(f"{key}: {config.get(key)}" for key in ("chat_template", "optimizer"))}
    for dataset in datafiles.datasets(config):
        signs |= {f"datasets.type: {dataset.type_name}", *(f"datasets.{key}" for key in dataset.entry)}
    for release, names in tables()["since"].items():
        new_keys = [name for name in names if name in signs]
        if new_keys:
            first = Version(release), new_keys[0]
    return first


def _concerned(config: Config) -> dict[str, Config]:
    """Rows of the table of keys that concern a config."""
    rows = {}
    for key, change in tables()["keys"].items():
        value = config.get(key)
        if key in config and value == change.get("only", value) and value == config.get(change.get("like", key)):
            rows[key] = change
    return rows


def evidence(config: Config) -> dict[str, Version]:
    """Keys of a config that are signs of its age, each with the last release that reads it."""
    signs = {}
    for key, change in _concerned(config).items():
        # people copy empty keys for years, but releases since 0.9 have no examples with those of the other rows
        if "last" in change and (config[key] or "to" not in change):
            signs[key] = Version(change["last"])
    for dataset in datafiles.datasets(config):
        if _SHAREGPT.fullmatch(dataset.type_name):
            signs[f"{dataset.key}.type"] = _LAST_WITH_SHAREGPT
    return signs


def of_file(name: str, release: str | None) -> OldConfig:
    """Config in a file, or of a recipe.

    Args:
        name: the file, a YAML file or a model card, or the name of a recipe.
        release: the release from --axolotl.

    Raises:
        UserError: there is no such file or recipe, or the card has no config.
    """
    recipe, file = paths.find_recipe(name)
    old = read(file)
    written_for = header_of(file).axolotl
    if not release and (recipe in paths.recipe_names() or written_for == str(supported())):
        return replace(old, is_current=True)
    release = release or written_for or old.release
    if release:
        return replace(old, release=release)
    if evidence(old.config):
        return old
    return replace(old, is_current=True, sign=_NO_SIGN)


def migrate(old: OldConfig, overrides: Iterable[Override] = ()) -> Migration:
    """Bring an old config to the supported release.

    Args:
        old: the config; if it states no release, its keys decide.
        overrides: the user's changes, which can decide what a migration cannot.

    Raises:
        UserError: the release is not a version, or an override cannot be set.
    """
    config = old.config
    if old.is_current:
        migration = Migration(old, supported(), old.sign, config)
        if old.sign:
            migration.leave()
            migration.remove_unread()
            migration.skip_evaluation()
        return migration
    empty = [key for key, value in config.items() if value is None]
    config = merging.apply(config, [*map(Override, empty), *overrides])
    migration = Migration(old, *_release(old), config, empty)
    migration.pack()
    migration.separate_packs()
    migration.accumulate()
    migration.accumulate_devices()
    migration.use_profile()
    migration.update_fsdp()
    migration.replace_keys()
    migration.update_rope()
    migration.list_tokens()
    migration.leave(("upload", "tracking"))
    migration.update_datasets()
    migration.remove_unread()
    migration.update_preferences()
    migration.skip_evaluation()
    migration.state_defaults()
    return migration


def _release(old: OldConfig) -> tuple[Version, str]:
    """Last release of Axolotl that a config can be for, and the key from which it is guessed, if it is not stated."""
    if not old.release:
        signs = evidence(old.config) or {_NO_SIGN: supported()}
        sign = min(signs, key=signs.__getitem__)
        return max(signs[sign], added(old.config)[0]), sign
    try:
        return Version(old.release), ""
    except ValueError:  # not a version, or one of thousands of digits
        raise UserError(f"not a version: {old.release:.40}", key="--axolotl", remedy="give one, as in 0.4.0") from None


def supported() -> Version:
    """Release of Axolotl that this project supports."""
    return Version(version("axolotl"))


def report(migration: Migration) -> None:
    """Print the changes of a migration, and log what they cannot undo."""
    print_table([step.row() for step in migration.steps], below=["reason"])
    if migration.sign:
        (first, key), releases = added(migration.old.config), f"{migration.release} or earlier ({migration.sign})"
        if key:
            releases = f"{first} or later ({key}), {releases}"
        say(f"written for Axolotl {releases}, a guess by its keys; if you know the release, pass --axolotl")
    for meaning in migration.meanings():
        say(meaning)
