"""vLLM as an engine: a server for one evaluation, in a separate environment."""

import asyncio
import json
import os
import secrets
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ..base import paths
from ..base.errors import UserError, WorkFailed
from ..base.files import JsonObject, embedding_rows, naming, opened, read_json
from ..base.processes import start_child
from ..base.run_files import RunFile
from ..base.terminal import Bar
from .scores_file import ADAPTER
from .settings import EvaluationSettings

if TYPE_CHECKING:
    from .prompter import Prompter  # imports torch and Axolotl, which `require` does not need
    from .server import Api, Server

ENVIRONMENT = paths.LOCK.with_name(".vllm")  # `make vllm` installs vLLM there
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # values of --max-lora-rank
AT_ONCE = 128  # number of simultaneous requests; vLLM decides how many run together
TIMEOUT = 1800  # seconds for the start: vLLM reads a large model from disk, and compiles it on a GPU
PRIVATE = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_LOGGING_COLOR": "0"}
"""Environment variables for vLLM: no usage statistics, plain log."""
ON_CPU = {
    "VLLM_CPU_KVCACHE_SPACE": "4",  # GiB of keys and values
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0))),
}
_NOT_SERVED = ("use_dora", "modules_to_save", "trainable_token_indices", "lora_bias")
_PLAIN = (True, False, "gaussian", "eva", "orthogonal", "mica", "lora_ga")


def require(settings: EvaluationSettings, on_gpu: bool) -> None:
    """Raise UserError if vLLM cannot run here or cannot serve the adapter.

    Args:
        settings: settings with the adapter.
        on_gpu: True for an evaluation on a GPU.

    Raises:
        UserError: vLLM is not installed, is installed for another kind of machine, or cannot serve the adapter.
    """
    if not list(ENVIRONMENT.glob(".*.lock")):  # which `make vllm` writes last
        raise UserError(
            f"--engine vllm: vLLM is not installed in {ENVIRONMENT}; run `make vllm` in a checkout of this project, or "
            "start a vLLM server yourself, and name its URL with --engine"
        )
    if on_gpu == for_cpu():
        raise UserError(
            f"--engine vllm: {ENVIRONMENT} has vLLM for another kind of processor; run `make vllm "
            f"VLLM_LOCK={_lock(on_gpu)}`"
        )
    if settings.adapter_sha256:
        obstacle = _obstacle(Path(settings.adapter))
        if obstacle:
            raise UserError(f"--engine vllm: cannot serve {settings.adapter}, {obstacle}; leave --engine out")


def _lock(on_gpu: bool) -> str:
    return f"requirements-vllm{'' if on_gpu else '-cpu'}.lock"


def for_cpu() -> bool:
    """True if the installed vLLM is the build for CPUs."""
    return (ENVIRONMENT / f".{_lock(on_gpu=False)}").exists()


def _obstacle(adapter: Path) -> str | None:
    """Reason why vLLM cannot serve an adapter; None if it can."""
    config = read_json(adapter / RunFile.ADAPTER_CONFIG)
    for key in _NOT_SERVED:
        if config.get(key):
            return f"whose {RunFile.ADAPTER_CONFIG} has {key}"
    if embedding_rows(adapter / ADAPTER):
        return "which holds an embedding for added tokens"
    if config.get("peft_type") != "LORA":
        return "which is not a LoRA adapter"
    if config.get("bias", "none") != "none":
        return "which has biases"
    if config.get("init_lora_weights", True) not in _PLAIN:
        return "which changes the base model's weights"
    if not 1 <= _rank(config) <= RANKS[-1]:
        return f"of rank {config.get('r')}"
    return None


def _rank(config: JsonObject) -> int:
    """Highest rank in an adapter's config; 0 without a rank."""
    return max([config.get("r") or 0, *(config.get("rank_pattern") or {}).values()])


