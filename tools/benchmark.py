"""How long the quick commands take, and how fast rows are read. `make benchmark` prints it."""

import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from unittest.mock import patch

import benchmark_engines
import benchmark_start
import benchmark_table

from qlora_recipes.base import paths
from qlora_recipes.checks import rows

SAMPLE = paths.RECIPES / "haider2024" / "sample"
RECIPE = str(Path(sys.executable).with_name("recipe"))
ROWS = 128
"""That the engines generate."""
COMMANDS = [
    ["list"],
    ["show", "haider2024/llama-2-7b"],
    ["diff", "haider2024/llama-2-7b", "haider2024/llama-3-8b"],
    ["check", "haider2024/llama-2-7b"],
    ["check"],
    ["render", "--check"],
    ["results"],
]


# resource's figure would have that of the parent in it
PEAK = "print(*(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"  # in KiB
COMPLETION = {"_RECIPE_COMPLETE": "complete_bash", "COMP_WORDS": "recipe run code", "COMP_CWORD": "2"}


QUICK = 0.3
"""Seconds beyond an empty interpreter that `list`, `show` and `results` without runs may take."""


def beyond(command: list[str], **env: str) -> float:
    """Median over five pairs of the wall seconds that a command takes beyond an empty interpreter."""

    def seconds(command: list[str]) -> float:
        started = time.perf_counter()
        subprocess.run(command, env=os.environ | env, capture_output=True)
        return time.perf_counter() - started

    return statistics.median(seconds(command) - seconds([sys.executable, "-c", ""]) for _ in range(5))


def rows_per_second(folder: Path, count: int = 100_000, size: int = 2048) -> tuple[float, float]:
    """Bytes a second of processor time for rows of some size, made of the shipped sample: checked, and parsed alone."""
    texts = [row["patch"] for file in sorted(SAMPLE.glob("*.jsonl")) for row in map(json.loads, file.open())]
    file = folder / "train.jsonl"
    with file.open("w") as stream:
        for i in range(count):
            patch = ("\n".join(texts[(i + j) % len(texts)] for j in range(9)) * 3)[: size - 150]
            row = {"instruction": "Review this change.", "input": patch, "output": f"Why {i}?"}
            stream.write(json.dumps(row) + "\n")
    started = time.process_time()
    rows.check({"base_model": "meta-llama/Llama-2-7b-hf", "datasets": [{"path": str(file), "type": "alpaca"}]})
    checked = time.process_time()
    with file.open("rb") as lines:
        for line in lines:
            json.loads(line)
    read = time.process_time()
    return file.stat().st_size / (checked - started), file.stat().st_size / (read - checked)


def preparation(folder: Path, count: int = 100_000, size: int = 17_000) -> tuple[float, float, bool]:
    """Bytes a second of processor time for raw rows of some size, peak memory in MiB, and whether all are accounted
    for."""
    texts = [row for file in sorted(SAMPLE.glob("*.jsonl")) for row in map(json.loads, file.open())]
    file = folder / "msg-train.jsonl"
    with file.open("w") as stream:
        for i in range(count):
            row = texts[i % len(texts)] | {"id": i, "oldf": "\n".join(texts[i % 7]["patch"] for _ in range(40))}
            row["oldf"] = (row["oldf"] * 10)[: size - 1000]
            stream.write(json.dumps(row) + "\n")
    arguments = ["data", "prepare", str(file), "--out", str(folder / "prepared"), "--json"]
    code = f"import sys; from qlora_recipes import cli; cli.main(sys.argv[1:]); {PEAK}"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, check=True, text=True)
    printed, _, peak = done.stdout.strip().rpartition("\n")
    split = json.loads(printed)["splits"]["train"]
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    whole = split["read"] == count == split["rows"] + sum(split["dropped"].values())
    return file.stat().st_size / seconds, int(peak) / 1024, whole


