"""A config's data sets and their files on this machine."""

import math
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from glob import glob
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from ..base import hub, paths
from ..base.errors import UserError
from ..base.files import reading, sha256
from ..base.processes import bounded
from ..base.yamlfiles import Config
from ..data import studies
from . import models
from .merging import flatten, last_key
from .training_settings import TrainingSettings

_SUFFIXES = {".jsonl", ".json", ".parquet", ".csv", ".arrow", ".text", ".txt", ".gz", ".zst"}


Section = Literal["datasets", "test_datasets"]
"""Keys of a config that list data sets: for training, and for evaluation."""


class DataFile(BaseModel):
    """A data file of a run, with hash and size."""

    path: str
    sha256: str
    bytes: int
    rows: int | None = None  # None for formats other than JSON lines

    @classmethod
    def from_file(cls, file: Path) -> "DataFile":
        """Record of an existing file."""
        rows = count_rows(file) if file.suffix == ".jsonl" else None
        return cls(path=str(file), sha256=sha256(file), bytes=file.stat().st_size, rows=rows)


@dataclass(frozen=True)
class DatasetRef:
    """A data set of a config; equal to others at the same place.

    Attributes:
        section: the config's list of data sets.
        index: the position in that list.
        entry: the settings of the data set, as the config has them.
        rl: the config's preference training, such as `dpo`; None without one.
    """

    section: Section
    index: int
    entry: Config = field(compare=False, repr=False)
    rl: str | None = field(default=None, compare=False, repr=False)

    @property
    def key(self) -> str:
        """Dotted key of the data set, such as `datasets.0`."""
        return f"{self.section}.{self.index}"

    @property
    def is_training(self) -> bool:
        """True for training data, False for evaluation data."""
        return self.section == "datasets"

    @property
    def path(self) -> str:
        """File, folder or name on the hub."""
        return str(self.entry.get("path"))

    @property
    def type_name(self) -> str:
        """Type of the rows as text."""
        return str(self.entry.get("type"))

    @property
    def split(self) -> str:
        """Split of the data set; by default that of its section, or the only one of a file."""
        is_file = Path(self.path).is_file()
        default = "train" if self.is_training or is_file else "test"
        return str(self.entry.get("split") or default)

    @property
    def source(self) -> list[Any]:
        """Settings that select the rows, without a part such as [:40] of the split."""
        keys = ("path", "name", "data_files", "revision", "shards", "shards_idx")
        return [self.split.partition("[")[0], *map(self.entry.get, keys)]


NO_DATASET = DatasetRef("datasets", 0, {})
"""First data set of a config that lists none."""


def datasets(config: Config) -> list[DatasetRef]:
    """Data sets of a config: those for training, then those for evaluation."""
    return [*training_sets(config), *test_sets(config)]


def training_sets(config: Config) -> list[DatasetRef]:
    """Training data sets of a config."""
    return in_section(config, "datasets")


def test_sets(config: Config) -> list[DatasetRef]:
    """Evaluation data sets of a config, from its key test_datasets."""
    return in_section(config, "test_datasets")


def in_section(config: Config, section: Section) -> list[DatasetRef]:
    """Data sets in a section of a config; values that are not mappings are left out."""
    entries = config.get(section)
    if not isinstance(entries, list):
        return []
    rl = config.get("rl")
    return [DatasetRef(section, i, entry, rl) for i, entry in enumerate(entries) if isinstance(entry, dict)]


@dataclass(frozen=True)
class HubCommit:
    """Commit of a model or data set that a config names on the hub, from the hub's cache.

    Attributes:
        key: the key with the name.
        revision_key: the key that pins the commit.
        is_pinned: whether it does.
    """

    key: str
    revision_key: str
    commit: str
    is_pinned: bool


def hub_commits(config: Config) -> Iterator[HubCommit]:
    """Commits of the base model and the data sets that are in the hub's cache."""
    yield from _commit("models", config.get("base_model"), models.revision(config), "base_model", "revision_of_model")
    for dataset in datasets(config):
        revision, key = dataset.entry.get("revision"), dataset.key
        yield from _commit("datasets", dataset.path, revision, f"{key}.path", f"{key}.revision")


def _commit(kind: hub.Kind, name: Any, revision: Any, key: str, revision_key: str) -> Iterator[HubCommit]:
    """Commit of a repository; none for a local path, or a repository that is not in the cache."""
    if not isinstance(name, str) or "://" in name or _local_path(name):
        return
    folder = hub.snapshot(kind, name, revision)
    if folder.is_dir():
        yield HubCommit(key, revision_key, folder.name, folder.name == revision)


def chat_options(config: Config) -> str:
    """Options that make `axolotl inference` use the training prompt; empty if Axolotl lacks them."""
    types = {dataset.type_name for dataset in training_sets(config)}
    return {"chat_template": "--chat", "alpaca": "--prompter AlpacaPrompter"}.get("".join(types), "")


