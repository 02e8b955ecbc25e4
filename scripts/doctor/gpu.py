"""GPUs and what they need: the driver, torch's build, what the cards lack, and bitsandbytes."""

import os
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from ..base import machine
from ..base.files import Row
from ..base.machine import Card
from ..checks.rules.case import Case
from ..checks.rules.hardware import gpu_lacks
from ..configs.gpus import Gpu
from ..terminal.tables import text_of
from .line import Line, first_line, repair, torch_for

NEEDS = {11: 450, 12: 525, 13: 580}
"""The oldest driver that runs what is built for a CUDA of some major version (NVIDIA, "CUDA Compatibility", minor
version compatibility)."""
OLDER_CUDA = "12.6"
"""What `make setup CUDA=` can install torch for, on drivers that are older."""
_SINCE, _FIRST, _BEYOND = (5, 0), (7, 5), (10, 0)
"""Compute capabilities: torch's build for the older CUDA is for Maxwell to Hopper, that for CUDA 13 from Turing on."""
IN_CONTAINER = "docker run --gpus all, apptainer exec --nv, or nvidia.com/gpu: 1 among the limits of a pod"
_NVIDIA, _DISPLAY = "0x10de", "0x03"  # of PCI's vendors and classes of devices
_BOUNDS = {"nf4_off": 5e-3, "product_off_1": 1e-2, "product_off_8": 1e-2}  # fp16 rounds by 5e-4; levels are 0.08 apart
_ASKED = {"bf16": True, "tf32": True, "attn_implementation": "flash_attention_2"}


@dataclass(frozen=True)
class Driver:
    """What NVIDIA's driver says.

    Attributes:
        version: its version; None where there is none.
        cards: its GPUs, see `machine.gpus`.
        problem: why it names no GPU.
        on_bus: how many of NVIDIA's GPUs the machine has, with a driver or without.
    """

    version: str | None = None
    cards: list[Card] = field(default_factory=list)
    problem: str = ""
    on_bus: int = 0

    @property
    def number(self) -> int:
        """The first part of its version."""
        return int((self.version or "0").partition(".")[0])


def driver(root: Path = Path("/")) -> Driver:
    """Ask the driver through its library, else through nvidia-smi, else only the kernel for its version.

    Args:
        root: where /proc and /sys are.
    """
    cards, problem = _by_library()
    if not cards and (command := shutil.which("nvidia-smi")):
        cards, problem = _by_command(command)
    text = _read(root / "proc" / "driver" / "nvidia" / "version")
    of_kernel = re.search(r"Module .*?(\d{3}\.\d+(\.\d+)?)", text)
    on_bus = sum(
        _read(device / "vendor").strip() == _NVIDIA and _read(device / "class").startswith(_DISPLAY)
        for device in (root / "sys" / "bus" / "pci" / "devices").glob("*")
    )
    version = cards[0]["driver"] if cards else of_kernel[1] if of_kernel else None
    return Driver(version, cards, problem, on_bus)


def _read(file: Path) -> str:
    try:
        return file.read_text(errors="replace")
    except OSError:
        return ""


def _by_library() -> tuple[list[Card], str]:
    """The cards, or why NVML does not answer."""
    try:
        import pynvml

        pynvml.nvmlInit()
        pynvml.nvmlShutdown()
        return machine.gpus(), ""
    except Exception as error:  # of a card that fell off the bus too, or of the package
        return [], first_line(error)


