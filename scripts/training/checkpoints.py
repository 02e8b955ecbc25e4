"""Checkpoints: their files, checksums and damage."""

import re
import zlib
from pathlib import Path
from typing import Any

from ..base.files import read_json, reading, write_json
from ..base.run_files import RunFile

CHUNK = 1 << 22  # bytes


def step_of(folder: Path) -> int | None:
    """Step of a checkpoint, from the folder's name; None for other folders."""
    match = re.fullmatch(RunFile.CHECKPOINT.format(r"(\d+)"), folder.name)
    return int(match[1]) if match else None


def write_manifest(folder: Path) -> None:
    """Write the checksums of all files of a valid checkpoint.

    If the machine crashes, a file can have its full size, but contain zeros where data was not yet written. Only a
    checksum of all bytes detects this. CRC-32 processes more than 4 GB/s from the page cache: for an adapter and
    optimizer of about 2 GB, a save takes half a second longer. SHA-256 would take four times as long.
    """
    files = {}
    for file in sorted(folder.rglob("*")):
        if file.is_file() and file.name != RunFile.MANIFEST and file.suffix != ".part":
            files[str(file.relative_to(folder))] = _crc32(file)
    write_json(folder / RunFile.MANIFEST, {"files": files})


def damage(folder: Path, ranks: int) -> str | None:
    """Reason not to resume from a checkpoint, such as `optimizer.pt is missing`, or None.

    A missing manifest means that the process was killed during the save; files may then be incomplete.

    Args:
        folder: the checkpoint.
        ranks: number of processes that saved it.
    """
    state = read_json(folder / "trainer_state.json")
    if state.get("global_step") != step_of(folder):
        return "trainer_state.json is missing or damaged"
    if missing := _missing(folder, ranks):
        return f"{missing} is missing"
    listed = read_json(folder / RunFile.MANIFEST).get("files")
    return _difference(folder, listed) if listed else f"{RunFile.MANIFEST} is missing"


def _missing(folder: Path, ranks: int) -> str | None:
    """First missing file that resuming needs.

    File names differ between DeepSpeed, FSDP, and the rest (DDP or one process).

    If optimizer, schedule or random state are missing, the trainer silently starts with new ones. DeepSpeed writes
    `latest` last. FSDP writes `.metadata` last in each folder of shards.
    """
    needed = [
        (RunFile.ADAPTER, "pytorch_model_fsdp_0/.metadata"),
        ("optimizer.pt", "optimizer.bin", "optimizer_0/.metadata", "latest"),
        ("scheduler.pt", "latest"),
    ]
    if ranks == 1:
        needed.append(("rng_state.pth",))
    else:
        needed += [(f"rng_state_{rank}.pth",) for rank in range(ranks)]
    for names in needed:
        if not any(any(folder.glob(name)) for name in names):
            return names[0]
    return None


def _difference(folder: Path, listed: dict[str, Any]) -> str | None:
    """Description of the first file that differs from the manifest, or None."""
    for name, checksum in listed.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if _crc32(file) != checksum:
            return f"{name} has changed since it was saved"
    return None


def _crc32(file: Path) -> int:
    value = 0
    with reading(file) as stream:
        while chunk := stream.read(CHUNK):
            value = zlib.crc32(chunk, value)
    return value
