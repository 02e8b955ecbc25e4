"""The way to another release of Axolotl: `make upgrade AXOLOTL=x.y.z`.

In a copy of the checkout, under build/upgrade, it moves the pin, renews the lock and builds the environment; then it
compares what both Axolotls make of the shipped recipes. Only once all of that was measured do pin, lock and schema of
the checkout change.
"""

import difflib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from qlora_recipes.base.errors import UserError
from qlora_recipes.base.progress import say

Items = dict[str, dict[str, Any]]
ROOT = Path(__file__).resolve().parents[1]
PARTS = {
    "schema": "Axolotl's keys: types, values, defaults, deprecations",
    "findings": "What `recipe check --full` finds",
    "resolved": "The recipes as Axolotl resolves them",
    "plans": "Planned memory, in MiB",
    "losses": "Losses of a rehearsal of each optimizer, with a tiny model",
}
RENEWED = ("pyproject.toml", "requirements.lock", "recipes/axolotl.schema.json")
_LIMIT = 3600  # seconds of a part
_PIN = re.compile(r'("axolotl\[[\w,]+\])[^"]*"')
OFFLINE = {"HF_HUB_OFFLINE": "1", "AXOLOTL_DO_NOT_TRACK": "1", "CUDA_VISIBLE_DEVICES": ""}


class StepFailed(Exception):
    """A step failed; the message is the end of what it said."""


def run(command: list[str], folder: Path) -> None:
    """Run a step in a folder, and wait for it.

    Raises:
        StepFailed: it failed, or took an hour.
    """
    say(f"{folder.name}: {' '.join(Path(word).name if '/' in word else word for word in command)}")
    try:
        done = subprocess.run(command, cwd=folder, env=os.environ | OFFLINE, capture_output=True, timeout=_LIMIT)
    except subprocess.TimeoutExpired:
        raise StepFailed(f"took more than {_LIMIT // 60} minutes") from None
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).decode(errors="replace")
        lines = [line for line in said.splitlines() if line.strip()]
        raise StepFailed(" / ".join(lines[-3:])[-600:] or f"ended with code {done.returncode}")


def copied(version: str) -> Path:
    """A copy of the checkout with the pin on another release; an environment that is there is kept.

    Raises:
        UserError: the version is no release's, or pyproject.toml has no pin that can be moved.
    """
    moved = pin(version)
    folder = ROOT / "build" / "upgrade" / version
    if folder.exists():
        for entry in folder.iterdir():
            if entry.name != ".venv":
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    pyproject = folder / "pyproject.toml"
    text, count = _PIN.subn(rf'\1{moved}"', pyproject.read_text())
    if count != 1:
        raise UserError("pyproject.toml: no dependency on axolotl[…] whose pin could be moved")
    pyproject.write_text(text)
    return folder


def pin(version: str) -> str:
    """The pin that allows a release and the mendings of it.

    Raises:
        UserError: the version is not of the form x.y.z.
    """
    found = re.fullmatch(r"(\d+)\.(\d+)\.\d+(?:\.post\d+)?", version)
    if not found:
        raise UserError(f"AXOLOTL={version}: a release is meant, like 0.21.0")
    major, minor = map(int, found.groups())
    return f">={version},<{major}.{minor + 1}"


def snapshot(checkout: Path, work: Path) -> dict[str, Items | str]:
    """What the environment of a checkout makes of its recipes; of a part that fails, why. A process for each part."""
    taken: dict[str, Items | str] = {}
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    for part in PARTS:
        command = [str(checkout / ".venv/bin/python"), str(checkout / "tools/snapshot.py"), part, f"{part}.json"]
        try:
            run(command, work)
            taken[part] = json.loads((work / f"{part}.json").read_text())
        except StepFailed as failure:
            taken[part] = str(failure)
    return taken


def locked(file: Path) -> Items:
    """The packages of a lock with their versions."""
    found = re.findall(r"^([\w.-]+)==([^\s;]+)", file.read_text(), re.MULTILINE)
    return {name: {"version": version} for name, version in found}


def lines(items: Items) -> list[str]:
    """A line for each value of the items, floats with seven digits."""
    return [
        f"{item}: {field}: {format(value, '.7g') if isinstance(value, float) else value}"
        for item, fields in sorted(items.items())
        for field, value in fields.items()
    ]


def unmeasured(before: Items | str, after: Items | str) -> list[str]:
    """Reasons why a part, or items of it, could not be measured."""
    reasons = []
    for when, side in (("before", before), ("after", after)):
        if isinstance(side, str):
            reasons.append(f"{when}: {side}")
        else:
            reasons += [f"{when}, {item}: {fields['failed']}" for item, fields in side.items() if "failed" in fields]
    return reasons


def section(title: str, before: Items | str, after: Items | str) -> str:
    """Section of the report for one part: failures, then values of before and after that differ."""
    text = [f"## {title}", "", *(f"- not measured {reason}" for reason in unmeasured(before, after))]
    if not isinstance(before, str) and not isinstance(after, str):
        differences = [*difflib.unified_diff(lines(before), lines(after), n=0, lineterm="")][2:]
        shown = [line for line in differences if not line.startswith("@@")]
        text += ["```diff", *shown, "```"] if shown else [f"unchanged: {len(before)} items"]
    return "\n".join(text) + "\n\n"


def main(version: str) -> int:
    """Compare, write the report, and renew what the checkout pins if all was measured. Returns the exit code."""
    folder = copied(version)
    lock = locked(ROOT / "requirements.lock")
    locks: Items | str
    before: dict[str, Items | str]
    after: dict[str, Items | str]
    failed = ""
    try:
        run(["make", "lock", f"AXOLOTL={version}"], folder)
        locks = locked(folder / "requirements.lock")
        run(["make", "setup"], folder)
    except StepFailed as failure:
        failed = f"no environment of it could be made: {failure}"
        locks = failed
        before = after = dict.fromkeys(PARTS, failed)
    else:
        try:  # `recipe check` goes by it
            run([".venv/bin/recipe", "render", "--schema"], folder)
        except StepFailed as failure:
            failed = f"its schema could not be written: {failure}"
        works = (folder.with_name(f"{version}-{when}") for when in ("before", "after"))
        with ThreadPoolExecutor() as pool:  # each keeps one core busy
            before, after = pool.map(snapshot, (ROOT, folder), works)
    parts: list[tuple[str, Items | str, Items | str]] = [("Packages of the lock", lock, locks)]
    parts += [(title, before[key], after[key]) for key, title in PARTS.items()]
    titles = [title for title, *sides in parts if unmeasured(*sides)]
    if titles and not failed:
        failed = f"not all was measured: {'; '.join(titles)}"
    if failed:
        outcome = f"Nothing in the checkout was changed: {failed}"
    else:
        for name in RENEWED:
            shutil.copy2(folder / name, ROOT / name)
        outcome = f"Renewed in the checkout: {', '.join(RENEWED)}. `make setup` is next, then `make test`."
    now = lock["axolotl"]["version"]
    text = f"# From Axolotl {now} to {version}, {time.strftime('%Y-%m-%d')}\n\n{outcome}\n\n"
    text += "".join(section(*part) for part in parts)
    report = folder.with_name(f"{version}.md")
    report.write_text(text)
    print(text)
    say(f"{outcome}\nthe report is in {report.relative_to(ROOT)}")
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1]))
    except UserError as error:
        say(str(error))
        sys.exit(2)
