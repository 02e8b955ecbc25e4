"""The container: its files pass their tools, and the Dockerfile's steps make a folder that another user works in."""

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import orjson
import pytest

from qlora_recipes.base import paths

ROOT = Path(__file__).parents[1]
DOCKERFILE = ROOT / "docker" / "Dockerfile"
COMPOSE = ["docker-compose"] if shutil.which("docker-compose") else ["docker", "compose"]
TOOLS = Path(sys.executable).parent
USER = 10001
CALLER = dict(os.environ)  # before the tests' cache takes the place of the caller's


def instructions() -> list[tuple[str, list[str]]]:
    """The Dockerfile's instructions, a name and its words each."""
    lines = (line.split() for line in DOCKERFILE.read_text().splitlines() if line and not line.startswith("#"))
    return [(name, words) for name, *words in lines]


def environment() -> dict[str, str]:
    """What the Dockerfile's ENV sets."""
    return dict(word.split("=", 1) for name, words in instructions() if name == "ENV" for word in words)


@pytest.mark.parametrize(
    "command", ["hadolint docker/Dockerfile", "shellcheck docker/install.sh tools/build_image.sh .ci/run"]
)
def test_linters_find_nothing(command: str) -> None:
    tool, *files = command.split()
    present = [file for file in files if (ROOT / file).exists()]  # .ci is not in the image
    done = subprocess.run([TOOLS / tool, *present], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_compose_accepts_its_file_which_fits_the_dockerfile() -> None:
    command = [*COMPOSE, "-f", ROOT / "docker" / "compose.yaml", "config", "--format", "json"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, env=os.environ | {"HF_TOKEN_FILE": "/some/token"}
        )
    except FileNotFoundError:
        pytest.skip("needs docker-compose")
    if "is not a docker command" in done.stderr:
        pytest.skip("needs docker's plugin compose")
    assert (done.returncode, done.stderr) == (0, "")
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
    assert (device["driver"], device["count"], device["capabilities"]) == ("nvidia", -1, ["gpu"])


def test_a_base_with_a_digest_is_that_of_both_stages_and_named_in_the_image() -> None:
    pinned = f"nvidia/cuda:13.0.1-base-ubuntu24.04@sha256:{64 * 'a'}"
    given = [[word.replace("${BASE}", pinned) for word in words] for name, words in instructions() if name == "FROM"]
    assert given == [[pinned, "AS", "build"], [pinned]]
    *_, last = [number for number, (name, _) in enumerate(instructions()) if name == "FROM"]
    assert ("ARG", ["BASE"]) in instructions()[last:]  # an argument from before the first stage is empty in it
    assert ("LABEL", ["org.opencontainers.image.base.name=${BASE}"]) in instructions()[last:]


def test_nothing_is_copied_that_dockerignore_keeps_out() -> None:
    let_in = (ROOT / ".dockerignore").read_text().splitlines()
    copied = [words[:-1] for name, words in instructions() if name == "COPY" and words[0] != "--from=build"]
    assert {f"!{Path(source).parts[0]}" for sources in copied for source in sources} <= set(let_in)


def copy_closed(source: Path, target: Path) -> None:
    """Copy as Docker does, but new and for nobody but its owner, as from a checkout that others may not read."""
    if source.is_dir():
        target.mkdir(exist_ok=True)
        for inside in source.iterdir():
            if inside.name != "__pycache__":
                copy_closed(inside, target / inside.name)
    else:
        shutil.copyfile(source, target)
    target.chmod(source.stat().st_mode & 0o700)


def build(folder: Path, home: Path) -> None:
    """Do in a folder what the Dockerfile does in its own, with this machine's system packages and package cache."""
    earlier = folder.with_name("earlier")
    cache = subprocess.check_output([ROOT / ".uv/bin/uv", "cache", "dir"], text=True, env=CALLER)
    variables = {"HOME": str(home), "PATH": os.defpath, "UV_OFFLINE": "1"}
    for name, words in instructions():
        if name == "FROM":
            if folder.exists():
                folder.rename(earlier)
            folder.mkdir()
        elif name == "COPY" and words[0] == "--from=build":
            (earlier / words[-1]).rename(folder / words[-1])
        elif name == "COPY":
            *sources, target = words
            for source in sources:
                made = folder / target / Path(source).name if target.endswith("/") else folder / target
                made.parent.mkdir(exist_ok=True)
                copy_closed(ROOT / source, made)
        elif name == "RUN":
            *_, script, step = words
            if step in ("build-tools", "runtime"):
                continue
            if step == "environment":
                shutil.copytree(ROOT / ".uv", folder / ".uv")
                variables["UV_CACHE_DIR"] = cache.strip()
            done = subprocess.run([folder / script, step], cwd=folder, env=variables, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            variables.pop("UV_CACHE_DIR", None)


@pytest.fixture(scope="module")
def image() -> Iterator[Path]:
    """The project's folder as it is in the image, where others than its owner can get at it."""
    if os.getuid() != 0 or not (ROOT / ".uv").is_dir():
        pytest.skip("needs root, to be another user, and the uv that make installs")
    place = Path(tempfile.mkdtemp())
    try:
        place.chmod(0o755)
        (place / "root").mkdir()
        build(place / "image", place / "root")
        assert list((place / "root").iterdir()) == []  # no cache is left
        yield place / "image"
    finally:
        # new byte-code of 0.8 GB takes a disk a minute to give up, which no test has to wait for
        subprocess.Popen(["rm", "-rf", place], start_new_session=True)


def as_user(image: Path, *command: str) -> "subprocess.CompletedProcess[str]":
    """What a command comes to for a user who owns nothing there."""
    variables = {"PATH": f"{image}/.venv/bin:{os.defpath}", "HOME": str(image / "runs")}
    return subprocess.run(
        command, cwd=image, env=variables, user=USER, group=USER, extra_groups=[], capture_output=True, text=True
    )


@pytest.mark.long
def test_the_image_has_the_command_with_recipes_templates_and_sample(image: Path) -> None:
    listed = as_user(image, "recipe", "list", "--json")
    assert [row["recipe"] for row in orjson.loads(listed.stdout)] == paths.recipe_names()
    assert as_user(image, "recipe", "render", "--check").returncode == 0
    prepared = as_user(image, "sh", "-c", "recipe data prepare recipes/haider2024/sample/*.jsonl")
    assert prepared.returncode == 0, prepared.stderr
    assert (image / "data/codereviewer/manifest.json").stat().st_uid == USER
    shown = as_user(image, "axolotl", "--version")
    assert (shown.returncode, "axolotl" in shown.stdout) == (0, True)


@pytest.mark.long
def test_make_works_in_the_image_for_a_user_who_cannot_change_it(image: Path) -> None:
    assert as_user(image, "make", "--question", "setup").returncode == 0
    for command in ("touch scripts/new.py", "rm README.md", "touch .venv/new", "mv scripts other"):
        assert as_user(image, *command.split()).returncode == 1
    for command in ("touch runs/new", "touch variants/new", "touch report.html"):
        assert as_user(image, *command.split()).returncode == 0


@pytest.mark.long
def test_the_image_has_byte_code_of_all_packages_and_of_the_project(image: Path) -> None:
    (packages,) = (image / ".venv/lib").glob("python3*/site-packages")
    for folder in (image / "scripts", packages / "axolotl", packages / "transformers"):
        modules = [file for file in folder.rglob("*.py") if file.name.isidentifier() or file.stem.isidentifier()]
        assert [file for file in modules if not Path(importlib.util.cache_from_source(str(file))).exists()] == []
        assert len(modules) > 10