def local_files(dataset: Config) -> list[Path]:
    """Files of a local data set, existing or not; empty for remote data.

    A data set is a file, a folder, or a folder's files that `data_files` lists by name or pattern. Axolotl reads
    `data_files` only if `path` is a folder or on a hub, and accepts patterns only in `data_files`
    (utils/data/shared.py).
    """
    path = _local_path(dataset.get("path"))
    if path is None:
        return []
    if not path.is_dir():
        return [path]
    patterns = dataset.get("data_files")
    if not isinstance(patterns, list):
        patterns = [patterns]
    files: list[Path] = []
    with bounded(str(path)):  # a pattern can search the whole disk
        if not any(patterns):
            return sorted(file for file in path.rglob("*") if file.is_file())
        for pattern in map(str, patterns):
            if "://" not in pattern:
                matching = sorted(glob(pattern, recursive=True))  # noqa: PTH207 (Path.glob refuses absolute patterns)
                files += map(Path, matching or [pattern])
    return files


def _local_path(name: Any) -> Path | None:
    """Path of a data set on this machine, existing or not; None for remote data."""
    if not isinstance(name, str) or not name or "\0" in name or "://" in name:
        return None
    path = Path(name)
    if path.exists() or _looks_local(name):
        return path
    return None


def present_files(dataset: Config) -> list[Path]:
    """A data set's existing local files."""
    return [file for file in local_files(dataset) if file.is_file()]


def jsonl_files(dataset: Config) -> list[Path]:
    """A data set's existing local JSONL files."""
    return [file for file in present_files(dataset) if file.suffix == ".jsonl"]


def jsonl(entry: Config, folder: Path = Path()) -> Path | None:
    """JSONL file of a data set; None if Axolotl must load the rows."""
    file = Path(folder, str(entry.get("path")))
    if file.suffix != ".jsonl" or not file.is_file():
        return None
    if any(entry.get(key) for key in ("weight", "preprocess_shards", "name", "ds_type")):
        return None
    return file if has_all_lines(entry) else None


def has_all_lines(entry: Config) -> bool:
    """True if a data set has all lines of its files, or the first ones; otherwise only Axolotl knows which."""
    if entry.get("shards") or (Path(str(entry.get("path"))).is_dir() and not entry.get("data_files")):
        return False
    return entry.get("split") in (None, "train") or first_rows(entry) is not None


def missing_files(dataset: Config) -> list[Path]:
    """Missing local files of a data set, except prepared rows of a study."""
    return [file for file in local_files(dataset) if not (file.is_file() or studies.prepare_commands(str(file)))]


def missing_paths(config: Config) -> list[str]:
    """Keys that name a missing local file or folder beside data and models."""
    keys = []
    for key in ("deepspeed", "lora_model_dir", "resume_from_checkpoint"):
        name = config.get(key)
        if not isinstance(name, str) or studies.fetch_command(name):
            continue
        if Path(name).is_file() or Path(name).is_dir():  # not a FIFO, at which training would wait
            continue
        may_be_on_hub = key == "lora_model_dir" and name.count("/") == 1
        if not may_be_on_hub or _looks_local(name):
            keys.append(key)
    return keys


def _looks_local(name: str) -> bool:
    """True if a missing path looks like a local path rather than a path on a hub."""
    path = Path(name)
    in_a_folder = len(path.parts) > 1 and Path(path.parts[0]).is_dir()
    return models.is_path(name) or path.suffix in _SUFFIXES or f".{path}" in _SUFFIXES or in_a_folder


_PROMPT = "Question: {instruction}\nAnswer: "


@dataclass(frozen=True)
class Form:
    """Form of rows.

    Attributes:
        fields: the fields that a row must have; those of a question and its answer come in this order.
        entry: the data set entry, without path, with which Axolotl reads the rows.
        is_pair: True for a question and its answer, without roles.
    """

    fields: tuple[str, ...]
    entry: Config
    is_pair: bool = False

    @property
    def has_preferences(self) -> bool:
        """True for a chosen and a rejected answer."""
        return "rejected" in self.fields


def _question_form(question: str, answer: str) -> Form:
    """Form of rows with a question and an answer, with a prompt of this project."""
    kind = {"field_instruction": question, "field_output": answer, "no_input_format": _PROMPT}
    return Form((question, answer), {"type": kind}, is_pair=True)


def _preference_form(prompt: str) -> Form:
    """Form of preference pairs with a prompt, as text or messages."""
    return Form((prompt, "chosen", "rejected"), {"type": "chat_template", "field_messages": prompt})


CONVERSATIONS = Form(("chosen", "rejected"), {"type": "chat_template.argilla_chat"})
"""Form of preference pairs whose answers are the last messages of conversations."""
FORMS = (
    *map(_preference_form, ("messages", "prompt", "question")),
    CONVERSATIONS,
    Form(("messages",), {"type": "chat_template"}),
    Form(("conversations",), {"type": "chat_template", "field_messages": "conversations"}),
    Form(("segments",), {"type": "input_output"}),
    Form(("instruction", "output"), {"type": "alpaca"}, is_pair=True),
    _question_form("question", "answer"),
    _question_form("prompt", "completion"),
    _question_form("prompt", "response"),
    Form(("text",), {"type": "completion"}),
)
"""Forms of rows that this project recognizes by their fields; an earlier one has priority."""


