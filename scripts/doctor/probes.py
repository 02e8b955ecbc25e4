"""What torch, bitsandbytes and Axolotl say of themselves, each asked in a process of its own: one that hangs, or ends
with a signal, takes nothing else with it.

`python -m qlora_recipes.doctor.probes NAME` prints what it finds, a JSON line for each library.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from threading import Thread
from typing import Any

import orjson

from ..base.processes import start_child
from .line import first_line

Facts = dict[str, Any]
LIMIT = 180
"""Seconds for a probe: on a slow network disk, imports can take minutes."""


def start() -> Callable[[], Facts]:
    """Start all probes at once.

    Returns:
        A function that waits for them, and gives the facts of each library by its name; in the place of what could not
        be asked, `error` with the reason.
    """
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "AXOLOTL_DO_NOT_TRACK": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    answers: dict[str, Facts] = {}
    threads = []
    for name in _PROBES:
        command = [sys.executable, "-P", "-m", __name__, name]  # no module is taken from the current folder
        # from this thread, which lasts: a child ends with the thread that started it
        child = start_child(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        # daemons: where this process is interrupted nobody waits for them, and it takes its children along
        threads.append(Thread(target=_answer_to, args=(answers, name, child), daemon=True))
        threads[-1].start()

    def all_facts() -> Facts:
        for thread in threads:
            thread.join()
        facts: Facts = {}
        for name, libraries in _PROBES.items():
            found = answers[name]
            facts |= {library: found.get(library, {"error": found["ended"]}) for library in libraries}
        return facts

    return all_facts


def _answer_to(answers: dict[str, Facts], name: str, child: "subprocess.Popen[bytes]") -> None:
    answers[name] = _answer(child)


def _answer(child: "subprocess.Popen[bytes]", limit: float = LIMIT) -> Facts:
    """What a probe printed, and under `ended` how it came to its end."""
    try:
        out, err = child.communicate(timeout=limit)
        ended = f"its process ended with {_named(child.returncode)}: {_last_line(err)}"
    except subprocess.TimeoutExpired:
        child.kill()
        out, _ = child.communicate()
        ended = f"no answer within {limit:g} s"
    facts: Facts = {"ended": ended}
    for line in out.splitlines():
        with suppress(orjson.JSONDecodeError):
            facts |= orjson.loads(line)
    return facts


def _named(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _last_line(text: bytes) -> str:
    lines = [line for line in text.decode(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else "without a word"


def _torch() -> Facts:
    import torch

    facts: Facts = {"version": torch.__version__, "cuda": torch.version.cuda, "arch": torch.cuda.get_arch_list()}
    try:
        torch.cuda.init()
        facts["gpus"] = torch.cuda.device_count()
    except Exception as error:
        facts |= {"gpus": 0, "says": first_line(error)}
    return facts


def _axolotl() -> Facts:
    import axolotl.train  # noqa: F401 what a training imports

    return {}


# The levels of NF4 (arXiv 2305.14314, appendix E).
_LEVELS = [
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634),
    *(0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
]


def _bitsandbytes() -> Facts:
    """How far off are a weight in NF4, by the definition of the format, and products with it for one row and for
    several, which are different kernels on a GPU; shares of the largest value."""
    import torch
    from bitsandbytes import __version__, cextension, functional, matmul_4bit

    facts: Facts = {"version": __version__}
    if "Error" in type(cextension.lib).__name__:  # computes all the same on a CPU, slowly
        return facts | {"no_library": _reason(cextension)}
    facts["for_cuda"] = bool(cextension.lib.compiled_with_cuda)
    gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.float16) if gpu else ("cpu", torch.float32)
    random = torch.Generator().manual_seed(0)
    codes = torch.randint(16, (256, 8, 64), generator=random)
    codes[..., 0] = 15  # the level 1: a block's largest value is its constant
    constants = 0.5 + torch.rand(256, 8, 1, generator=random)
    exact = (torch.tensor(_LEVELS)[codes] * constants).view(256, 512)
    off = 0.02 * (torch.rand(codes.shape, generator=random) - 0.5)  # levels are at least 0.08 apart
    off[(codes == 0) | (codes == 15)] = 0
    weight = exact + (off * constants).view(256, 512)
    packed, state = functional.quantize_4bit(weight.to(device, dtype), blocksize=64, quant_type="nf4")
    facts |= {"device": device, "nf4_off": _off(functional.dequantize_4bit(packed, state), exact)}
    rows = torch.randn(8, 512, generator=random).to(dtype)
    for count in (1, 8):
        product = matmul_4bit(rows[:count].to(device), packed.t(), quant_state=state)
        facts[f"product_off_{count}"] = _off(product, rows[:count].float() @ exact.T)
    return facts


def _reason(cextension: Any) -> str:
    """Why bitsandbytes' own library is not loaded."""
    try:
        cextension.get_native_library()
    except Exception as error:
        return first_line(error)
    return "it is loaded only now"


def _off(found: Any, expected: Any) -> float:
    """The largest difference, as a share of the largest value; one that is not a number counts as infinite."""
    share = ((found.float().cpu() - expected).abs().max() / expected.abs().max()).item()
    return float(share) if share == share else float("inf")


# bitsandbytes takes torch along, which is imported once for both
_PROBES: dict[str, dict[str, Callable[[], Facts]]] = {
    "libraries": {"torch": _torch, "bitsandbytes": _bitsandbytes},
    "axolotl": {"axolotl": _axolotl},
}


def _ask(probe: str) -> None:
    """Print the facts of a probe's libraries on stdout, and what these print on stderr."""
    out = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    for library, ask in _PROBES[probe].items():
        try:
            facts = ask()
        except BaseException as error:  # libraries raise anything, and exit
            facts = {"error": first_line(error)}
        out.write(orjson.dumps({library: facts}) + b"\n")


if __name__ == "__main__":
    _ask(sys.argv[1])
