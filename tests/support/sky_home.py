"""SkyPilot in a home of its own, with a catalogue of prices that this file writes; no cloud is asked for anything."""

import base64
import csv
import io
import os
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import pytest

from qlora_recipes.places import sky_client

PRICES = {
    "lambda": {"A10": 0.75, "A100": 1.29, "A100:4": 5.16, "H100": 2.49},
    "runpod": {"L4": 0.43, "A40": 1.5, "H100": 2.39},
}
"""USD an hour of cards by cloud, as `name` or `name:count`."""
SPOT = {"L4": 0.22, "A40": 0.8, "H100": 1.25}
"""Those of machines that may be taken away, which only RunPod has."""
SECRETS = {"HF_TOKEN": "hf_planted-one", "JUDGE_KEY": "planted-two"}
"""What is secret in the environment of SkyPilot's process."""
_CLOUDS = {"lambda": "Lambda", "runpod": "RunPod"}
_PLACES = {"lambda": {"Region": "us-east-1"}, "runpod": {"Region": "US", "AvailabilityZone": "US-KS-2"}}
_PROCESS = Path(__file__).with_name("sky_process.py")


@dataclass
class SkyPilot:
    """SkyPilot, imported once.

    Attributes:
        env: what commands that are to find the same home and server have in their environment.
    """

    env: dict[str, str]
    process: "subprocess.Popen[bytes]"

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """What SkyPilot answers; see `sky_process` and `sky_helper`."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(orjson.dumps({"do": do} | arguments) + b"\n")
        self.process.stdin.flush()
        answer: dict[str, Any] = orjson.loads(self.process.stdout.readline())
        return answer


def _catalogue() -> dict[str, str]:
    """Its files, in the form of SkyPilot's own."""
    files = {}
    clouds_with: dict[str, list[str]] = {}
    for cloud, prices in PRICES.items():
        rows = []
        for card, price in prices.items():
            name, _, count = card.partition(":")
            of_card = {"AcceleratorName": name, "AcceleratorCount": count or "1", "vCPUs": 30, "MemoryGiB": 200}
            costs = {"Price": price, "SpotPrice": SPOT.get(card) if cloud == "runpod" else None, "GpuInfo": None}
            rows.append({"InstanceType": f"{count or 1}x_{name}"} | of_card | costs | _PLACES[cloud])
            clouds_with.setdefault(name, []).append(_CLOUDS[cloud])
        files[f"{cloud}/vms.csv"] = _csv(rows)
    cards = [{"AcceleratorName": name, "Clouds": str(clouds)} for name, clouds in clouds_with.items()]
    return files | {"common/accelerators.csv": _csv(cards)}


def _csv(rows: list[dict[str, Any]]) -> str:
    stream = io.StringIO()
    writer = csv.DictWriter(stream, [*rows[0]])
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def with_secrets(folder: Path) -> list[Path]:
    """The files of a folder that have a secret in them, as it is or in base 64, as SkyPilot keeps requests."""
    planted = [b"planted", *(base64.b64encode(b" " * i + b"planted-")[-(-i * 4 // 3) : -4] for i in range(3))]
    files = (file for file in folder.rglob("*") if file.is_file() and not file.is_symlink())
    return sorted(file.relative_to(folder) for file in files if any(text in file.read_bytes() for text in planted))


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


def require() -> None:
    """Skip where SkyPilot is not installed: it is optional, in an environment of its own."""
    if not sky_client.installed():
        pytest.skip(f"no SkyPilot in {sky_client.ENVIRONMENT}; `make sky` installs it")


@contextmanager
def running(home: Path) -> Iterator[SkyPilot]:
    """Start it, and stop it in the end; skips where it is not installed."""
    require()
    (home / ".sky").mkdir(parents=True)
    (home / ".sky" / "config.yaml").write_text(f"allowed_clouds: [{', '.join(PRICES)}]\n")
    env = {"HOME": str(home), "SKYPILOT_API_SERVER_LOCAL_PORT": str(free_port())}
    env |= {"SKYPILOT_DISABLE_USAGE_COLLECTION": "1"}
    environment = sky_client.ENVIRONMENT / "bin"
    command = [environment / "python", "-I", _PROCESS, sky_client._HELPER]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run([environment / "sky", "api", "start"], env=os.environ | env | SECRETS, check=True, **quiet)
    with (
        (home / "said").open("wb") as said,
        subprocess.Popen(command, env=os.environ | env | SECRETS, stderr=said, **pipes) as process,
    ):
        try:
            skypilot = SkyPilot(env, process)
            assert skypilot.ask("start", catalogue=_catalogue(), clouds=[*_CLOUDS.values()]) == {}
            yield skypilot
        finally:
            assert process.stdin
            process.stdin.close()
            subprocess.run([environment / "sky", "api", "stop"], env=os.environ | env, capture_output=True)
