"""What a test of `recipe doctor` puts in the place of things that cannot be broken here."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

FACTS: dict[str, Any] = {
    "torch": {"version": "2.14.1+cu130", "cuda": "13.0", "arch": ["sm_75", "sm_80", "sm_90"], "gpus": 0, "says": ""},
    "bitsandbytes": {
        "version": "0.50.2",
        "for_cuda": False,
        "device": "cpu",
        "nf4_off": 0.0,
        "product_off_1": 0.0,
        "product_off_8": 0.0,
    },
    "axolotl": {},
}
"""What the probes find on a machine without a GPU."""
T4 = {"name": "Tesla T4", "memory_gib": 15.0, "compute_capability": "7.5", "driver": "580.65.06"}
H100 = {"name": "NVIDIA H100 80GB HBM3", "memory_gib": 79.6, "compute_capability": "9.0", "driver": "580.65.06"}


def distribution(folder: Path, name: str, version: str) -> None:
    """Have a folder on the path hold a package's metadata, of some version."""
    about = folder / f"{name}-{version}.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def program(file: Path, script: str) -> None:
    """A shell script in the place of a program."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)


def on_bus(root: Path, vendor: str = "0x10de") -> None:
    """A display adapter among the devices of PCI, as /sys shows them."""
    device = root / "sys" / "bus" / "pci" / "devices" / "0000:01:00.0"
    device.mkdir(parents=True)
    (device / "vendor").write_text(f"{vendor}\n")
    (device / "class").write_text("0x030200\n")


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[None]:
    """A file system in memory at a folder, with some options of mount."""
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mounting takes root: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
