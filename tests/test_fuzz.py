"""A file or answer that somebody else has changed ends a command with a message, and does no harm.

Each case changes one thing in the structure of a real file or answer, or cuts it off. No command takes long, ends in a
traceback, writes elsewhere, starts a program that a file names, or asks a host that the user did not name. For a longer
search:
FUZZ_CASES=9000 FUZZ_SEED=7 .venv/bin/pytest tests/test_fuzz.py -m long
"""

import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import recorded_runs
import small_study
import torch
from a_card import CARD
from a_server import Reply
from conftest import Recipe, config_with
from fake_llama import FakeLlama, serving_llama
from run_folders import ADAPTER, a_tiny_run
from safetensors.torch import save_file
from transformers import AutoTokenizer
from watch import STARTS, elsewhere, hosts_of, watching

from qlora_recipes.base import yamlfiles
from qlora_recipes.base.files import sha256, write_rows
from qlora_recipes.config.datafiles import DataFile
from qlora_recipes.evaluate import llama as llamas
from qlora_recipes.evaluate import server as servers
from qlora_recipes.evaluate.scores_file import read_scores
from qlora_recipes.run import launch
from qlora_recipes.run.rundir import RunDir

CASES = int(os.environ.get("FUZZ_CASES", "350"))  # a number, because a time would test more on a fast machine
SEED = int(os.environ.get("FUZZ_SEED", "0"))
MOST = 10  # seconds of the processor that one command may take
PLANTED = "planted.txt"
"""A file beside the working folder, which no command may change."""
PROGRAMS = {"false", "git", "nvidia-smi", "sacct", "squeue", "uname", Path(sys.executable).name}
"""Programs that commands start; `false` stands for Axolotl."""

