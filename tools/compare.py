"""Figures and hashes of the project's results, compared with those before a reduction.

    .venv/bin/python tools/compare.py SHARED/data          # prints the differences from tools/comparison.json
    .venv/bin/python tools/compare.py SHARED/data --write  # makes that file anew, with a reason in the commit

It calls nothing but the command `recipe`, so that modules can move and be renamed. To be removed with issue 39.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[1]
RECORD = Path(__file__).with_name("comparison.json")
RECIPE = Path(sys.executable).with_name("recipe")
GPUS = ("Quadro RTX 5000", "L40S")
TRAINING = (
    *("run", "haider2024/llama-3-8b", "--profile", "rehearsal", "--profile", "tiny.yaml", "--set", "num_epochs=1"),
    *("--set", "datasets.0.split=train[:64]", "--set", "saves_per_epoch=4"),
)


def recipe(*words: str | Path, codes: tuple[int, ...] = (0,)) -> str:
    """The output of a command, which may end with one of some exit codes."""
    done = subprocess.run([RECIPE, *words], capture_output=True, text=True)
    if done.returncode not in codes:
        raise SystemExit(f"{words}: exit code {done.returncode}\n{done.stderr}")
    return done.stdout


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def recipes(_: Path) -> dict[str, Any]:
    """Hashes of recipes and profiles, once rendered."""
    recipe("render")
    return {str(file.relative_to(ROOT)): digest(file) for file in sorted((ROOT / "recipes").rglob("*.yaml"))}


def rows(shared: Path) -> dict[str, Any]:
    """Hashes of the rows that each study's data is prepared to, from real ones."""
    for split in ("train", "valid", "test"):
        Path("raw", "haider2024").mkdir(parents=True, exist_ok=True)
        Path("raw", "haider2024", f"msg-{split}.jsonl").write_bytes(
            (shared / "codereviewer-msg-test-60.jsonl").read_bytes()
        )
    meta = Path("raw", "peft-metamathqa")
    meta.mkdir(parents=True)
    every = [json.loads(line) for line in (shared / "gsm8k" / "train.jsonl").read_bytes().splitlines()]
    with (meta / "MetaMathQA.jsonl").open("w") as stream:
        for i in range(24_000):
            row = every[i % len(every)]
            stream.write(json.dumps({"query": f"{row['question']} ({i})", "response": row["answer"]}) + "\n")
    for file in ("train.jsonl", "test.jsonl"):
        (meta / file).write_bytes((shared / "gsm8k" / file).read_bytes())
    raw = {"haider2024": "raw/haider2024", "loftq-gsm8k": shared / "gsm8k", "peft-metamathqa": meta}
    found = {}
    for study, folder in raw.items():
        recipe("data", "prepare", folder, "--study", study, "--out", f"rows-{study}")
        found |= {str(file): digest(file) for file in sorted(Path(f"rows-{study}").glob("*.jsonl"))}
    return found


def scores(shared: Path) -> dict[str, Any]:
    """Scores of published predictions."""
    files = [(shared / "haider2024" / f"msg-5000-{name}.txt").read_bytes().decode() for name in ("gold", "pred")]
    lines = zip(*(text.removesuffix("\n").split("\n") for text in files), strict=True)
    with Path("llama-3.jsonl").open("w") as stream:
        stream.writelines(json.dumps({"reference": a, "prediction": b}) + "\n" for a, b in lines)
    asked = {
        "Llama 3": (Path("llama-3.jsonl"), "--metric", "rouge_l", "--metric", "chrf"),
        "CodeReviewer": (shared / "codereviewer-test-predictions.jsonl",),
    }
    for which in ("6b_finetuning", "6b_verification"):
        field = ("--prediction-field", f"{which}.solution")
        asked[which] = (shared / "gsm8k" / "solutions-6b.jsonl", *field, "--metric", "number: {markers: ['A: ']}")
    words = ("--metric", "bleu4", "--metric", "bertscore:none", "--json")
    return {name: json.loads(recipe("score", *of_file, *words)) for name, of_file in asked.items()}


