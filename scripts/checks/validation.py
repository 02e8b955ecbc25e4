"""Axolotl's own validation, in one child process for all configs of a command; configs that pass are cached."""

import hashlib
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from subprocess import PIPE
from tempfile import NamedTemporaryFile

import orjson

from ..base import paths
from ..base.files import Row, read_json, write_json
from ..base.machine import package_version, start_child
from ..base.yamlfiles import Config
from ..configs import gpus
from ..configs.compose import Composed
from ..configs.gpus import ANY_GPU, Gpu, deepspeed_of
from .check import Report, placed
from .finding import Finding, remaining_errors

VERSION = 1
"""Version of the cached findings; raise it when the validator changes."""


def add_to(reports: Iterable[Report], gpu: Gpu | None, force: Sequence[str] = ()) -> None:
    """Add the findings of Axolotl's own validation to reports.

    Args:
        reports: the reports of configs for the same GPU.
        gpu: the GPU; rehearsals ignore it.
        force: the names of findings to override.
    """
    ready: list[tuple[Report, Composed, set[str]]] = []
    for report in reports:
        if not report.composed:
            continue
        errors = remaining_errors(report.findings, force)
        if any(error.scope == "code" for error in errors):
            report.skip("skipped Axolotl's own validation, because it can run that code; correct the errors first")
        else:
            ready.append((report, report.composed, {error.key.partition(".")[0] for error in errors} - {""}))
    results = validate([composed for _, composed, _ in ready], gpu)
    for (report, composed, wrong), findings in zip(ready, results, strict=True):
        report.validated = all(finding.rule != "not-validated" for finding in findings)
        # the rules have better messages for the same mistake
        report.add(placed((finding for finding in findings if finding.key not in wrong), composed))


def validate(composed: Sequence[Composed], gpu: Gpu | None) -> list[list[Finding]]:
    """Findings of Axolotl's own validation for each config; `gpu` as in `add_to`."""
    if not gpu or any(each.rehearsal for each in composed):
        gpu = ANY_GPU
    files = [_cache_file(each.config, gpu) for each in composed]
    results = [read_json(file).get("findings") for file in files]
    new = [index for index, found in enumerate(results) if found is None]
    if new:
        answer = _ask_child([composed[index].config for index in new], gpu)
        for index, found in zip(new, answer, strict=True):
            results[index] = found
            # errors are not cached, because installing a package can correct them
            if all(finding["rule"] == "axolotl-warning" for finding in found):
                with suppress(OSError):
                    write_json(files[index], {"findings": found})
    return [[Finding(**finding) for finding in found or ()] for found in results]


def _cache_file(config: Config, gpu: Gpu) -> Path:
    """Cache file, keyed by config, GPUs and package versions."""
    packages = [package_version(name) for name in ("axolotl", "torch", "transformers")]
    depends = [VERSION, packages, str(gpu), str(gpus.here()), config, deepspeed_of(config)]
    content = orjson.dumps(depends, option=orjson.OPT_SORT_KEYS)
    return paths.cache() / "validated" / f"{hashlib.sha256(content).hexdigest()[:24]}.json"


def _ask_child(configs: Sequence[Config], gpu: Gpu) -> list[list[Row]]:
    """Findings for each config from a new process; if that fails, the last line of its error."""
    with NamedTemporaryFile() as request:
        request.write(orjson.dumps([gpu.name, gpu.capability, configs]))
        request.flush()
        command = [sys.executable, "-m", "qlora_recipes.checks.validator", request.name]
        with start_child(command, stdout=PIPE, stderr=PIPE) as child:
            output, log = child.communicate()
    if child.returncode == 0:
        answer: list[list[Row]] = orjson.loads(output)
        return answer
    reason = log.decode(errors="replace").strip().rpartition("\n")[2] or f"exit code {child.returncode}"
    problem = f"not validated, because Axolotl does not run here: {reason}"
    return [[asdict(Finding("warning", "not-validated", "", problem, "run `recipe doctor`"))]] * len(configs)
