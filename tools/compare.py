"""Compare what the project computes with what it computed before a rewrite.

    .venv/bin/python tools/compare.py SHARED/data                  # prints the differences from tools/comparison.json
    .venv/bin/python tools/compare.py SHARED/data --write          # writes that file; the commit gives the reason
    .venv/bin/python tools/compare.py SHARED/data checks plans     # only some parts

It calls nothing but the command `recipe`, so that modules can move. To be removed when the rewrite ends (issue 56).
"""

import contextlib
import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[1]
RECORD = Path(__file__).with_name("comparison.json")
RECIPE = Path(sys.executable).with_name("recipe")
GPUS = ("Quadro RTX 5000", "L40S")
PLANNED = (  # one of each method and size
    *("haider2024/llama-2-7b", "haider2024/llama-3-8b", "haider2024/llama-3.2-3b", "peft-metamathqa/lora-rank32-dora"),
    *("loftq-gsm8k/llama-2-7b-qlora", "pissa-metamathqa/llama-2-7b-pissa", "loraga-metamathqa/llama-2-7b-lora-plus"),
    *("qlora-guanaco/llama-7b", "start/qlora", "tinker-tulu3/llama-3.1-8b-qlora"),
)
TRAINED = ("haider2024/llama-3-8b", "peft-metamathqa/lora-rank32", "tinker-tulu3/llama-3.2-1b-lora")
SHORT = ("--set", "num_epochs=1", "--set", "datasets.0.split=train[:16]")
ADAPTER = "output/adapter_model.safetensors"


def recipe(*words: str | Path, codes: tuple[int, ...] = (0,)) -> str:
    """The output of a command in this process, which imports its modules once."""
    from qlora_recipes import cli

    out, err = io.StringIO(), io.StringIO()
    os.environ.pop("QLORA_RUNS", None)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main([*map(str, words)])
    if code not in codes:
        raise SystemExit(f"{words}: exit code {code}\n{err.getvalue()}")
    return out.getvalue()


