"""SkyPilot for tests, imported once for many requests: `python -I sky_process.py scripts/places/sky_helper.py`.

A JSON object on each line of stdin, with `do` and its arguments, gets one on a line of stdout.
"""

import importlib.util
import json
import sys
import time
from pathlib import Path
from typing import Any

from sky import check, global_user_state
from sky.catalog import common
from sky.clouds import CloudCapability

WORKSPACE = "default"


def start(catalogue: dict[str, str], clouds: list[str]) -> dict[str, Any]:
    """Write the files of a catalogue, which SkyPilot does not renew then, start the API server, and have it take clouds
    for enabled, whatever it found as it asked them."""
    for name, content in catalogue.items():
        file = Path(common.get_catalog_path(name))
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    while not global_user_state.get_cached_check_results(WORKSPACE):
        time.sleep(0.2)
    global_user_state.set_allowed_clouds(check._get_workspace_allowed_clouds(WORKSPACE), WORKSPACE)
    for capability in CloudCapability:
        global_user_state.set_enabled_clouds(clouds, capability, WORKSPACE)
    return {}


def understand(task: dict[str, Any]) -> dict[str, Any]:
    """What SkyPilot takes a task for, once it is valid."""
    made = helper._task(task)
    made.validate()
    return {
        "resources": [
            {
                "accelerators": one.accelerators,
                "cpus": one.cpus,
                "infra": one.infra.to_str(),
                "most": one.max_hourly_cost,
                "spot": one.use_spot,
            }
            for one in made.resources
        ],
        "ordered": isinstance(made.resources, list),
        "secrets": sorted(made.secrets),
        "envs": made.envs,
        "run": made.run,
        "setup": made.setup,
    }


answer_to, sys.stdout = sys.stdout, sys.stderr
spec = importlib.util.spec_from_file_location("sky_helper", sys.argv[1])
assert spec and spec.loader
helper = importlib.util.module_from_spec(spec)
spec.loader.exec_module(helper)
for line in sys.stdin:
    request = json.loads(line)
    do = request.pop("do")
    try:
        answer = {"start": start, "understand": understand}.get(do, helper._ANSWERS.get(do))(**request)
    except Exception as error:
        answer = {"error": helper._in_words(error)}
    print(json.dumps(answer), file=answer_to, flush=True)