def declared(folder: Path, count: int = 395_000) -> tuple[float, float, bool]:
    """As `preparation`, of rows like MetaMathQA's, without those whose texts have more than 1,300 characters."""
    from declared import sums

    text = "If there are 12 boxes with 24 pencils each, how many pencils are there in all? " * 30
    with (folder / "train.jsonl").open("w") as stream:
        for i in range(count):
            query, response = f"{i}: {text[: 100 + i % 300]}", text[: 300 + i % 900]
            row = {"type": "GSM_Rephrased", "query": query, "original_question": query, "response": response}
            stream.write(json.dumps(row) + "\n")
    row = {"instruction": "'Think step by step.'", "input": "query", "output": "response"}
    drop = {"too long": "(query ~ ' ' ~ response) | length > 1300"}
    sums(folder, {"data > fields": row, "data > filters": {"no answer": None} | drop, "data > splits > valid": None})
    code = (
        "import sys; from pathlib import Path; from qlora_recipes.data import prepare, study; of = Path(sys.argv[1]);"
        "made = prepare.prepare([of / 'train.jsonl'], of / 'out', study.load(of), 'default')['splits']['train'];"
        f"print(made['read'], made['rows'] + sum(made['dropped'].values())); {PEAK}"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, check=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    *counts, peak = done.stdout.split()
    return (folder / "train.jsonl").stat().st_size / seconds, int(peak) / 1024, counts == 2 * [str(count)]


def plan(name: str = "haider2024/code-llama-7b") -> tuple[float, float, float]:
    """Seconds of processor time for the first plan of a recipe beyond the imports, with a card's largest micro batch
    and longest row; for the imports; and for tracing each layer in place of five, over tracing five."""
    from qlora_recipes.base import yamlfiles
    from qlora_recipes.configs import gpus
    from qlora_recipes.planning import need
    from qlora_recipes.planning import plan as planning

    started = time.process_time()
    from qlora_recipes.planning import layers, memory

    imports = time.process_time() - started
    config = yamlfiles.read_yaml(paths.recipe_file(name))
    planner, _ = need.planner_of(config, gpus.find("T4"))
    started = time.process_time()
    planning.plan(config, gpus.find("T4"))
    planned = time.process_time()
    layers.trace(planner.step, planner._shapes())
    few = time.process_time()
    memory.trace(planner.step, planner._shapes())
    return planned - started, imports, (time.process_time() - few) / (few - planned)


def report(folder: Path) -> tuple[int, float, float, float, float]:
    """The bytes of a report with 5,000 predictions; and in chromium the seconds until its text is there, until all
    its figures are drawn and its rows can be read, and those of the slowest filter."""
    from playwright.sync_api import sync_playwright
    from reports.test_report import a_large_run, html_of

    file = folder / "report.html"
    file.write_text(html_of(a_large_run(folder)))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page()
        started = time.perf_counter()
        page.goto(file.as_uri())
        text = time.perf_counter() - started
        page.wait_for_selector("html[data-figures=drawn][data-reader=ready]", state="attached")
        ready = time.perf_counter() - started
        filters = page.evaluate(
            """(steps) => steps.map(([id, value]) => {
              const field = document.getElementById(id);
              const started = performance.now();
              field.value = value;
              field.dispatchEvent(new Event("input"));
              document.body.offsetHeight; // lay it out
              return performance.now() - started;
            })""",
            [["query", "zz"], ["query", "re"], ["query", ""], ["low", "0.5"], ["order", "down"], ["query", "a"]],
        )
        browser.close()
    return file.stat().st_size, text, ready, filters[0] / 1000, max(filters[1:]) / 1000


@patch.dict(os.environ, benchmark_start.OFFLINE)
def ratios() -> list[dict[str, str]]:
    """The rows of the README's table, each a ratio of two times that were measured one after the other."""
    table = []

    def row(what: str, over: str, ratio: float, more: str) -> None:
        table.append({"what": what, "over": over, "ratio": f"{ratio:.2f}", "": more})
        print(f"{what}, over {over}: {ratio:.2f} ({more})", flush=True)

    def folder() -> tempfile.TemporaryDirectory[str]:
        return tempfile.TemporaryDirectory()

    with folder() as name, patch.dict(os.environ, XDG_CACHE_HOME=name):  # no plan is kept there
        first, imports, every = plan()
    row("a first plan of 7B", "its imports", first / imports, f"{first:.1f} s of processor time")
    print(f"  tracing every layer takes {every:.1f} times as long")
    with folder() as name:
        scored, alone = benchmark_table.scoring(Path(name))
    row(
        "`recipe score`, 5,000 pairs, intervals", "sacrebleu alone", scored / alone, f"{scored:.1f} s of processor time"
    )
    for what, prepared in (("as the first study", lambda *at: preparation(*at, size=2000)), ("filtered", declared)):
        slower, larger, peak, speed = benchmark_table.growth(prepared)
        more = f"{larger:.2f} times the memory, {peak:.0f} MiB; {speed:.0f} MB/s"
        row(f"a prepared row of 1,000,000, {what}", "one of 250,000", slower, more)
    with folder() as name:
        for (before, slower, _), (engine, speed, equal) in pairwise(benchmark_engines.engines(Path(name), ROWS)):
            more = f"{speed:.2f} rows/s, {equal} of {ROWS} answers the same"
            row(f"a row evaluated by {engine}", before, slower / speed, more)
    with folder() as name:
        ratio, ours, theirs, split = benchmark_start.start(Path(name))
    row("`recipe run` to the first step", "`axolotl train`", ratio, f"{ours:.1f} s, {theirs:.1f} s")
    for phase, seconds in split.items():
        print(f"  {phase:30}{seconds:6.1f} s")
    return table


if __name__ == "__main__":
    for arguments in COMMANDS:
        name = "check, all recipes" if arguments == ["check"] else arguments[0]
        seconds = beyond([RECIPE, *arguments])
        slow = seconds > QUICK and name in ("list", "show", "results")
        print(f"{name:20}{seconds:6.3f} s beyond an empty interpreter{', MORE than it may' if slow else ''}")
    print(f"{'a completion':20}{beyond([RECIPE], **COMPLETION):6.3f} s beyond an empty interpreter")
    with tempfile.TemporaryDirectory() as folder:
        check, read = rows_per_second(Path(folder))
        prepared, memory, whole = preparation(Path(folder))
    print(
        f"rows checked        {check / 1e6:6.0f} MB/s on one core, in {read / check:.1f} times the time of json.loads"
    )
    print(
        f"rows prepared       {prepared / 1e6:6.0f} MB/s on one core, at most {memory:.0f} MiB, "
        f"{'all' if whole else 'NOT all'} accounted for"
    )
    with tempfile.TemporaryDirectory() as folder:
        prepared, memory, whole = declared(Path(folder))
    print(
        f"  filtered, of 1 kB {prepared / 1e6:6.0f} MB/s on one core, at most {memory:.0f} MiB, "
        f"{'all' if whole else 'NOT all'} accounted for"
    )
    if shutil.which("chromium"):
        with tempfile.TemporaryDirectory() as folder:
            size, text, ready, first, others = report(Path(folder))
        print(
            f"report              {size / 1e6:6.1f} MB with 5,000 predictions; in chromium {text:.1f} s to its text, "
            f"{ready:.1f} s to all figures and rows; first search {1000 * first:.0f} ms, then at most "
            f"{1000 * others:.0f} ms a filter"
        )
    benchmark_table.write(ratios())
