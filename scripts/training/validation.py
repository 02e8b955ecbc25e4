"""Axolotl's own validation, in one child process for all configs of a command; configs that pass are cached.

The child process runs this module too. Axolotl's schema takes 2 s of processor time to import, and Axolotl with its
plugins 6 s.
"""

import copy
import logging
import os
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from logging.handlers import BufferingHandler
from pathlib import Path
from subprocess import PIPE
from tempfile import NamedTemporaryFile
from types import ModuleType
from typing import Any
from unittest.mock import patch

import orjson
from pydantic import ValidationError

from ..base import paths
from ..base.errors import UserError, with_type
from ..base.files import Row, digest, read_json, write_json
from ..base.hub import importing_axolotl
from ..base.processes import package_version, start_child
from ..base.yamlfiles import Config
from ..config import gpus
from ..config.compose import Composed
from ..config.finding import Finding, Level
from ..config.gpus import ANY_GPU, Gpu, deepspeed_of

VERSION = 2
"""Version of the cached findings; raise it when this module changes."""
NOT_VALIDATED = "not-validated"
_STUBBED = ("axolotl.integrations", "axolotl.integrations.mixlora")
"""Packages that the schema names for a table of constants; they would import all plugins' libraries."""


def validate(configs: Sequence[Composed], gpu: Gpu | None) -> list[list[Finding]]:
    """Findings of Axolotl's own validation for each config; rehearsals ignore the GPU."""
    if gpu is None or any(composed.rehearsal for composed in configs):
        gpu = ANY_GPU
    files = [_cache_file(composed.config, gpu) for composed in configs]
    by_file = {}
    missing = {}
    for file, composed in zip(files, configs, strict=True):
        rows = read_json(file).get("findings")
        if rows is None:
            missing[file] = composed.config
        else:
            by_file[file] = rows
    if missing:
        answers = _ask_child(list(missing.values()), gpu)
        for file, rows in zip(missing, answers, strict=True):
            _keep(file, rows)
            by_file[file] = rows
    return [[Finding(**row) for row in by_file[file]] for file in files]


def _keep(file: Path, rows: list[Row]) -> None:
    """Cache findings, unless there are errors, because installing a package can correct them."""
    if all(row["rule"] == "axolotl-warning" for row in rows):
        with suppress(OSError):
            write_json(file, {"findings": rows})


def _cache_file(config: Config, gpu: Gpu) -> Path:
    """Cache file, keyed by config, GPUs and package versions."""
    packages = [package_version(name) for name in ("axolotl", "torch", "transformers")]
    depends = [VERSION, packages, str(gpu), str(gpus.here()), config, deepspeed_of(config)]
    return paths.cache() / "validated" / f"{digest(depends)[:24]}.json"


def _ask_child(configs: Sequence[Config], gpu: Gpu) -> list[list[Row]]:
    """Findings for each config from a new process; if that fails, the last line of its error."""
    with NamedTemporaryFile() as request:
        request.write(orjson.dumps([gpu.name, gpu.capability, configs]))
        request.flush()
        command = [sys.executable, "-m", __name__, request.name]
        with start_child(command, stdout=PIPE, stderr=PIPE) as child:
            output, log = child.communicate()
    if child.returncode == 0:
        answer: list[list[Row]] = orjson.loads(output)
        return answer
    reason = log.decode(errors="replace").strip().rpartition("\n")[2] or f"exit code {child.returncode}"
    problem = f"not validated, because Axolotl does not run here: {reason}"
    finding = Finding("warning", NOT_VALIDATED, "", problem, "run `recipe doctor`", rule_scope="machine")
    return [[asdict(finding)]] * len(configs)


def capabilities(gpu: Gpu = ANY_GPU) -> tuple[dict[str, Any], dict[str, Any]]:
    """Capabilities of a GPU and of torch, in the format of `axolotl.cli.config.gpu_capabilities`."""
    gpu_facts = {
        "bf16": True,  # on every GPU, because torch emulates bf16 on older GPUs
        "fp8": gpu.capability >= (9, 0),
        "tf32": gpu.capability >= (8, 0),
        "n_gpu": 1,
        "n_node": 1,
        "compute_capability": gpu.sm,
    }
    return gpu_facts, {"torch_version": version("torch").partition("+")[0]}


def validated(content: Config, gpu: Gpu = ANY_GPU) -> Any:
    """Validate a config with Axolotl for a GPU; return Axolotl's config. Can raise any exception."""
    from axolotl.integrations.base import PluginManager
    from axolotl.utils.config import prepare_plugins, validate_config
    from axolotl.utils.dict import DictDefault

    PluginManager._instance = None  # drop the plugins of the previous config
    cfg = DictDefault(content)
    prepare_plugins(cfg)
    return validate_config(cfg, *capabilities(gpu))


def by_schema(content: Config, gpu: Gpu) -> None:
    """Validate a config as `validated` does, without plugins. Can raise any exception."""
    from axolotl.utils.schemas.config import AxolotlConfigWCapabilities
    from axolotl.utils.schemas.datasets import SFTDataset

    gpu_facts, torch_facts = capabilities(gpu)
    copied = copy.deepcopy(content)  # the schema changes it
    if content.get("datasets"):
        copied["datasets"] = [SFTDataset(**entry) for entry in copied["datasets"]]
    AxolotlConfigWCapabilities(**copied, capabilities=gpu_facts, env_capabilities=torch_facts)


