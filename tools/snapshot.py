"""Values that this environment's Axolotl gives for the built-in recipes, a line each: for `make upgrade`.

A part that fails is a line with its error.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qlora_recipes.base import paths, yamlfiles
from qlora_recipes.config import merging

ROOT = Path(__file__).resolve().parents[1]
RECIPE = Path(sys.executable).with_name("recipe")
TINY = "import pathlib, random_models; random_models.save_tiny_llama(pathlib.Path('tiny'))"
# The tiny model has no chat template, which recipes for chats take from the model.
TRAINING = ("gradient_accumulation_steps=1", "max_steps=8", "logging_steps=1", "chat_template=chatml")


def recipe(*words: str) -> str:
    """The output of a command, which may end with findings.

    Raises:
        RuntimeError: it ended without output.
    """
    done = subprocess.run([RECIPE, *words], capture_output=True, text=True)
    if done.returncode and not done.stdout.strip():
        raise RuntimeError(f"recipe {words[0]}: {done.stderr.strip()[-600:]}")
    return done.stdout


def findings() -> Iterator[tuple[str, Any]]:
    """Findings of `recipe check` in all recipes."""
    for gpu in ("T4", "H100"):
        for checked in json.loads(recipe("check", "--gpu", gpu, "--json")):
            for finding in checked["findings"]:
                yield f"{checked['checked']}, {gpu}, {finding['level']}, {finding['name']}", finding["problem"]


def resolved() -> Iterator[tuple[str, Any]]:
    """Keys and values of each recipe after Axolotl's validation."""
    from qlora_recipes.training.validation import validated

    for name in paths.recipe_names():
        content = validated(yamlfiles.read_yaml(paths.find_recipe(name)[1])).to_dict()
        for key, value in merging.flatten(json.loads(json.dumps(content, default=str))):
            yield f"{name}, {key}", value


def plans() -> Iterator[tuple[str, Any]]:
    """Planned memory of all recipes, in bytes."""
    for plan in json.loads(recipe("plan", *paths.recipe_names(), "--gpu", "H100", "--json")):
        for key, value in merging.flatten(plan["memory"]):
            yield f"{plan['recipe']}, {key}", value


def losses() -> Iterator[tuple[str, Any]]:
    """Losses of a tiny model's rehearsal by each optimizer of the recipes."""
    subprocess.run([sys.executable, "-c", TINY], env=os.environ | {"PYTHONPATH": f"{ROOT}/tests/support"}, check=True)
    sets = [word for change in (f"base_model={Path('tiny').resolve()}", *TRAINING) for word in ("--set", change)]
    recipes = {yamlfiles.read_yaml(paths.find_recipe(name)[1])["optimizer"]: name for name in paths.recipe_names()}
    for optimizer, name in recipes.items():
        run = Path(recipe("--runs", "runs", "run", name, "--rehearse", *sets).strip())
        for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()):
            for key in ("loss", "eval_loss"):
                if key in row:
                    yield f"{optimizer}, step {row['step']}, {key}", row[key]


def main() -> None:
    """Print all parts, computed in an empty folder with a cache of its own."""
    with tempfile.TemporaryDirectory() as place:
        os.chdir(place)
        os.environ |= {"XDG_CACHE_HOME": place, "HF_HUB_OFFLINE": "1", "AXOLOTL_DO_NOT_TRACK": "1"}
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        for part in (findings, resolved, plans, losses):
            try:
                for name, value in part():
                    print(f"{part.__name__}: {name}: {value}")
            except Exception as error:  # imports of the package and Axolotl's validators raise anything
                print(f"{part.__name__}: FAILED: {error!r}")


if __name__ == "__main__":
    main()