def plans(_: Path) -> dict[str, Any]:
    """GiB that each recipe needs on each of two GPUs."""
    names = [row["recipe"] for row in json.loads(recipe("list", "--json"))]
    return {
        f"{name}, {gpu}": json.loads(recipe("plan", name, "--gpu", gpu, "--json"))[0]["memory"]["needed"] / 2**30
        for name in names
        for gpu in GPUS
    }


def findings(_: Path) -> dict[str, Any]:
    """Levels and names of what check finds in the cases of its tests."""
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "support")]
    from checks.test_rules import CASES
    from conftest import config_with

    from qlora_recipes.base import yamlfiles

    for i, (change, *_rest) in enumerate(CASES):
        Path(f"case-{i:03}.yaml").write_text(yamlfiles.write_yaml(config_with(change)))
    os.environ["XDG_CACHE_HOME"] = str(Path("empty").resolve())  # whether it fits is known where it was planned
    checked = json.loads(recipe("check", *sorted(Path().glob("case-*")), "--gpu", "T4", "--json", codes=(0, 2)))
    del os.environ["XDG_CACHE_HOME"]
    return {
        str(change): sorted(f"{finding['level']} {finding['name']}" for finding in of_case["findings"])
        for (change, *_rest), of_case in zip(CASES, checked, strict=True)
    }


def adapters(_: Path) -> dict[str, Any]:
    """Hashes of an adapter that was trained at once, and of one whose training was killed and resumed."""
    make = "import pathlib, random_models; random_models.save_tiny_llama(pathlib.Path('tiny'))"
    support = {"PYTHONPATH": str(ROOT / "tests" / "support")}
    subprocess.run([sys.executable, "-c", make], env=os.environ | support, check=True)
    Path("tiny.yaml").write_text(f"base_model: {Path('tiny').resolve()}\n")
    whole = Path(recipe("--runs", "whole", *TRAINING).strip())
    process = subprocess.Popen([RECIPE, "--runs", "killed", *TRAINING], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while not list(Path("killed").rglob("checkpoint-*/manifest.json")):
        time.sleep(0.05)
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    psutil.wait_procs([process, *children])
    resumed = Path(recipe("--runs", "killed", "resume", "latest").strip())
    file = "output/adapter_model.safetensors"
    return {"whole": digest(whole / file), "killed and resumed": digest(resumed / file)}


PARTS = {f.__name__: f for f in (recipes, rows, scores, plans, findings, adapters)}


def differences(before: Any, now: Any, where: str = "") -> list[str]:
    """Where two records differ; numbers of plans may by 0.1 %."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = [*before, *(key for key in now if key not in before)]
        return [d for key in keys for d in differences(before.get(key), now.get(key), f"{where} > {key}")]
    close = where.startswith(" > plans") and None not in (before, now) and abs(now / before - 1) < 1e-3
    return [] if before == now or close else [f"{where[3:]}: {before} -> {now}"]


def main() -> int:
    """Compute all parts, or those that are named, and compare or write them."""
    shared, *rest = sys.argv[1:]
    parts = [name for name in rest if name in PARTS] or list(PARTS)
    data = Path(shared).resolve()
    now = {}
    with tempfile.TemporaryDirectory() as place:
        os.chdir(place)
        for name in parts:
            print(name, file=sys.stderr)
            now[name] = PARTS[name](data)
    before = json.loads(RECORD.read_text()) if RECORD.is_file() else {}
    if "--write" in rest:
        RECORD.write_text(json.dumps(before | now, indent=1, sort_keys=True) + "\n")
        return 0
    found = differences({name: before.get(name) for name in parts}, now)
    print("\n".join(found) or "no differences")
    return bool(found)


if __name__ == "__main__":
    raise SystemExit(main())