DEEP = "a deep list"  # json.dumps would refuse one
ODD: list[Any] = [
    *(None, True, 0, -1, 7, 1.5, 2**62, 10**30, 1e-300, 1e308, math.nan, math.inf, DEEP),
    *("", "x" * 2000, "\0", "\ud800", "a b/c: {}", "../../x", "2026-01-01T00:00:00", "haider2024/none", "none"),
    *([], {}, [[]], [None], ["a", 1], {"a": None}, {"": []}),
    *(f"../{PLANTED}", "/no-such-folder/x", "http://127.0.0.1:9/x", "HTTPS://evil.example/x"),
    *(
        "$(touch PWNED)",
        "a\n#b",
        "((\\w|\\.)+)+X",
        "{{ ''.__class__ }}",
        "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3,
    ),
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
    if file.suffix == ".md":
        return changed_card(text, chance).encode(errors="replace")
    lines = text.splitlines()
    at = chance.randrange(len(lines))
    lines[at] = restructured(lines[at], chance)
    return "".join(f"{line}\n" for line in lines).encode()


def changed_card(text: str, chance: random.Random) -> str:
    """A model card with a change in its config, or with another text for a word around it."""
    head, fence, rest = text.partition("```yaml\n")
    yaml, end, tail = rest.partition("```")
    if chance.random() < 0.5:
        yaml = restructured(json.dumps(yamlfiles.parse(yaml, "")), chance) + "\n"
        return head + fence + yaml + end + tail
    words = re.split(r"(\s)", text)
    odd = ["1.5}, a: {b", "9" * 5000, "1e999", "`", "|", *map(str, ODD)]
    words[chance.randrange(0, len(words), 2)] = chance.choice(odd)
    return "".join(words)


def odd_reply(reply: Reply, chance: random.Random) -> Reply:
    """An answer of a server with a change of its structure, or cut off, or one that leads to another host."""
    assert reply
    text = json.dumps(reply[1])
    match chance.randrange(8):
        case 0:
            return None
        case 1:
            return chance.choice([204, 302, 401, 404, 429, 500]), reply[1]
        case 2:
            return reply[0], text[: chance.randrange(len(text) + 1)].encode()
    return reply[0], restructured(text, chance).encode(errors="replace")


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
    job = {
        "backend": "slurm",
        "id": "1",
        "step": "run",
        "user": "me",
        "script": "x",
        "submitted": "2026-01-01T00:00:00Z",
    }
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
    lines += [
        f"{command} {run}" for command in ("report", "results --export", "publish", "cancel") for run in (ONE, LEFT)
    ]
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


def card(place: Path) -> Target:
    file = place / "README.md"
    file.write_text(CARD.replace("deepspeed: deepspeed_configs/zero2.json\n", ""))
    (place / "rows.jsonl").write_text('{"instruction": "Add.", "input": "1 + 1", "output": "2"}\n' * 60)
    lines = ["new other --from README.md", "study new theirs --from README.md", "show README.md"]
    return [file], [*lines, "check README.md --quick", "diff README.md haider2024/code-llama-7b"]


TARGETS: list[Callable[[Path], Target]] = [run_folder, config, card]


@pytest.fixture
def planted(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A file beside the working folder, which has to stay as it is."""
    file = tmp_path.parent / PLANTED
    file.write_text("{{ messages }}")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(cache / "inductor"))  # else below /tmp
    monkeypatch.setattr(tempfile, "tempdir", str(cache))
    yield
    assert file.read_text() == "{{ messages }}"


def run_watched(recipe: Recipe, place: Path, line: str, server: str = "") -> "subprocess.CompletedProcess[str]":
    """Run a command, and check how it ends and what it does to other folders, programs and hosts."""
    began = time.process_time()
    with watching() as events:
        done = recipe(*line.split())
    seconds = time.process_time() - began
    assert done.returncode in (0, 1, 2)
    assert done.returncode == 0 or done.stderr.strip()
    assert "Traceback" not in done.stderr
    assert seconds < MOST
    folders = (place, Path(os.environ["XDG_CACHE_HOME"]), Path(os.environ["XDG_DATA_HOME"]))
    assert [event for event in elsewhere(events, *folders) if event[1] not in hosts_of(server)] == []
    assert {Path(program).name for event, program in events if event in STARTS} <= PROGRAMS
    return done


@pytest.mark.long
@pytest.mark.parametrize("target", TARGETS)
def test_a_changed_file_never_ends_in_a_traceback(tmp_path, monkeypatch, recipe, planted, target):
    recorded_runs.study_here(monkeypatch, tmp_path)
    files, commands = target(tmp_path)
    contents = {file: file.read_bytes() for file in files}
    monkeypatch.setattr(launch, "AXOLOTL", Path(shutil.which("false") or ""))  # nothing is trained

    def restore() -> None:
        for file, content in contents.items():
            file.write_bytes(content)
        for folder in ("variants", "recipes/theirs", "templates/theirs"):
            shutil.rmtree(tmp_path / folder, ignore_errors=True)

    for line in commands:  # which also imports what they need, so that it is not counted below
        done = run_watched(recipe, tmp_path, line)
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
        try:
            run_watched(recipe, tmp_path, line)
        except BaseException as error:
            error.add_note(f"`recipe {line}` with {file} as in {copy}")
            raise
        restore()


@pytest.fixture
def llama_run(tmp_path: Path, tiny: Path, tiny_profile: Path, sample: Path) -> RunDir:
    """A run of the tiny Llama with an adapter, which changes nothing."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    run = a_tiny_run(tmp_path, tiny, tiny_profile, sample)
    model = AutoModelForCausalLM.from_pretrained(tiny)
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(run.output)
    return run


@pytest.mark.long
def test_a_changed_answer_of_a_server_never_ends_in_a_traceback(tmp_path, recipe, llama_run, planted, monkeypatch):
    monkeypatch.setattr(servers, "RETRIES", 0)
    monkeypatch.setattr(llamas, "RETRIES", 0)
    tokenizer = AutoTokenizer.from_pretrained(llama_run.output)
    end = tokenizer.eos_token_id
    llama = FakeLlama(tokenizer, {end}, answer=[7, 8, end], context=4096)
    chance = random.Random(SEED)
    codes: Counter[int] = Counter()
    with serving_llama(llama) as server:
        models, props = server.models, server.others["/props"]
        line = f"evaluate run --adapter run/output --engine {server.url} --served-model m --limit 3"
        line += " --metric bertscore:none --max-new-tokens 8"
        assert run_watched(recipe, tmp_path, line, server.url).returncode == 0
        posts = len(server.requests)
        for _ in range(CASES):
            shutil.rmtree(llama_run.path / "evaluations", ignore_errors=True)
            server.requests.clear()
            number = chance.randrange(-2, posts)  # of the answer to change: -2 lists models, -1 has properties
            server.models = odd_reply(models, chance) if number == -2 else models
            server.others["/props"] = odd_reply(props, chance) if number == -1 else props

            def reply(body: dict[str, Any], number: int = number) -> Reply:
                answer = llama.reply(body)
                return odd_reply(answer, chance) if len(server.requests) - 1 == number else answer

            server.reply = reply
            codes[run_watched(recipe, tmp_path, line, server.url).returncode] += 1
    assert codes.keys() == {0, 1, 2}
