"""Manifests of checkpoints, and checks that training can resume from one."""

import zlib
from pathlib import Path
from typing import Any

from ..base.files import read_json, write_json

MANIFEST = "manifest.json"
CHUNK = 1 << 22  # bytes


def step_of(folder: Path) -> int | None:
    """The step of a checkpoint, from its name; None for another folder."""
    number = folder.name.removeprefix("checkpoint-")
    return int(number) if number.isdecimal() and number != folder.name else None


def write_manifest(folder: Path) -> None:
    """List all files of a checkpoint with their sizes and checksums, after the last of them was written.

    A crash of the machine can leave a file at its full size with zeros in place of what had not reached the disk, which
    only a checksum over all of it detects. CRC-32 takes in more than 4 GB/s from the page cache, so that an adapter and
    its optimizer of some 2 GB delay a save by half a second; SHA-256 would take four times as long.
    """
    files = {
        str(file.relative_to(folder)): {"bytes": file.stat().st_size, "crc32": _crc32(file)}
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != MANIFEST and file.suffix != ".part"
    }
    write_json(folder / MANIFEST, {"files": files})


def damage(folder: Path, ranks: int) -> str | None:
    """Return the obstacle to resuming from a checkpoint, as in `optimizer.pt is missing`, or None.

    A checkpoint has no manifest if its process was killed before writing one: its files cannot be told to be whole.

    Args:
        folder: the checkpoint.
        ranks: the processes that saved it.
    """
    state = read_json(folder / "trainer_state.json")
    if state.get("global_step") != step_of(folder):
        return "trainer_state.json is missing or damaged"
    if missing := _missing(folder, ranks):
        return f"{missing} is missing"
    listed = read_json(folder / MANIFEST).get("files")
    return _difference(folder, listed) if listed else f"{MANIFEST} is missing"


def _missing(folder: Path, ranks: int) -> str | None:
    """The first missing file that resuming needs, unless an engine's file replaces it.

    The trainer itself begins with a new optimizer, schedule or random state where it finds none, without an error.
    `latest` is what DeepSpeed writes last, and `.metadata` what FSDP writes last in each folder of shards.
    """
    rng_states = ["rng_state.pth"] if ranks == 1 else [f"rng_state_{rank}.pth" for rank in range(ranks)]
    needed = [
        ("adapter_model.safetensors", "model*.safetensors", "pytorch_model_fsdp_0/.metadata"),
        ("optimizer.pt", "optimizer.bin", "optimizer_0/.metadata", "latest"),
        ("scheduler.pt", "latest"),
        *((name,) for name in rng_states),
    ]
    return next((names[0] for names in needed if not any(any(folder.glob(name)) for name in names)), None)


def _difference(folder: Path, listed: dict[str, Any]) -> str | None:
    """The first file that differs from what the manifest lists, and how."""
    for name, saved in listed.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if (size := file.stat().st_size) != saved["bytes"]:
            return f"{name} has {size:,} bytes, and was saved with {saved['bytes']:,}"
        if _crc32(file) != saved["crc32"]:
            return f"{name} is not as it was saved"
    return None


def _crc32(file: Path) -> int:
    value = 0
    with file.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            value = zlib.crc32(chunk, value)
    return value
