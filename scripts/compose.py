"""From a recipe to the config that Axolotl gets: profiles, overrides and rehearsal laid over it, all checked."""

import hashlib
import json
import math
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import config, data, paths, provenance, schema, study
from .config import Config
from .errors import UserError
from .files import sha256
from .rundir import DataFile, Difference

REHEARSAL = "rehearsal"
PLUGIN = "qlora_recipes.plugin.RunPlugin"
_OF_THE_RUN = ("output_dir", "dataset_prepared_path", "resume_from_checkpoint")  # a run sets these itself
_SECRET = re.compile(r"(api_key|secret|password|(?<!auth_)token)$")
_DATA_SUFFIXES = {".jsonl", ".json", ".parquet", ".csv", ".arrow", ".text", ".txt", ".gz", ".zst"}


@dataclass
class Request:
    """What the user asked `recipe run` for."""

    name: str
    profiles: list[str] = field(default_factory=list)
    overrides: list[str] = field(default_factory=list)
    rehearse: bool = False
    mirror: bool = False
    gpus: int = 1
    dry_run: bool = False
    axolotl_arguments: list[str] = field(default_factory=list)


@dataclass
class Composed:
    """A config that is ready to launch, and how it came about."""

    recipe: str
    recipe_file: Path
    config: Config
    differences: list[Difference]
    data: list[DataFile]
    profiles: list[str]
    rehearsal: bool

    @property
    def digest(self) -> str:
        """A hash of the config and of the data it names."""
        content = [self.config, [file.sha256 for file in self.data]]
        return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def compose(request: Request, stand_in: Path | None = None) -> Composed:
    """The config of a run, checked as far as that takes no model.

    Args:
        request: what the user asked for.
        stand_in: the folder of the stand-in model, for rehearsals.

    Raises:
        UserError: a name, key, value or data file is wrong.
    """
    for argument in request.axolotl_arguments:
        option = argument.lstrip("-").partition("=")[0].replace("-", "_")
        _check_not_of_the_run(option, argument)
        _check_no_secret(option, argument)
        if argument.startswith("--") and not schema.is_option(option):
            raise UserError(f"{argument}: `axolotl train` has no such option, and would ignore it")
    name, file = paths.find_recipe(request.name)
    recipe = config.read_yaml(file)
    _check_keys(recipe, str(file), file)
    profiles = [paths.find_profile(profile) for profile in request.profiles]
    rehearsal = is_rehearsal(request)
    if rehearsal and REHEARSAL not in dict(profiles):
        profiles.append(paths.find_profile(REHEARSAL))  # last, so that nothing takes the run off the CPU

    composed, why = recipe, {}

    def lay(changed: Config, reason: str) -> None:
        nonlocal composed
        why.update(dict.fromkeys(config.differences(composed, changed), reason))
        composed = changed

    if request.mirror:
        lay(_mirrored(composed), "--mirror")
    for profile, profile_file in profiles:
        fragment = config.read_yaml(profile_file)
        _check_keys(fragment, str(profile_file), profile_file)
        if profile == REHEARSAL:
            fragment = _fill(fragment, {"stand_in": str(stand_in), "sample": str(rehearsal_data())})
            fragment["bf16"] = provenance.cpu_has_bf16()
        lay(config.merge(composed, fragment), f"profile {profile}")
    for text in request.overrides:
        key, value = config.parse_override(text)
        _check_not_of_the_run(key, f"--set {text}")
        changed = config.override(composed, key, value)
        _check_keys(changed, f"--set {text}")
        lay(changed, f"--set {text}")

    if not isinstance(composed.get("plugins") or [], list):
        raise UserError(f"plugins: a list of plugins, not {composed['plugins']!r}")
    files = data_files(composed)
    if rehearsal:
        lay(_few_steps(composed, files), "rehearsal: at most a tenth of the steps")
    if not request.dry_run:
        _check_device(composed, request.gpus)
    differences = [
        Difference(key=key, recipe=before, run=after, why=why.get(key, ""))
        for key, (before, after) in config.differences(recipe, composed).items()
    ]
    return Composed(name, file, composed, differences, files, [p for p, _ in profiles], rehearsal)