def trained(*words: str | Path) -> Path:
    """Run folder of a training in a process of its own."""
    done = subprocess.run([RECIPE, *words], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{words}: exit code {done.returncode}\n{done.stderr}")
    return Path(done.stdout.strip())


def digest(content: bytes | str) -> str:
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()[:16]


def names() -> list[str]:
    return [row["recipe"] for row in json.loads(recipe("list", "--json"))]


def recipes(_: Path) -> dict[str, Any]:
    """Hashes of recipes and profiles, once rendered."""
    recipe("render")
    return {
        str(file.relative_to(ROOT)): digest(file.read_bytes()) for file in sorted((ROOT / "recipes").rglob("*.yaml"))
    }


def configs(_: Path) -> dict[str, Any]:
    """Hashes of every recipe's config, plain and with each profile."""
    ways: list[tuple[str, ...]] = [()]
    for file in sorted((ROOT / "recipes" / "profiles").glob("*.yaml")):
        several = ("--gpus", "2") if file.stem.startswith(("zero", "fsdp", "ddp")) else ()
        ways.append(("--profile", file.stem, *several))
    outputs = {}
    for name in names():
        for way in ways:
            out = recipe("run", name, "--dry-run", *way, codes=(0, 2))
            outputs[f"{name} {' '.join(way)}"] = digest(out.replace(str(Path.home()), "~"))
    return outputs


def rows(shared: Path) -> dict[str, Any]:
    """Hashes of the rows that each study's data is prepared to, from real ones."""
    haider = Path("raw", "haider2024")
    haider.mkdir(parents=True)
    for split in ("train", "valid", "test"):
        (haider / f"msg-{split}.jsonl").write_bytes((shared / "codereviewer-msg-test-60.jsonl").read_bytes())
    meta = Path("raw", "peft-metamathqa")
    meta.mkdir(parents=True)
    solved = [json.loads(line) for line in (shared / "gsm8k" / "train.jsonl").read_bytes().splitlines()]
    with (meta / "MetaMathQA.jsonl").open("w") as stream:
        for i in range(24_000):
            row = solved[i % len(solved)]
            stream.write(json.dumps({"query": f"{row['question']} ({i})", "response": row["answer"]}) + "\n")
    for file in ("train.jsonl", "test.jsonl"):
        (meta / file).write_bytes((shared / "gsm8k" / file).read_bytes())
    outputs = {}
    for study, folder in {"haider2024": haider, "loftq-gsm8k": shared / "gsm8k", "peft-metamathqa": meta}.items():
        recipe("data", "prepare", folder, "--study", study, "--out", f"rows-{study}")
        outputs |= {str(file): digest(file.read_bytes()) for file in sorted(Path(f"rows-{study}").glob("*.jsonl"))}
    return outputs


def scores(shared: Path) -> dict[str, Any]:
    """Scores of published predictions."""
    files = [(shared / "haider2024" / f"msg-5000-{name}.txt").read_bytes().decode() for name in ("gold", "pred")]
    lines = zip(*(text.removesuffix("\n").split("\n") for text in files), strict=True)
    with Path("llama-3.jsonl").open("w") as stream:
        stream.writelines(json.dumps({"reference": a, "prediction": b}) + "\n" for a, b in lines)
    asked: dict[str, tuple[str | Path, ...]] = {
        "Llama 3": (Path("llama-3.jsonl"), "--metric", "rouge_l", "--metric", "chrf"),
        "CodeReviewer": (shared / "codereviewer-test-predictions.jsonl",),
    }
    for which in ("6b_finetuning", "6b_verification"):
        field = ("--prediction-field", f"{which}.solution")
        asked[which] = (shared / "gsm8k" / "solutions-6b.jsonl", *field, "--metric", "number: {markers: ['A: ']}")
    words = ("--metric", "bleu4", "--metric", "bertscore:none", "--json")
    return {name: json.loads(recipe("score", *of_file, *words)) for name, of_file in asked.items()}


def plans(_: Path) -> dict[str, Any]:
    """Plans of ten recipes on two GPUs, and on two of one."""
    outputs = {}
    for name in PLANNED:
        for way in (("--gpu", GPUS[0]), ("--gpu", GPUS[1]), ("--gpu", GPUS[1], "--gpus", "2")):
            out = recipe("plan", name, *way, "--json", codes=(0, 2))  # 2: the batch cannot be divided
            outputs[f"{name} {' '.join(way)}"] = json.loads(out or "null")
    return outputs


def checks(_: Path) -> dict[str, Any]:
    """Findings of every recipe for GPUs, profiles and rehearsals, and of the cases of the rules' tests."""
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "support")]
    from check.test_rules import CASES
    from conftest import config_with

    from qlora_recipes.base import yamlfiles

    outputs: dict[str, Any] = {}
    ways = (
        *(("--gpu", "T4"), ("--gpu", "H100"), ("--rehearse",), ("--gpu", "L40S", "--profile", "fast")),
        *(("--gpu", "L40S", "--gpus", "2", "--profile", "zero2"), ("--gpu", "L40S", "--profile", "packed")),
    )
    for way in ways:
        for name in names():
            out = recipe("check", name, *way, "--quick", "--json", codes=(0, 2))  # 2 without output: no such batch
            outputs[f"{name} {' '.join(way)}"] = [
                {key: value for key, value in finding.items() if key not in ("where", "line")}
                for checked in json.loads(out or "[]")
                for finding in checked["findings"]
            ]
    for i, (change, *_rest) in enumerate(CASES):
        Path(f"case-{i:03}.yaml").write_text(yamlfiles.write_yaml(config_with(change)))
    out = recipe("check", *sorted(Path().glob("case-*")), "--gpu", "T4", "--quick", "--json", codes=(0, 2))
    for (change, *_rest), checked in zip(CASES, json.loads(out), strict=True):
        outputs[str(change)] = sorted(f"{finding['level']} {finding['name']}" for finding in checked["findings"])
    return outputs


