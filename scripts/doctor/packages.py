"""Python, the project, and the packages that are installed beside what the lock has."""

import platform
import re
import sys
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from ..base import paths
from ..checks.rules import hardware
from ..runs import provenance
from .line import PROJECT, Line, in_checkout, repair

_SHOWN = 5  # packages that a line names
_OF_TORCH = re.compile(r"(nvidia|cuda)-(?!ml-py)")  # what torch brings for the CUDA that it is built for


def python() -> Line:
    """The Python that runs this, beside those that the project takes."""
    takes = SpecifierSet(metadata(PROJECT)["Requires-Python"] or "")
    found = f"{platform.python_version()}, on {platform.system()} {platform.release()}, {platform.machine()}"
    if platform.python_version() in takes:
        return Line("Python", "ok", found)
    text = f"{found}; the project takes {takes}"
    return Line("Python", "wrong", text, "make the environment with another", repair("", anew=True))


def project() -> Line:
    """This project's version and commit."""
    git = provenance.collect()["git"]
    at = f", {git['revision'][:12]}{' with changes' if git['dirty'] else ''}" if git else ""
    kind = "a checkout" if paths.LOCK.is_file() else "a wheel"
    return Line("project", "ok", f"{version(PROJECT)}, {kind}{at}")


def lock() -> Line:
    """The installed packages beside those of requirements.lock, whose markers are evaluated for this machine; beside
    the project's own requirements where there is no lock."""
    if not paths.LOCK.is_file():
        unmet = [*_unmet(_own())]
        if unmet:
            return Line("lock", "wrong", f"not here, and of the project's requirements {_several(unmet)}",
                        "install what it requires", repair(unmet[0].split()[0]))  # fmt: skip
        text = "not here, as the project is installed as a wheel; all that it requires is installed"
        return Line("lock", "note", text, "only a checkout, by `make setup`, has the very versions that were tested")
    try:
        required = [*_required(paths.LOCK.read_text(encoding="utf-8"))]
    except (ValueError, OSError) as error:
        text = f"cannot be read: {str(error).splitlines()[0]}"
        return Line("lock", "wrong", text, "restore it", in_checkout("git checkout requirements.lock && make setup"))
    build = _build_of_torch()
    of_torch = [one for one in required if build and _OF_TORCH.match(one.name)]
    unmet = [*_unmet(one for one in required if one not in of_torch)]
    if unmet:
        return Line("lock", "wrong", _several(unmet), "install what requirements.lock has", repair(""))
    known = {canonicalize_name(one.name) for one in required}
    absent = [one.name for one in _own() if canonicalize_name(one.name) not in known]
    if absent:
        text = f"requirements.lock has no entry for {', '.join(absent)}, which pyproject.toml asks for"
        return Line("lock", "wrong", text, "compile it anew", in_checkout("make lock && make setup"))
    aside = f"; {len(of_torch)} packages of its CUDA 13 build aside, as torch's is {build}" if of_torch else ""
    return Line("lock", "ok", f"all {len(required) - len(of_torch)} packages are as in requirements.lock{aside}")


def _own() -> Iterator[Requirement]:
    """What the project itself requires on this machine, development aside."""
    for one in map(Requirement, requires(PROJECT) or ()):
        if one.marker is None or one.marker.evaluate({"extra": ""}):
            yield one


def _required(text: str) -> Iterator[Requirement]:
    """What a lock has for this machine."""
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith((" ", "#"))]
    if not lines:
        raise ValueError("it names no package")
    for line in lines:
        requirement = Requirement(line.removesuffix("\\").strip())
        if requirement.marker is None or requirement.marker.evaluate():
            yield requirement


def _unmet(requirements: Iterable[Requirement]) -> Iterator[str]:
    """What of some requirements is not installed, or in another version, in words."""
    for one in requirements:
        try:
            installed = version(one.name)
        except PackageNotFoundError:
            yield f"{one.name} is missing ({one.specifier or 'any version'})"
            continue
        if not installed or not one.specifier.contains(installed, prereleases=True):
            yield f"{one.name} is {installed or 'damaged'} instead of {str(one.specifier).removeprefix('==')}"


def _several(unmet: list[str]) -> str:
    more = f", and {len(unmet) - _SHOWN} more" if len(unmet) > _SHOWN else ""
    return f"{', '.join(unmet[:_SHOWN])}{more}"


def _build_of_torch() -> str | None:
    """The name of torch's build where it is not the registry's, which the lock has: cu126."""
    try:
        return Version(version("torch")).local
    except PackageNotFoundError:
        return None


def axolotl(facts: dict[str, Any]) -> Line:
    """Axolotl: the version, whether it can be imported, and its command.

    Args:
        facts: of the probe of that name.
    """
    required = next(one for one in _own() if one.name == "axolotl").specifier
    try:
        installed = version("axolotl")
    except PackageNotFoundError:
        return Line("Axolotl", "wrong", "not installed; every run needs it", "install it", repair("axolotl"))
    if not required.contains(installed, prereleases=True):
        text = f"{installed}; this project's recipes and schema are for {required}"
        return Line("Axolotl", "wrong", text, "install the lock's version", repair("axolotl"))
    if "error" in facts:
        text = f"{installed}, cannot be imported: {facts['error']}"
        return Line("Axolotl", "wrong", text, "make the environment anew", repair("axolotl", anew=True))
    command = Path(sys.executable).with_name("axolotl")
    if not command.is_file():
        text = f"{installed}, but there is no command axolotl beside {sys.executable}"
        return Line("Axolotl", "wrong", text, "make the environment anew", repair("axolotl", anew=True))
    return Line("Axolotl", "ok", installed)


def optional() -> Line:
    """The packages that a config may ask for and that the project does not require."""
    versions: dict[str, str] = {}
    missing = []
    for name in hardware.OPTIONAL:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            missing.append(name)
    there = ", ".join(f"{name} {number}" for name, number in versions.items()) or "none"
    return Line("optional packages", "ok", f"{there}; not installed: {', '.join(missing) or 'none'}")
