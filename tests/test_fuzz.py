"""A file that a user, another program or a failing disk has changed ends a command with a message, not a traceback.

Each case changes one thing in the structure of a real file, or cuts the file off. For a longer search:
FUZZ_CASES=9000 FUZZ_SEED=7 .venv/bin/pytest tests/test_fuzz.py -m long
"""

import json
import math
import os
import random
import shutil
import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import recorded_runs
import small_study
import torch
from conftest import config_with
from run_folders import ADAPTER
from safetensors.torch import save_file

from qlora_recipes.base import yamlfiles
from qlora_recipes.base.files import sha256, write_rows
from qlora_recipes.config.datafiles import DataFile
from qlora_recipes.evaluate.scores_file import read_scores
from qlora_recipes.run import launch
from qlora_recipes.run.rundir import RunDir

CASES = int(os.environ.get("FUZZ_CASES", "250"))  # a number, because a time would test more on a fast machine
SEED = int(os.environ.get("FUZZ_SEED", "0"))
MOST = 10  # seconds of the processor that one command may take

DEEP = "a deep list"  # json.dumps would refuse one
ODD: list[Any] = [
    *(None, True, 0, -1, 7, 1.5, 2**62, 10**30, 1e-300, 1e308, math.nan, math.inf, DEEP),
    *("", "x" * 2000, "\0", "\ud800", "a b/c: {}", "../../x", "2026-01-01T00:00:00", "haider2024/none", "none"),
    *([], {}, [[]], [None], ["a", 1], {"a": None}, {"": []}),
]


def text_of(value: Any) -> str:
    """JSON, which can have what Python's own lists cannot: NaN, half a surrogate, and 100,000 levels."""
    return json.dumps(value).replace(json.dumps(DEEP), "[" * 100_000 + "]" * 100_000)


def places(value: Any) -> list[tuple[Any, Any]]:
    """Containers and keys of all values inside a value."""
    keys: list[Any] = []
    if isinstance(value, dict):
        keys = list(value)
    elif isinstance(value, list):
        keys = list(range(len(value)))
    inside = [(value, key) for key in keys]
    for key in keys:
        inside += places(value[key])
    return inside


def restructured(text: str, chance: random.Random) -> str:
    """A JSON text with one value replaced, deleted, wrapped, renamed or exchanged for another of its own."""
    value = json.loads(text)
    spots = places(value)
    if not spots:
        return text_of(chance.choice(ODD))
    container, key = chance.choice(spots)
    match chance.randrange(8):
        case 0:
            del container[key]
        case 1:
            container[key] = [container[key]]
        case 2:
            container[key] = {"a": container[key]}
        case 3 if isinstance(container, dict):
            container[chance.choice(["", "a.b", "x" * 300, "\0"])] = container.pop(key)
        case 4:
            other, of_other = chance.choice(spots)
            container[key] = deepcopy(other[of_other])
        case _:
            container[key] = chance.choice(ODD)
    return text_of(value)


def changed(file: Path, content: bytes, chance: random.Random) -> bytes:
    """A file's content with one change of its structure, one time out of four cut off."""
    if chance.random() < 0.25:
        return content[: chance.randrange(len(content) + 1)]
    text = content.decode()
    if file.suffix == ".json":
        return restructured(text, chance).encode()
    if file.suffix == ".yaml":  # of which JSON is a part
        return restructured(json.dumps(yamlfiles.parse(text, "")), chance).encode()
    lines = text.splitlines()
    at = chance.randrange(len(lines))
    lines[at] = restructured(lines[at], chance)
    return "".join(f"{line}\n" for line in lines).encode()


Target = tuple[list[Path], list[str]]  # files to change, and commands that read them

ONE, TWO, LEFT = (f"{small_study.PLAIN}/{name}" for name in ("one", "two", "left"))
REFUSED = {
    f"cancel {ONE}": (2, ONE),
    f"cancel {LEFT}": (2, LEFT),
    f"publish {LEFT}": (2, "interrupted"),
    f"results --export {LEFT}": (2, LEFT),
    f"resume --trust {LEFT}": (1, "train.log"),
}
"""Exit code of commands that fail where nothing is changed, and what they name: they have read their files by then."""


