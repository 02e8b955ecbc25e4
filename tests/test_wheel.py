"""The package as a wheel, in a place without a checkout."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from qlora_recipes.base import paths

ROOT = Path(__file__).parents[1]
BUILD = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"


def test_the_wheel_holds_all_that_the_command_needs(tmp_path):
    source = tmp_path / "source"
    for folder in ("scripts", "recipes", "templates"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    (source / "recipes" / "haider2024" / "results").mkdir(exist_ok=True)
    (source / "recipes" / "haider2024" / "results" / "record.json").touch()  # as others may add them
    built = subprocess.run([sys.executable, "-c", BUILD, tmp_path], cwd=source, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    with zipfile.ZipFile(tmp_path / built.stdout.split()[-1]) as wheel:
        wheel.extractall(tmp_path / "site")
    package = tmp_path / "site" / "qlora_recipes"
    for folder in ("recipes", "templates"):
        expected = {file.relative_to(source) for file in (source / folder).rglob("*") if file.is_file()}
        assert {file.relative_to(package) for file in (package / folder).rglob("*") if file.is_file()} == expected

    assert (package / "plan" / "plans.json").is_file()
    place = tmp_path / "place"
    place.mkdir()
    program = "import sys; from qlora_recipes.cli import main; sys.exit(main(sys.argv[1:]))"
    new = ("new", "mine", "--from", "haider2024/llama-3-8b", "--set", "lora_r=8")
    for words, printed in (
        (("list",), paths.recipe_names()[0]),
        (new, "variants/mine.yaml"),
        (("show", "mine"), "r: 8"),
        (("study", "new", "smith2026"), "recipes/smith2026/llama-3.2-3b-smith2026.yaml"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", program, *words],
            cwd=place, env=os.environ | {"PYTHONPATH": str(tmp_path / "site")}, capture_output=True, text=True,
        )  # fmt: skip
        assert (done.returncode, printed in done.stdout) == (0, True), done.stderr