def is_rehearsal(request: Request) -> bool:
    """Whether a run is asked for that only tries the recipe."""
    return request.rehearse or REHEARSAL in (paths.find_profile(profile)[0] for profile in request.profiles)


def launched(composed: Composed, output: Path) -> Config:
    """The config with what a run adds to it: its output folder, its plugin, and where prepared data goes.

    Axolotl keys its cache of prepared data by settings alone; the data's own hash in the path keeps a
    changed file from being taken for the old one.
    """
    content = hashlib.sha256("".join(file.sha256 for file in composed.data).encode()).hexdigest()
    return composed.config | {
        "output_dir": str(output),
        "dataset_prepared_path": str(paths.cache() / "prepared" / content[:16]),
        "plugins": [*(composed.config.get("plugins") or []), PLUGIN],
    }


def rehearsal_data() -> Path:
    """The folder with the shipped sample as prepared data; written to the cache the first time."""
    raw = sorted(paths.SAMPLE.glob("msg-*.jsonl"))
    key = hashlib.sha256("".join(map(sha256, [*raw, Path(data.__file__)])).encode()).hexdigest()
    folder = paths.cache() / f"sample-{key[:16]}"
    if not (folder / data.MANIFEST).is_file():
        data.prepare(raw, folder, study.load(paths.RECIPES / "haider2024").data)
    return folder


def data_files(composed: Config) -> list[DataFile]:
    """The local data files of a config with their content's hash; data sets on a hub are not among them.

    Raises:
        UserError: a file does not exist or is empty, or the config names no data.
    """
    if not list(_datasets(composed, "datasets")):
        raise UserError("datasets: the config names no data to train on")
    files = {}
    for where, dataset in _datasets(composed, "datasets", "test_datasets"):
        for path in _local_files(dataset, where):
            size = path.stat().st_size
            if not size:
                raise UserError(f"{where}.path: {path} is empty")
            rows = count_rows(path) if path.suffix == ".jsonl" else None
            files[path] = DataFile(path=str(path), sha256=sha256(path), bytes=size, rows=rows)
    return list(files.values())


def _local_files(dataset: Config, where: str) -> list[Path]:
    """The files of a data set that is on this machine: a file, a folder's, or its `data_files`; else none."""
    name, listed = dataset.get("path"), dataset.get("data_files") or []
    if not isinstance(name, str) or not name:
        raise UserError(f"{where}.path: {name!r} names no data")
    path = Path(name)
    if path.is_file():
        return [path]
    if path.is_dir() and not listed:
        return sorted(file for file in path.rglob("*") if file.is_file())
    if listed and not path.is_dir() and f".{name}" not in _DATA_SUFFIXES:
        return []  # files of a repository on a hub
    files = [Path(str(file)) for file in (listed if isinstance(listed, list) else [listed])] or [path]
    for file in files:
        if not file.is_file() and _looks_local(file):
            raise UserError(
                f"{where}.path: {file.absolute()} does not exist; `recipe data prepare` writes the study's data, "
                "--rehearse needs none"
            )
    return [file for file in files if file.is_file()]


def _looks_local(path: Path) -> bool:
    """Whether a path that is not there must have been meant for this machine, and not for a hub."""
    in_a_folder = len(path.parts) > 1 and Path(path.parts[0]).is_dir()
    return path.is_absolute() or path.suffix in _DATA_SUFFIXES or in_a_folder


def _datasets(composed: Config, *sections: str) -> Iterator[tuple[str, Config]]:
    """Each data set of some sections of a config, with the key it stands at."""
    for section in sections:
        entries = composed.get(section)
        for i, dataset in enumerate(entries if isinstance(entries, list) else ()):
            if not isinstance(dataset, dict):
                raise UserError(f"{section}.{i}: a data set is a mapping with the key path, not {dataset!r}")
            yield f"{section}.{i}", dataset


def count_rows(path: Path) -> int:
    """The number of lines of a file that are not blank."""
    with path.open("rb") as stream:
        return sum(1 for line in stream if line.strip())


