"""Rehearsals of other authors' configs: their processes write only where they may, and contact nobody.

Audit events show what Python does, in all processes; the planted files and the proxy show what native code does.
"""

import os
import random
import socket
from pathlib import Path
from typing import Any

import pytest
from conftest import RECIPE, SUPPORT, config_with, start
from watch import elsewhere

from qlora_recipes.base import yamlfiles

EVIL = "https://evil.example/x"
PLANTED = {"planted.txt": "{{ messages }}", "planted.jsonl": '{"instruction": "Add.", "output": "2"}\n' * 60}
REFUSED: list[dict[str, Any]] = [
    {"dynamic_checkpoint": {"enabled": True, "trigger_file_path": "../../planted.txt"}},
    {"mlflow_tracking_uri": "HTTPS://Evil.example/x", "use_mlflow": True},
    {"swanlab_api_host": EVIL, "use_swanlab": True, "swanlab_project": "p"},
    {"trackio_space_id": "evil/space", "use_trackio": True},
    {"chat_template_jinja": "../planted.txt"},
    {"plugins": ["evil.Plugin"]},
]
"""Settings with an error: nothing is started."""
HONEST: list[dict[str, Any]] = [
    {"wandb_project": "p", "wandb_entity": "evil", "wandb_log_model": "checkpoint"},
    {"hub_model_id": "evil/model", "hub_strategy": "every_save", "push_dataset_to_hub": "evil/rows"},
    {"use_mlflow": True, "mlflow_experiment_name": "p", "hf_mlflow_log_artifacts": True},
    {"use_comet": True, "comet_workspace": "evil", "comet_project_name": "p"},
    {"output_dir": "../planted", "dataset_prepared_path": "../planted/rows"},
    {"datasets": [{"path": "../planted.jsonl", "type": "alpaca"}]},
    {"use_trackio": True, "trackio_project_name": "p"},
]
"""Settings that need no consent."""


@pytest.mark.long
@pytest.mark.parametrize("number", range(20))
def test_a_rehearsal_of_anothers_config_stays_in_its_folder(tmp_path, fake_axolotl, number):
    work, hooks = tmp_path / "work", tmp_path / "hooks"
    for folder in (work, hooks, work / "tmp"):
        folder.mkdir()
    for name, text in PLANTED.items():
        (tmp_path / name).write_text(text)
    (hooks / "sitecustomize.py").write_text("import os, watch\nwatch.log_to(os.environ['WATCH_LOG'])\n")
    events = tmp_path / "events.log"
    environment = {"PYTHONPATH": f"{hooks}:{SUPPORT}", "WATCH_LOG": str(events), "TMPDIR": str(work / "tmp")}
    environment["TORCHINDUCTOR_CACHE_DIR"] = str(work / "inductor")  # else below /tmp
    environment["OMP_NUM_THREADS"] = "1"  # threads that wait for each other take ten times as long on a busy machine
    chance, is_refused = random.Random(number), number % 3 == 2
    parts = chance.sample(HONEST, 3) + chance.sample(REFUSED, int(is_refused))
    settings = {key: value for part in parts for key, value in part.items()}
    (work / "theirs.yaml").write_text(yamlfiles.write_yaml(config_with(settings)))
    command = RECIPE if number == 0 else fake_axolotl
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        url = f"http://127.0.0.1:{proxy.getsockname()[1]}"
        environment |= dict.fromkeys(("http_proxy", "https_proxy", "all_proxy", "HTTPS_PROXY", "ALL_PROXY"), url)
        words = ["run", "theirs.yaml", "--rehearse", "--set", "max_steps=2", "--set", "micro_batch_size=1"]
        process = start(work, *words, "--set", "sequence_len=256", command=command, **environment)
        _, messages = process.communicate(timeout=1500)
        proxy.setblocking(False)
        with pytest.raises(BlockingIOError):  # nobody waits for an answer
            proxy.accept()
    assert process.returncode == (2 if is_refused else 0) and "Traceback" not in messages, messages
    assert is_refused != any(work.glob("runs/*/*/run.json"))
    lines = [line.partition("\t") for line in events.read_text().splitlines()]
    folders = [work, Path(os.environ["XDG_CACHE_HOME"]), Path(os.environ["XDG_DATA_HOME"])]
    assert elsewhere([(event, seen) for event, _, seen in lines], *folders) == []
    assert {file.name: file.read_text() for file in tmp_path.glob("planted*")} == PLANTED
