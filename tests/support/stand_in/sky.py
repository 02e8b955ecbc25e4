"""Answers in the place of SkyPilot's Python with its helper: from answers.json beside its bin/, asked.jsonl grows."""

import json
import sys
from pathlib import Path

folder = Path(__file__).parents[1]
request = json.load(sys.stdin)
with (folder / "asked.jsonl").open("a") as log:
    log.write(json.dumps(request) + "\n")
print(json.dumps(json.loads((folder / "answers.json").read_text())[request["do"]]))