def runs(_: Path) -> dict[str, Any]:
    """Adapters of three rehearsals and of a resumed one; what is listed of them, a sweep and a reproduction."""
    make = "import pathlib, random_models; random_models.save_tiny_llama(pathlib.Path('tiny'))"
    support = {"PYTHONPATH": str(ROOT / "tests" / "support")}
    subprocess.run([sys.executable, "-c", make], env=os.environ | support, check=True)
    Path("tiny.yaml").write_text(f"base_model: {Path('tiny').resolve()}\n")
    rehearsed = ("--profile", "rehearsal", "--profile", "tiny.yaml", *SHORT)
    outputs: dict[str, Any] = {}
    for name in TRAINED:
        folder = trained("run", name, *rehearsed)
        outputs[name] = digest((folder / ADAPTER).read_bytes())
    killed = subprocess.Popen(
        [RECIPE, "run", TRAINED[0], *rehearsed, "--set", "saves_per_epoch=4"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    before = set(Path("runs").rglob("manifest.json"))
    while not set(Path("runs").rglob("manifest.json")) - before and killed.poll() is None:
        time.sleep(0.05)
    children = psutil.Process(killed.pid).children(recursive=True)
    killed.send_signal(signal.SIGKILL)
    psutil.wait_procs([killed, *children])
    outputs["killed and resumed"] = digest((trained("resume", "latest") / ADAPTER).read_bytes())
    grid = ("--set", "lora_r=4,8")
    subprocess.run([RECIPE, "sweep", TRAINED[0], *rehearsed, *grid, "--limit", "4"], check=True, capture_output=True)
    listed = {
        "list": ("list",),
        "results": ("results",),
        **{f"results {study}": ("results", study) for study in ("haider2024", "tinker-tulu3")},
        "sweep": ("sweep", TRAINED[0], *rehearsed, *grid, "--limit", "4"),
        "reproduce": ("reproduce", "haider2024", "--rehearse", "--dry-run"),
    }
    for title, words in listed.items():
        outputs[title] = steady(json.loads(recipe(*words, "--json")))
    return outputs


def steady(value: Any) -> Any:
    """A JSON value without times, durations, memory, the front by memory, and names of runs: these differ each time."""
    if isinstance(value, dict):
        moving = re.compile(r"second|memory|time|hours|gib|path|folder|command|pareto")
        return {key: steady(item) for key, item in value.items() if not moving.search(key)}
    if isinstance(value, list):
        return [steady(item) for item in value]
    return re.sub(r"\d{8}-\d{6}-\w{7}", "RUN", value) if isinstance(value, str) else value


PARTS = {f.__name__: f for f in (recipes, configs, rows, scores, plans, checks, runs)}


def differences(before: Any, now: Any, where: str = "") -> Iterator[str]:
    """Where two records differ."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in [*before, *(key for key in now if key not in before)]:
            yield from differences(before.get(key), now.get(key), f"{where} > {key}")
    elif before != now:
        yield f"{where[3:]}: {before} -> {now}"


def main() -> int:
    """Compute all parts, or those that are named, and compare or write them."""
    shared, *words = sys.argv[1:]
    parts = [name for name in words if name in PARTS] or list(PARTS)
    data = Path(shared).resolve()
    now = {}
    with tempfile.TemporaryDirectory() as place:
        os.chdir(place)
        for name in parts:
            print(name, file=sys.stderr)
            now[name] = PARTS[name](data)
    before = json.loads(RECORD.read_text()) if RECORD.is_file() else {}
    if "--write" in words:
        RECORD.write_text(json.dumps(before | now, indent=1, sort_keys=True) + "\n")
        return 0
    now = json.loads(json.dumps(now))
    lines = list(differences({name: before.get(name) for name in parts}, now))
    print("\n".join(lines) or "no differences")
    return bool(lines)


if __name__ == "__main__":
    raise SystemExit(main())
