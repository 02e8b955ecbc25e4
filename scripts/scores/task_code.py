"""Code in task files that are not part of lm-evaluation-harness."""

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ..base import paths
from ..base.errors import UserError
from ..checks.code_rules import READ_IT, is_listed, leaves
from ..checks.finding import TASK_CODE, Finding
from ..configs import datafiles

_PLAIN = """
    aggregate_metric_list.* dataset_kwargs.data_dir dataset_kwargs.data_files* dataset_kwargs.revision
    dataset_kwargs.split dataset_name description doc_to_choice* doc_to_decontamination_query doc_to_target doc_to_text
    fewshot_config.* fewshot_delimiter fewshot_split filter_list.* gen_prefix group group_alias metadata* num_fewshot
    output_type repeats should_decontaminate tag target_delimiter task task_alias test_split training_split
    validation_split

    generation_kwargs.do_sample generation_kwargs.length_penalty generation_kwargs.max_gen_toks
    generation_kwargs.max_length generation_kwargs.max_new_tokens generation_kwargs.num_beams
    generation_kwargs.repetition_penalty generation_kwargs.temperature generation_kwargs.top_k generation_kwargs.top_p
    generation_kwargs.until

    metric_list.aggregation metric_list.higher_is_better metric_list.ignore_case metric_list.ignore_numbers
    metric_list.ignore_punctuation metric_list.regexes_to_ignore
"""
"""Keys of task files that run no code; see `code_rules`."""
_PATTERNS = {
    "dataset_path": rf"{'|'.join(datafiles.FORMATS)}|\w[\w.-]*/\w[\w.-]*",
    "metric_list.metric": "acc|acc_all|acc_bytes|acc_mutual_info|acc_norm|bits_per_byte|bleu|brier_score|bypass|chrf"
    "|byte_perplexity|exact_match|f1|likelihood|mcc|perplexity|ter|word_perplexity",  # it loads others as scripts
}


@cache
def secure_harness() -> None:
    """Have the harness read task files as plain YAML, and render their templates in a sandbox.

    By itself, it creates any Python object that a file names, even in files that it only lists, and its templates can
    call any function of Python.
    """
    import yaml
    from jinja2 import BaseLoader, StrictUndefined
    from jinja2.sandbox import SandboxedEnvironment
    from lm_eval import utils

    class Loader(yaml.CSafeLoader):
        """Loader to which the harness adds its constructor of functions."""

    utils.yaml = SimpleNamespace(**vars(yaml) | {"CLoader": Loader, "FullLoader": Loader})
    sandbox = SandboxedEnvironment(loader=BaseLoader(), undefined=StrictUndefined, keep_trailing_newline=True)
    sandbox.filters |= utils.env.filters
    utils.env = sandbox


def members(tasks: list[Any]) -> Iterator[str]:
    """Names of a group's tasks, also of those in groups inside it."""
    for member in tasks:
        task = member.get("task") if isinstance(member, dict) else member
        if isinstance(task, list):
            yield from members(task)
        elif isinstance(task, str):
            yield task


def refuse(column: str, file: str | Path, task: Mapping[str, Any], force: Sequence[str]) -> None:
    """Refuse a task file outside the harness that can run code, unless the user overrides the finding.

    Args:
        column: the benchmark's column.
        file: the task file.
        task: its content, read without importing what it names.
        force: names of findings to override.

    Raises:
        UserError: the file can run code.
    """
    from lm_eval import tasks

    if Path(file).resolve().is_relative_to(Path(tasks.__file__).parent):
        return
    for key, value in leaves(task):
        name = re.sub(r"^(task\.\d+\.)+", "", key)  # a group's own version of a task
        is_plain = isinstance(value, str | int | float | None)
        if not (is_plain and is_listed(name, value, _PLAIN, _PATTERNS)):
            shown = value if is_plain else f"!function {getattr(value, 'value', value)}"
            problem = f"may run foreign code: {key}: {shown} is not on the list of what is harmless"
            finding = Finding("error", TASK_CODE, column, problem, READ_IT, paths.shown(Path(file)))
            if finding.name not in force:
                raise UserError(str(finding))