def exceeds_schema(content: Config) -> bool:
    """True if Axolotl's schema alone does not validate a config.

    The config's plugins, and those for context and expert parallelism, which are always active, add keys and checks.
    `rl` needs classes of data sets other than the schema's first.
    """
    return bool(content.get("plugins") or content.get("rl")) or any("_parallel" in key for key in content)


def import_schema() -> None:
    """Import Axolotl's schema without the libraries of plugins."""
    import axolotl

    for name in _STUBBED:
        sys.modules[name] = ModuleType(name)
        parts = name.split(".")[1:]
        sys.modules[name].__path__ = [str(Path(folder, *parts)) for folder in axolotl.__path__]
    import axolotl.utils.schemas.config

    for name in _STUBBED:
        del sys.modules[name]


def findings(content: Config, gpu: Gpu) -> list[Finding]:
    """Errors and logged warnings of Axolotl's validation, each with the key that it names."""
    from axolotl.utils.logging import MultiProcessAdapter

    MultiProcessAdapter.warning_once.cache_clear()  # another config may have had the same warning
    handler = BufferingHandler(sys.maxsize)
    disabled = logging.root.manager.disable
    logging.disable(logging.INFO)
    with patch.multiple(logging.getLogger("axolotl"), handlers=[handler], propagate=False):
        errors = _errors(content, gpu)
    logging.disable(disabled)
    return errors + [_warning(record.getMessage(), content) for record in handler.buffer]


def _errors(content: Config, gpu: Gpu) -> list[Finding]:
    """Errors of Axolotl's validation."""
    try:
        if exceeds_schema(content):
            validated(content, gpu)
        else:
            by_schema(content, gpu)
    except ValidationError as error:
        return _pydantic_errors(error, content)
    except Exception as error:
        text = with_type(error)
        return [Finding("error", "axolotl", _named_key(text, content), text, rule_scope="step")]
    return []


def _pydantic_errors(error: ValidationError, content: Config) -> list[Finding]:
    """Errors from pydantic's places and messages."""
    mistakes = []
    for problem in error.errors():
        text = problem["msg"].removeprefix("Value error, ")  # another program's text
        key = str(problem["loc"][0]) if problem["loc"] else ""  # deeper levels include pydantic's class names
        if error.title == "SFTDataset":
            key = "datasets"
        key = key or _named_key(text, content)
        mistakes.append(Finding("error", "axolotl", key, text, rule_scope="step"))
    return mistakes


def _warning(text: str, content: Config) -> Finding:
    """Warning from Axolotl's log; a note if the recipe of a study can be right."""
    level: Level = "warning"
    if text.startswith("eval_batch_size != micro_batch_size"):  # another program's text
        level = "note"
    return Finding(level, "axolotl-warning", _named_key(text, content), text)


def _named_key(text: str, content: Config) -> str:
    """First key of a config that a message of pydantic or Axolotl names, or an empty text."""
    words = re.findall(r"\w+", text)  # another program's text
    words.sort(key=lambda word: "_" not in word)  # a word with an underscore can only be a key
    return next((word for word in words if word in content), "")


def main(request: Path) -> None:
    """Validate the configs of a request for a GPU; print their findings as JSON, in the same order."""
    name, capability, configs = orjson.loads(request.read_bytes())
    gpu = Gpu(name, tuple(capability))
    # configs with plugins come last, because a plugin could change the validation of others
    order = sorted(range(len(configs)), key=lambda index: exceeds_schema(configs[index]))
    with importing_axolotl():
        import_schema()
        by_index = {index: findings(configs[index], gpu) for index in order}
    sys.stdout.buffer.write(orjson.dumps([by_index[index] for index in range(len(configs))]))


@dataclass(frozen=True)
class GgufTools:
    """Types of GGUF files, and the folder of llama.cpp that makes them.

    Attributes:
        types: the types besides f16, as llama.cpp names them.
    """

    types: list[str]
    llama_cpp: Path

    @classmethod
    def find(cls, types: str) -> "GgufTools":
        """Find llama.cpp's programs, as `axolotl export` does, but not through a config.

        Args:
            types: the types, separated by commas.

        Raises:
            UserError: a type is unknown, or a program is missing.
        """
        from axolotl.utils import gguf
        from axolotl.utils.schemas.export import ExportConfig

        if not os.environ.get("LLAMA_CPP_DIR"):  # Axolotl's message names a key that exports ignore
            remedy = "set it to a checkout of llama.cpp, as in docs/laptop.md"
            raise UserError("LLAMA_CPP_DIR is not set", key="--gguf", remedy=remedy)
        try:
            names = ExportConfig.validate_quant_types(types)
            llama_cpp = gguf.resolve_llama_cpp()
            gguf.resolve_quantize_bin(llama_cpp)
        except ValueError as error:
            raise UserError(str(error).rstrip("."), key="--gguf", remedy="docs/laptop.md has the steps") from None
        return cls([name for name in names if name != "F16"], llama_cpp.resolve())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
