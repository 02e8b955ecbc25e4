"""The container's files: they pass their tools, and fit one another; `make test-image` builds the image and uses it."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest

ROOT = Path(__file__).parents[1]
DOCKERFILE = ROOT / "docker" / "Dockerfile"
TOOLS = Path(sys.executable).parent


def instructions() -> list[tuple[str, list[str]]]:
    lines = (line.split() for line in DOCKERFILE.read_text().splitlines() if line and not line.startswith("#"))
    return [(name, words) for name, *words in lines]


def environment() -> dict[str, str]:
    return dict(word.split("=", 1) for name, words in instructions() if name == "ENV" for word in words)


@pytest.mark.parametrize(
    "command",
    [
        "hadolint docker/Dockerfile",
        "shellcheck docker/install.sh tools/build_image.sh tools/demo.sh tools/upgrade.sh .ci/run",
    ],
)
def test_linters_find_nothing(command):
    tool, *files = command.split()
    present = [file for file in files if (ROOT / file).exists()]  # .ci is not in the image
    done = subprocess.run([TOOLS / tool, *present], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout == ""


@pytest.fixture
def compose(programs: Callable[[str], None]) -> dict[str, Any]:
    """The compose file as docker-compose reads it."""
    programs("compose")
    command = ["docker-compose", "-f", ROOT / "docker" / "compose.yaml", "config", "--format", "json"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_TOKEN_FILE": "/some/token"})
    assert done.returncode == 0
    assert done.stderr == ""
    return orjson.loads(done.stdout)


def test_compose_accepts_its_file_which_fits_the_dockerfile(compose):
    service = compose["services"]["recipe"]
    assert Path(service["build"]["context"], service["build"]["dockerfile"]) == DOCKERFILE
    (workdir,) = {words[0] for name, words in instructions() if name == "WORKDIR"}
    home = environment()["HOME"]
    assert {mount["target"]: mount["source"] for mount in service["volumes"]} == {
        f"{workdir}/data": str(ROOT / "data"),
        f"{workdir}/runs": str(ROOT / "runs"),
        f"{workdir}/variants": str(ROOT / "variants"),
        f"{home}/.cache": "cache",
        f"{home}/.local/share": "kept",
    }
    (secret,) = service["secrets"]
    assert service["environment"]["HF_TOKEN_PATH"] == secret.get("target", f"/run/secrets/{secret['source']}")
    assert compose["secrets"][secret["source"]]["file"] == "/some/token"
    (device,) = service["deploy"]["resources"]["reservations"]["devices"]
    assert device["driver"] == "nvidia"
    assert device["count"] == -1
    assert device["capabilities"] == ["gpu"]


def test_nothing_is_copied_that_dockerignore_keeps_out():
    let_in = (ROOT / ".dockerignore").read_text().splitlines()
    copied = [words[:-1] for name, words in instructions() if name == "COPY" and words[0] != "--from=build"]
    assert {f"!{Path(source).parts[0]}" for sources in copied for source in sources} <= set(let_in)
