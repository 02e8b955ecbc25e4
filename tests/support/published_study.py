"""A study of review comments whose authors published predictions and an adapter. Its data is the built-in sample; what
was published is on a server of this machine."""

import hashlib
import shutil
from pathlib import Path
from typing import Any

import orjson
from conftest import SAMPLE

from qlora_recipes.base import paths, yamlfiles
from qlora_recipes.base.files import sha256
from qlora_recipes.config import datafiles
from qlora_recipes.data import studies

RECIPE = "reviews/mine"
BASELINE = "Somebody's model"
SUBSET = [5, 0, 3, 2]
TEST = [orjson.loads(line)["msg"] for line in (SAMPLE / "msg-test.jsonl").read_bytes().splitlines()]
GOLD = [TEST[i] for i in SUBSET]
PREDICTED = [GOLD[0], "why is this needed?", GOLD[2], ""]
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")


def lines(texts: list[str]) -> bytes:
    """Texts as authors publish them: a line each, without line ends in them, and none behind the last."""
    return "\n".join(" ".join(text.split()) for text in texts).encode()


FILES = {
    "pred.txt": lines(PREDICTED) + b"\n",
    "gold.txt": lines(GOLD),
    "whole.jsonl": b"".join(
        orjson.dumps({"target": text, "model": {"output": text if i % 2 else "no"}}) + b"\n"
        for i, text in enumerate(TEST)
    ),
}
"""Files of predictions on the server; the last ends in an empty prediction."""


STUDY = f"""
metrics: {{bleu4: {{}}, chrf: {{}}, eval_loss: {{}}}}
shown: [bleu4]
ablations: {{}}
published:
  {RECIPE}:
    scores: {{bleu4: 50.0}}
    predictions: {{prediction: {{file: pred.txt}}, reference: {{file: gold.txt}}}}
    adapter: theirs
  reviews/other: {{scores: {{bleu4: 5.0}}}}
baselines:
  - name: {BASELINE}
    scores: {{bleu4: 4.0}}
    test_set: some
    predictions:
      prediction: {{file: whole.jsonl, field: model.output}}
      reference: {{file: whole.jsonl, field: target}}
      test_set: test
"""


def write(place: Path, url: str, scores: dict[str, float] | None = None, **sources: Any) -> None:
    """Write the study into a folder of work; `sources` are other declarations by name, with __ for a dot."""
    first = paths.RECIPES / "haider2024"
    content = yamlfiles.read_yaml(first / "study.yaml") | yamlfiles.parse(STUDY, "")
    content["published"][RECIPE]["scores"] = scores or content["published"][RECIPE]["scores"]
    raw = {
        file.name: {"rows": datafiles.count_rows(file), "sha256": sha256(file)} for file in SAMPLE.glob("msg-*.jsonl")
    }
    declared: dict[str, Any] = {"rows.zip": {"url": f"{url}/rows.zip", "files": raw}}
    for name, content_of in FILES.items():
        declared[name] = {"url": f"{url}/{name}", "bytes": len(content_of), "sha256": digest(content_of)}
    of_hub = {"hub": "owner/theirs", "kind": "model", "revision": "c" * 40}
    for name in ADAPTER:
        declared[f"theirs/{name}"] = of_hub | {"file": f"sub/{name}"}
    for name, changed in sources.items():
        declared[name.replace("__", ".")] |= changed
    content["data"] |= {"key": "reviews", "sources": declared, "test_set": "some"}
    subset = {"title": "Some Rows", "rows": len(SUBSET), "positions": "some.json"}
    content["data"]["splits"]["test"]["subsets"] = {"some": subset}
    folder = place / "recipes" / "reviews"
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("mine", "other"):
        shutil.copy(first / "llama-3.2-3b.yaml", folder / f"{name}.yaml")
    shutil.copytree(first / "sample", folder / "sample", dirs_exist_ok=True)
    (folder / "some.json").write_bytes(orjson.dumps({"rows": SUBSET}))
    (folder / "study.yaml").write_text(yamlfiles.write_yaml(content))
    studies._load.cache_clear()


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