def a_run(place: Path) -> RunDir:
    """A run that is complete enough for a record, with all the files that there can be."""
    folder = recorded_runs.a_run("one")
    recorded_runs.a_run("two", 68.0)
    scores = read_scores(folder.path)
    assert scores
    of_base = scores.settings.model_copy(update={"adapter": "none", "adapter_sha256": None}).folder(folder.path)
    shutil.copytree(folder.path, place / "copied")
    shutil.copytree(place / "copied", of_base)
    texts = {"reference": "a = 1", "prediction": "a = 2", "chrf": 2.0}
    for where in (folder.path, of_base, Path("runs", small_study.PLAIN, "two")):
        rows = [{"row": i, "idx": i, "lang": "go", "accuracy": i % 2 * 100.0} | texts for i in range(12)]
        write_rows(where / "predictions.jsonl", rows)
    job = {"id": "1", "step": "run", "user": "me", "script": "x", "submitted": "2026-01-01T00:00:00Z"}
    (folder.path / "jobs.json").write_text(json.dumps([job]))
    left = RunDir(folder.path.with_name("left"))
    shutil.copytree(folder.path, left.path)
    file = place / "own.jsonl"
    file.write_text('{"instruction": "Add.", "input": "1 + 1", "output": "2"}\n')
    rows = [{"path": str(file), "type": "alpaca"}]
    config = {"datasets": rows, "test_datasets": rows, "warmup_steps": 0, "output_dir": str(left.output.resolve())}
    left.config_file.write_text(yamlfiles.write_yaml(yamlfiles.read_yaml(left.config_file) | config))
    data = DataFile(path=str(file), sha256=sha256(file), bytes=file.stat().st_size, rows=1)
    changes = {"state": "interrupted", "rehearsal": True, "data": [data], "recipe_file": str(left.config_file)}
    left.write(left.read().model_copy(update=changes))
    folder.output.mkdir()
    save_file({"base_model.model.lora_A.weight": torch.zeros(2, 2)}, folder.output / ADAPTER)
    return folder


def run_folder(place: Path) -> Target:
    folder = a_run(place)
    names = ("config.yaml", "run.json", "metrics.jsonl", "scores.json", "predictions.jsonl", "jobs.json")
    files = [path / name for path in (folder.path, folder.path.with_name("left")) for name in names]
    files.append(recorded_runs.recorded(folder))
    lines = ["results --json", "results sums2030", f"results {ONE} {TWO}", f"report {ONE} {TWO}"]
    lines += [f"{verb} {run}" for verb in ("report", "results --export", "publish", "cancel") for run in (ONE, LEFT)]
    lines += [f"resume --trust {LEFT}", "results sums2030 --json"]
    return files, lines


def config(place: Path) -> Target:
    config = place / "mine.yaml"
    config.write_text(yamlfiles.write_yaml(config_with({"lora_target_parameters": ["x"], "lora_dropout": 0.0})))
    profile = place / "more.yaml"
    (place / "x.jsonl").write_text('{"instruction": "Add.", "input": "1 + 1", "output": "2"}\n')
    profile.write_text(yamlfiles.write_yaml({"warmup_steps": 0, "datasets": [{"path": "x.jsonl", "type": "alpaca"}]}))
    lines = ["check mine.yaml --rehearse --json", "show mine.yaml", "diff mine.yaml haider2024/code-llama-7b"]
    lines += ["check haider2024/code-llama-7b --profile more.yaml", "new other --from mine.yaml"]
    return [config, config, config, profile], lines


TARGETS: list[Callable[[Path], Target]] = [run_folder, config]


@pytest.mark.long
@pytest.mark.parametrize("target", TARGETS)
def test_a_changed_file_never_ends_in_a_traceback(tmp_path, monkeypatch, recipe, target):
    recorded_runs.study_here(monkeypatch, tmp_path)
    files, commands = target(tmp_path)
    contents = {file: file.read_bytes() for file in files}
    monkeypatch.setattr(launch, "AXOLOTL", Path(shutil.which("false") or ""))  # nothing is trained

    def restore() -> None:
        for file, content in contents.items():
            file.write_bytes(content)
        shutil.rmtree(tmp_path / "variants", ignore_errors=True)

    for line in commands:  # which also imports what they need, so that it is not counted below
        done = recipe(*line.split())
        code, named_text = REFUSED.get(line, (0, ""))
        assert done.returncode == code, (line, done.stderr)
        assert named_text in done.stdout + done.stderr
        restore()
    chance = random.Random(SEED)
    for _ in range(CASES):
        file, line = chance.choice(files), chance.choice(commands)
        file.write_bytes(changed(file, contents[file], chance))
        copy = tmp_path / f"found-{file.name}"
        shutil.copy(file, copy)
        began = time.process_time()
        try:
            done = recipe(*line.split())
        except BaseException as error:
            error.add_note(f"`recipe {line}` with {file} as in {copy}")
            raise
        assert done.returncode in (0, 1, 2), (line, copy)
        assert done.returncode == 0 or done.stderr.strip(), (line, copy)
        assert time.process_time() - began < MOST, (line, copy)
        restore()
