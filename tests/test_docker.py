"""The container's files: they pass their tools, and fit one another; `make test-image` builds the image and uses it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import orjson
import pytest

ROOT = Path(__file__).parents[1]
DOCKERFILE = ROOT / "docker" / "Dockerfile"
COMPOSE = ["docker-compose"] if shutil.which("docker-compose") else ["docker", "compose"]
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


def test_compose_accepts_its_file_which_fits_the_dockerfile():
    command = [*COMPOSE, "-f", ROOT / "docker" / "compose.yaml", "config", "--format", "json"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, env=os.environ | {"HF_TOKEN_FILE": "/some/token"}
        )
    except FileNotFoundError:
        pytest.skip("needs docker-compose")
    if "is not a docker command" in done.stderr:
        pytest.skip("needs docker's plugin compose")
    assert done.returncode == 0
    assert done.stderr == ""
    config = orjson.loads(done.stdout)
    service = config["services"]["recipe"]
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
    assert config["secrets"][secret["source"]]["file"] == "/some/token"
    (device,) = service["deploy"]["resources"]["reservations"]["devices"]
    assert device["driver"] == "nvidia"
    assert device["count"] == -1
    assert device["capabilities"] == ["gpu"]


def test_nothing_is_copied_that_dockerignore_keeps_out():
    let_in = (ROOT / ".dockerignore").read_text().splitlines()
    copied = [words[:-1] for name, words in instructions() if name == "COPY" and words[0] != "--from=build"]
    assert {f"!{Path(source).parts[0]}" for sources in copied for source in sources} <= set(let_in)