@contextmanager
def running_server(prompter: "Prompter", prompts: Sequence[list[int]], part: Path) -> Iterator["Server"]:
    """Start vLLM with a run's base model and adapter, for a `with` block.

    Args:
        prompter: prompter of the run.
        prompts: all prompts.
        part: file of the predictions; vllm.log is written beside it.

    Raises:
        UserError: training added tokens that the base model lacks.
        WorkFailed: vLLM does not start.
    """
    from .server import Api, Server
    from .transformers_engine import weights_folder

    settings = prompter.settings
    if len(prompter.tokenizer) > prompter.config.get_text_config().vocab_size:
        raise UserError("--engine vllm: cannot serve a base model with tokens added in training; leave --engine out")
    longest = max(map(len, prompts)) + settings.decoding.max_new_tokens
    key, log = secrets.token_hex(16), part.with_name(RunFile.SERVER_LOG)
    environment = os.environ | PRIVATE | {"VLLM_API_KEY": key}
    if for_cpu():
        environment |= ON_CPU
    model = str(weights_folder(prompter)) if settings.quantized else settings.base_model
    port = _free_port()
    with naming(log), opened(log, "wb") as stream:
        command = _command(prompter, model, longest, port)
        server = start_child(command, env=environment, stdout=stream, stderr=subprocess.STDOUT)
    try:
        api = Api(f"http://127.0.0.1:{port}/v1/", key, timeout=None)
        with Bar("starting vLLM"):
            asyncio.run(_wait(api, server))
        name = "adapter" if settings.adapter_sha256 else "base"
        yield Server(prompter, api, name, settings.batch_size or AT_ONCE)
    except WorkFailed as error:
        ended = "" if server.poll() is None else f"; vLLM has ended with code {server.returncode}"
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise WorkFailed(f"{tail}\n{error}{ended}; complete log: {log}") from error
    finally:
        _end(server)


def _command(prompter: "Prompter", model: str, longest: int, port: int) -> list[str]:
    """Command of a server for the models `base` and, if there is an adapter, `adapter`."""
    settings = prompter.settings
    options = {
        "--host": "127.0.0.1",
        "--port": str(port),
        "--model": model,
        "--tokenizer": str(prompter.tokenizer.name_or_path),
        "--served-model-name": "base",
        "--dtype": settings.dtype,
        "--seed": str(settings.decoding.seed),
        "--max-model-len": str(longest),
        "--generation-config": "vllm",  # the model's generation config would change the decoding
    }
    words = [str(ENVIRONMENT / "bin" / "python"), "-m", "vllm.entrypoints.openai.api_server"]
    words.append("--disable-uvicorn-access-log")
    for option, value in options.items():
        words += [option, value]
    if model == settings.base_model:
        words += ["--revision", prompter.revision]
        if overrides := settings.built_with.get("overrides_of_model_config"):
            words += ["--hf-overrides", json.dumps(overrides)]
    if for_cpu():
        words.append("--enforce-eager")  # compilation takes longer than it saves
    else:  # limit vLLM to free memory, because this process uses the GPU too
        import torch

        free, total = torch.cuda.mem_get_info()
        words += ["--gpu-memory-utilization", f"{0.95 * free / total:.3f}"]
    if settings.adapter_sha256:
        rank = _rank(read_json(Path(settings.adapter) / RunFile.ADAPTER_CONFIG))
        room = next(room for room in RANKS if room >= rank)
        words += ["--enable-lora", "--max-lora-rank", str(room), "--lora-modules", f"adapter={settings.adapter}"]
    return words


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def _wait(api: "Api", server: "subprocess.Popen[bytes]") -> None:
    """Wait until the server lists its models, which means that it is ready.

    Another server may have taken the port. vLLM then ends.
    """
    import openai

    deadline = time.monotonic() + TIMEOUT
    while server.poll() is None and time.monotonic() < deadline:
        with suppress(openai.APIError, ValueError, TimeoutError):
            if "base" in {model.id for model in await api.models()}:
                return
        await asyncio.sleep(0.5)
    raise WorkFailed(f"vLLM ended, or was not ready within {TIMEOUT} s")


def _end(server: "subprocess.Popen[bytes]") -> None:
    """Stop a server and its processes."""
    server.terminate()
    try:
        with suppress(subprocess.TimeoutExpired):
            server.wait(10)
    finally:  # even if the wait is interrupted
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()