def _check_keys(content: Config, where: str, file: Path | None = None) -> None:
    """Refuse keys that Axolotl would ignore in silence, and secrets."""
    for key, value in config.flatten(content):
        if isinstance(value, str) and not key.startswith("special_tokens."):
            _check_no_secret(key, where)
    found = list(schema.unknown_keys(content))
    if found:
        raise UserError(
            "\n".join(
                f"{where}{f':{config.line_of(file, key)}' if file else ''}: {key} is not a key of Axolotl's{hint}"
                for key, hint in found
            )
        )


def _check_no_secret(key: str, where: str) -> None:
    if _SECRET.search(key):
        raise UserError(f"{where}: {key} would stand in the run's folder; give it by an environment variable")


def _check_not_of_the_run(key: str, where: str) -> None:
    if key.partition(".")[0] in _OF_THE_RUN:
        raise UserError(f"{where}: {key} is the run's own; --runs moves runs, `recipe resume` goes on with one")


def _mirrored(composed: Config) -> Config:
    """The config with its gated base model replaced by a copy that is not gated."""
    model = composed.get("base_model")
    entry = config.read_yaml(paths.TEMPLATES / "models.yaml").get(str(model), {})
    if "mirror" not in entry:
        reason = "it is not gated" if entry.get("gated") is False else f"{paths.TEMPLATES / 'models.yaml'} names none"
        raise UserError(f"--mirror: no mirror for {model}: {reason}")
    return config.merge(composed, {"base_model": entry["mirror"], "revision_of_model": None})


def _fill(fragment: Any, values: dict[str, str]) -> Any:
    """A profile with its {placeholders} filled in."""
    if isinstance(fragment, dict):
        return {key: _fill(value, values) for key, value in fragment.items()}
    if isinstance(fragment, list):
        return [_fill(item, values) for item in fragment]
    return fragment.format(**values) if isinstance(fragment, str) else fragment


def training_steps(composed: Config, files: list[DataFile]) -> int:
    """The optimizer steps that a config takes on one device with its unpacked local data.

    Raises:
        UserError: a key that they depend on is no positive number.
    """
    rows = {file.path: file.rows for file in files}
    total = 0
    for _, dataset in _datasets(composed, "datasets"):
        first = re.fullmatch(r"train\[:(\d+)\]", str(dataset.get("split")))
        total += min(rows.get(str(dataset.get("path"))) or 0, int(first[1]) if first else sys.maxsize)
    batches = math.ceil(total / _number(composed, "micro_batch_size"))
    return math.ceil(
        math.ceil(batches / _number(composed, "gradient_accumulation_steps")) * _number(composed, "num_epochs")
    )


def _number(composed: Config, key: str) -> float:
    """A setting that has to be a positive number; 1 where it is not set."""
    value = composed.get(key, 1)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise UserError(f"{key}: {value!r} is not a positive number")
    return value


def _few_steps(composed: Config, files: list[DataFile]) -> Config:
    """The config with its warm-up capped at a tenth of the steps that its few rows give."""
    if composed.get("warmup_ratio"):
        return config.merge(composed, {"warmup_ratio": min(_number(composed, "warmup_ratio"), 0.1)})
    if not composed.get("warmup_steps"):
        return composed
    tenth = training_steps(composed, files) // 10
    return config.merge(composed, {"warmup_steps": min(_number(composed, "warmup_steps"), tenth)})


def _check_device(composed: Config, gpus: int) -> None:
    """Refuse what this machine has no GPU for: it would fail after the model was loaded."""
    found = len(provenance.gpus())
    if gpus > max(found, 1):
        raise UserError(f"--gpus {gpus}: this machine has {found}")
    if composed.get("fp16") and not found:
        raise UserError(
            "fp16: no NVIDIA GPU was found, and a CPU does not train in fp16; "
            "--rehearse tries the recipe with a small model, --set fp16=false trains in fp32"
        )


def effective_batch(composed: Config) -> float:
    """The rows of an optimizer step on one device."""
    return _number(composed, "micro_batch_size") * _number(composed, "gradient_accumulation_steps")