def form_of(fields: Collection[str]) -> Form | None:
    """Form of rows with these fields; None for unknown fields."""
    return next((form for form in FORMS if set(form.fields) <= set(fields)), None)


def record(config: Config) -> list[DataFile]:
    """Local data files of a config, with hashes.

    Raises:
        UserError: a file does not exist.
    """
    files = {}
    for dataset in datasets(config):
        for path in existing_files(dataset):
            files[path] = DataFile.from_file(path)
    return list(files.values())


def existing_files(dataset: DatasetRef) -> list[Path]:
    """Local files of a data set.

    Raises:
        UserError: a file does not exist.
    """
    files = local_files(dataset.entry)
    for path in files:
        if not path.is_file():
            raise UserError(f"{path.absolute()} {paths.absence(path)}", key=f"{dataset.key}.path")
    return files


_NAME_FILES = ("base_model", "tokenizer_config", "lora_model_dir", "deepspeed", "chat_template_jinja")
_OF_MODELS = re.compile(r".*\.(json|jinja|model|txt)|adapter_model\..*|adapter\.sha256")


def named_files(config: Config) -> list[DataFile]:
    """Local files other than data that a config names, with hashes.

    From a model's folder, this function lists settings, tokenizer, and an adapter's weights or hash, but not the base
    weights. The rehearsal's small model, which is created on demand, is left out.
    """
    files = set()
    for key, name in flatten(config):
        if not _names_file(key, name) or Path(name).is_relative_to(paths.cache()):
            continue
        files.add(Path(name))
        files.update(file for file in Path(name).glob("*") if _OF_MODELS.fullmatch(file.name))
    return [DataFile.from_file(file) for file in sorted(files) if file.is_file()]


def _names_file(key: str, value: Any) -> bool:
    """True if a setting can be the path of a file or folder."""
    if last_key(key) not in _NAME_FILES or not isinstance(value, str):
        return False
    return bool(value) and not set("{\n\0") & set(value)


def test_file(config: Config, folder: Path = Path()) -> str | None:
    """Path of test.jsonl beside the training file, relative to a folder; None if missing."""
    for dataset in training_sets(config)[:1]:
        test = Path(dataset.path).with_name("test.jsonl")
        if (folder / test).is_file():
            return str(test)
    return None


def can_be_rehearsed(dataset: Config) -> bool:
    """True if Axolotl can load a part of a data set from this machine.

    Axolotl loads a folder from `save_to_disk` only as a whole (axolotl/utils/data/shared.py)."""
    files = local_files(dataset)
    saved = {"state.json", "dataset_dict.json"} & {file.name for file in files}
    return bool(files) and not saved and all(file.is_file() for file in files)


def at_most(dataset: DatasetRef, rows: int) -> Config:
    """Limit a data set to its first rows; leave splits such as `train[:10%]` unchanged."""
    match = re.fullmatch(r"(\w+)(?:\[(\d{,18}):(\d{,18})\])?", dataset.split)
    if not match:
        return dataset.entry
    name, begin, end = match.groups(default="")
    last = int(begin or 0) + rows
    if end:
        last = min(last, int(end))
    return dataset.entry | {"split": f"{name}[{begin}:{last}]"}


def first_rows(dataset: Config) -> int | None:
    """Number of rows in a split such as `train[:40]`; None for all."""
    match = re.fullmatch(r"train\[:(\d{1,18})\]", str(dataset.get("split")))
    return int(match[1]) if match else None


def stride(rows: int, sample: int | None) -> int:
    """Distance of rows to read so that at most a sample is drawn over all rows; 1 without a sample."""
    return max(1, math.ceil(rows / sample)) if sample else 1


def count_rows(path: Path) -> int:
    """Number of non-blank lines in a file."""
    status = path.stat()
    return _count_rows(path, status.st_mtime_ns, status.st_size)


@lru_cache
def _count_rows(path: Path, mtime_ns: int, size: int) -> int:
    with reading(path) as stream:
        return sum(1 for line in stream if line.strip())


def count_jsonl(dataset: Config) -> int:
    """Number of a data set's rows in JSONL files, up to the limit of its split."""
    total = sum(map(count_rows, jsonl_files(dataset)))
    limit = first_rows(dataset)
    return total if limit is None else min(total, limit)


def training_steps(config: Config, gpus: int = 1) -> int | None:
    """Number of optimizer steps of a config; None if unknown, see `TrainingSettings.steps`."""
    return TrainingSettings.of(config).steps(training_rows(config), gpus)


def training_rows(config: Config) -> int | None:
    """Number of training rows; None if there are none, or unless each data set is a JSONL file of complete rows."""
    rows = 0
    for dataset in training_sets(config):
        if jsonl(dataset.entry) is None or dataset.type_name == "completion":  # which Axolotl splits
            return None
        rows += count_jsonl(dataset.entry)
    if rows == 0:
        return None
    return TrainingSettings.of(config).rows_left(rows)
