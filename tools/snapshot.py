"""What the Axolotl of this environment makes of the shipped recipes, a part at a time, as JSON: for `make upgrade`.

Each part is items with fields and their values, in the current folder, which keeps what it makes.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qlora_recipes.base import paths, yamlfiles
from qlora_recipes.base.errors import UserError
from qlora_recipes.checks import check
from qlora_recipes.configs import config, gpus
from qlora_recipes.configs.compose import Request, compose
from qlora_recipes.planning.need import planner_of

Items = dict[str, dict[str, Any]]

CARDS = ("T4", "H100")
TINY = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 4096,
}
STEPS = 8


def recipe(*words: str) -> str:
    """What the command of this environment prints.

    Raises:
        RuntimeError: it failed, or found errors and printed nothing; with the end of what it said.
    """
    command = [str(Path(sys.executable).with_name("recipe")), *words]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode and not done.stdout.strip():
        raise RuntimeError(f"recipe {words[0]}: {' '.join(done.stderr.split())[-600:]}")
    return done.stdout


def schema() -> Items:
    """Axolotl's keys: type, default, allowed values, and whether it warns of them or refuses them."""
    from qlora_recipes.checks.installed import generate_schema

    made = json.loads(generate_schema())
    levels = {"": made, **{f"{name}.": level for name, level in made["$defs"].items()}}
    return {
        f"{above}{key}": dict(about(of_key))
        for above, level in levels.items()
        for key, of_key in level.get("properties", {}).items()
    }


def about(of_key: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """What of a key's schema can matter to a recipe; no descriptions."""
    yield "type", " or ".join(sorted(set(_types(of_key))))
    for form in of_key.get("anyOf", [of_key]):
        for value in form.get("enum", ()):
            yield f"takes {value}", True
    if "default" in of_key:
        yield "default", of_key["default"]
    if of_key.get("deprecated"):
        yield "deprecated", True


def _types(form: dict[str, Any]) -> Iterator[str]:
    """The names of the types that a schema allows; a definition's name stands for what it defines."""
    for alternative in form.get("anyOf", ()):
        yield from _types(alternative)
    if "$ref" in form:
        yield form["$ref"].rpartition("/")[2]
    elif form.get("type") == "array":
        items = set(_types(form.get("items", {})))
        yield f"list of {' or '.join(sorted(items)) or 'anything'}"
    elif "type" in form:
        yield form["type"]


def findings() -> Items:
    """What `recipe check --full` finds in each recipe but its memory, Axolotl's own validation with it, for each of the
    cards."""
    found: Items = {}
    for card in CARDS:
        for name in paths.recipe_names():
            fields = found.setdefault(name, {})
            for finding in check.check(Request(name), gpus.find(card), full=True).findings:
                key, text = f"{card}, {finding.name}", f"{finding.level}: {finding.problem}"
                fields[key] = f"{fields[key]}; {text}" if key in fields else text
    return found


def resolved() -> Items:
    """Each recipe as Axolotl's validation leaves it, with all that it fills in."""
    from qlora_recipes.checks.installed import validated

    made: Items = {}
    for name in paths.recipe_names():
        try:
            cfg = validated(yamlfiles.read_yaml(paths.find_recipe(name)[1])).to_dict()
            made[name] = dict(config.flatten(json.loads(json.dumps(cfg, default=str))))
        except Exception as error:  # validators, and plugins that load, raise anything
            made[name] = {"refused": f"{type(error).__name__}: {error}"}
    return made


def plans() -> Items:
    """The memory that the full micro batch of each recipe is planned to take, in MiB, and of what."""
    made: Items = {}
    for name in paths.recipe_names():
        planner, _ = planner_of(compose(Request(name)).config, gpus.find(CARDS[-1]), download=False, alone=True)
        try:
            usage = config.flatten(asdict(planner.usage()))
            made[name] = {key: round(size / 2**20, 2) for key, size in usage if isinstance(size, int | float)}
        except UserError as error:
            made[name] = {"failed": str(error)}
    return made


def losses() -> Items:
    """Losses of a rehearsal for each optimizer that recipes name, of a tiny model with random weights."""
    sys.path.append(str(Path(__file__).parents[1] / "tests" / "support"))
    import random_models

    tiny = Path("tiny-llama").resolve()
    if not tiny.exists():
        random_models.make(tiny, TINY)
    names: dict[str, str] = {}
    for name in paths.recipe_names():
        names.setdefault(yamlfiles.read_yaml(paths.find_recipe(name)[1])["optimizer"], name)
    made: Items = {}
    changes = {"base_model": tiny, "gradient_accumulation_steps": 1, "max_steps": STEPS, "logging_steps": 1}
    for optimizer, name in names.items():
        words = [word for key, value in changes.items() for word in ("--set", f"{key}={value}")]
        try:
            run = Path(recipe("run", name, "--rehearse", *words, "--runs", optimizer).strip())
            rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
            measured = [(row["step"], key, row[key]) for row in rows for key in ("loss", "eval_loss") if key in row]
            made[optimizer] = {f"{key} of step {step}": value for step, key, value in measured}
        except (RuntimeError, OSError) as error:
            made[optimizer] = {"failed": str(error)}
    return made


PARTS: dict[str, Callable[[], Items]] = {
    "schema": schema,
    "findings": findings,
    "resolved": resolved,
    "plans": plans,
    "losses": losses,
}

if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(PARTS[sys.argv[1]](), indent=1))