def _by_command(command: str) -> tuple[list[Card], str]:
    """The cards by nvidia-smi, or why it fails."""
    asked = "--query-gpu=driver_version,name,memory.total,compute_cap"
    try:
        done = subprocess.run(
            [command, asked, "--format=csv,noheader,nounits"],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=20,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        return [], first_line(error)
    lines = [re.split(", *", line) for line in done.stdout.splitlines()]
    cards: list[Card] = [
        {"driver": version, "name": name, "memory_gib": round(int(mib) / 1024, 1), "compute_capability": capability}
        for version, name, mib, capability in (line for line in lines if len(line) == 4 and line[2].isdigit())
    ]
    return cards, "" if cards else (done.stdout + done.stderr).strip().partition("\n")[0]


def driver_line(found: Driver, torch: Row, container: str | None = None, job: bool = False) -> Line:
    """The driver beside the CUDA that torch is built for.

    Args:
        found: the driver.
        torch: the facts of the probe.
        container: what this process is inside of, see `machine.container`.
        job: whether this is a job of SLURM's that was given no GPU.
    """
    cuda = torch.get("cuda")
    needs = NEEDS.get(int(cuda.partition(".")[0])) if cuda else None
    newest = max(NEEDS.values())
    if found.version is None:
        if not found.on_bus:
            text = "no NVIDIA GPU here: rehearsals, checks, plans and reports work; trainings need one"
            return Line("driver", "note", text)
        text = f"{_count(found.on_bus, 'NVIDIA GPU')} on the bus, and no driver for it"
        if container:
            return Line("driver", "wrong", f"{text} in this container", f"pass the GPU on to it: {IN_CONTAINER}")
        remedy = f"install NVIDIA's driver, {newest} or newer; on Ubuntu, this does, elsewhere its own package of it"
        return Line("driver", "wrong", text, remedy, "sudo ubuntu-drivers install")
    if needs and found.number < needs:
        text = f"{found.version}; torch {torch['version']} is built for CUDA {cuda}, which needs {needs} or newer"
        if found.number >= NEEDS[int(OLDER_CUDA.partition(".")[0])] and _older_build_is_for(found.cards):
            remedy = f"install torch's build for CUDA {OLDER_CUDA}, or a newer driver"
            return Line("driver", "wrong", text, remedy, torch_for(OLDER_CUDA))
        return Line("driver", "wrong", text, f"install a newer driver, best {newest} or newer")
    if not found.cards:
        why = f": {found.problem}" if found.problem else ""
        text = f"{found.version} in the kernel, but no GPU is to be seen{why}"
        if container:
            return Line("driver", "wrong", text, f"pass the GPU on to this container: {IN_CONTAINER}")
        if job:
            return Line("driver", "note", f"{text}, as to a job that was given none", "ask for a GPU: --gres=gpu:1")
        if "version mismatch" in found.problem.lower():
            return Line("driver", "wrong", text, "after an update of the driver, restart the machine", "sudo reboot")
        return Line("driver", "wrong", text, "install the whole driver anew, or ask those who run this machine")
    return Line("driver", "ok", f"{found.version}{f'; CUDA {cuda} needs {needs} or newer' if needs else ''}")


def torch_line(found: Driver, facts: Row, hidden: str | None) -> Line:
    """torch: whether it can be imported, and is built for CUDA and for these cards.

    Args:
        found: the driver.
        facts: of the probe.
        hidden: CUDA_VISIBLE_DEVICES.
    """
    if "error" in facts:
        return Line("torch", "wrong", f"cannot be imported: {facts['error']}", "make the environment anew",
                    repair("torch", anew=True))  # fmt: skip
    cuda = facts.get("cuda")
    text = f"{facts['version']}, built {f'for CUDA {cuda}' if cuda else 'without CUDA'}"
    if not found.cards:
        return Line("torch", "ok", text)
    if not cuda:
        return Line("torch", "wrong", f"{text}: it cannot use the GPU", "install a build for CUDA", torch_for(""))
    unbuilt = [card for card in found.cards if not _is_built_for(_gpu(card), facts["arch"])]
    if unbuilt:
        cards = ", ".join(sorted({str(_gpu(card)) for card in unbuilt}))
        text = f"{text}, but not for {cards}, only for {', '.join(facts['arch'])}"
        old = {_gpu(card).capability < _FIRST for card in unbuilt}
        if old == {True} and cuda != OLDER_CUDA and _older_build_is_for(found.cards):
            remedy = f"try torch's build for CUDA {OLDER_CUDA}, which still supports older cards, or take a newer GPU"
            return Line("torch", "wrong", text, remedy, torch_for(OLDER_CUDA))
        if old == {False} and cuda == OLDER_CUDA:
            remedy = f"install torch's build for CUDA 13, which needs a driver of {NEEDS[13]} or newer"
            return Line("torch", "wrong", text, remedy, torch_for(""))
        return Line("torch", "wrong", text, "take another GPU, or another build of torch")
    if facts["gpus"]:
        return Line("torch", "ok", f"{text}; sees {_count(facts['gpus'], 'GPU')}")
    # SLURM sets it too, to the GPUs of a job
    if hidden in ("", "-1") or (hidden is not None and "No CUDA GPUs are available" in facts.get("says", "")):
        return Line("torch", "note", f"{text}; CUDA_VISIBLE_DEVICES={hidden} hides the GPUs from it",
                    "show them", "unset CUDA_VISIBLE_DEVICES")  # fmt: skip
    needs = NEEDS.get(int(cuda.partition(".")[0]), 0)
    remedy = "mend the driver first" if found.number < needs else "restart the machine, or install the driver anew"
    return Line("torch", "wrong", f"{text}, and sees no GPU: {facts.get('says', 'without a word')}", remedy)


def _older_build_is_for(cards: list[Card]) -> bool:
    return all(_SINCE <= _gpu(card).capability < _BEYOND for card in cards)


def given_no_gpu() -> bool:
    """Whether this is a job of SLURM's that was given no GPU."""
    given = (os.environ.get(f"SLURM_{name}") for name in ("JOB_GPUS", "STEP_GPUS", "GPUS_ON_NODE"))
    return "SLURM_JOB_ID" in os.environ and all(value in (None, "", "0") for value in given)


def _gpu(card: Card) -> Gpu:
    major, minor = card["compute_capability"].split(".")
    return Gpu(card["name"], (int(major), int(minor)), card["memory_gib"])


def _is_built_for(gpu: Gpu, built: list[str]) -> bool:
    """Whether torch's code runs on a GPU: code for one runs on those of its generation that are no older, and the
    intermediate form, compute_, on all that are no older. Where nothing is known it is taken to."""
    for name in built:
        if match := re.match(r"(sm|compute)_(\d+)(\d)", name):
            since = int(match[2]), int(match[3])
            if since <= gpu.capability and (match[1] == "compute" or since[0] == gpu.capability[0]):
                return True
    return not built


def cards_lines(found: Driver) -> list[Line]:
    """A line for each kind of GPU, with what it lacks by the rules of `recipe check`."""
    kinds: dict[str, list[Card]] = {}
    for card in found.cards:
        kinds.setdefault(f"{card['name']}, {card['memory_gib']:g} GiB", []).append(card)
    return [_card_line(f"{len(cards)} x {name}" if len(cards) > 1 else name, _gpu(cards[0]))
            for name, cards in kinds.items()]  # fmt: skip


def _card_line(name: str, gpu: Gpu) -> Line:
    lacks = [
        (problem.removeprefix(f"{gpu} ").partition(" (auto")[0].removesuffix(f" on {gpu}"), f"{key}: {remedy}")
        for _, key, problem, remedy in gpu_lacks(Case(_ASKED, set(), gpu))
        if key != "base_model"  # which torch's line is about
    ]
    text = f"{name}, {gpu.sm}"
    if not lacks:
        return Line("GPU", "ok", f"{text}; has bf16, tf32 and FlashAttention 2")
    problems, remedies = map("; ".join, zip(*lacks, strict=True))
    return Line("GPU", "note", f"{text}; {problems}", f"`recipe check` finds configs that ask for it: {remedies}")


def bitsandbytes_line(found: Driver, facts: Row, asked_for: str | None) -> Line:
    """bitsandbytes: whether its own library is loaded, for the processor that trains, and computes what it should.

    Args:
        found: the driver.
        facts: of the probe.
        asked_for: BNB_CUDA_VERSION, which names the library to load.
    """
    name = "bitsandbytes"
    anew = "make the environment anew", repair(name, anew=True)
    if asked_for is not None and ("error" in facts or "no_library" in facts):
        reason = facts.get("no_library") or facts["error"]
        return Line(name, "wrong", f"BNB_CUDA_VERSION={asked_for}: {reason}", "let it choose", "unset BNB_CUDA_VERSION")
    if "error" in facts:
        return Line(name, "wrong", f"cannot be used: {facts['error']}", *anew)
    if "no_library" in facts:
        return Line(name, "wrong", f"{facts['version']}, without its own library: {facts['no_library']}", *anew)
    kind = "CUDA" if facts["for_cuda"] else "CPUs"
    text = f"{facts['version']}, its library for {kind}"
    if facts["device"] == "cuda" and not facts["for_cuda"]:
        return Line(name, "wrong", f"{text}, but torch sees a GPU", *anew)
    off = {key: facts[key] for key in _BOUNDS}
    wrong = [key for key, value in off.items() if not value <= _BOUNDS[key]]
    products = max(off["product_off_1"], off["product_off_8"])
    figures = f"NF4 off by {text_of(off['nf4_off'])}, products by {text_of(products)}"
    if wrong:
        return Line(name, "wrong", f"{text}; it computes something else than NF4: {figures}", *anew)
    unused = " on the CPU" if found.cards and facts["device"] == "cpu" else ""
    return Line(name, "ok", f"{text}; computes as it should{unused} ({figures})")


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' if number != 1 else ''}"
