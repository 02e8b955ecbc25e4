"""Write the model card of a run."""

import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ..base import paths, tables, yamlfiles
from ..base.errors import UserError
from ..base.files import Row, embedding_rows, read_json, sha256
from ..base.hub import importing_axolotl
from ..base.paths import template_environment
from ..base.secrets import names_secret, without_secrets
from ..config import datafiles, merging, models
from ..data import studies
from ..data.raw_rows import constants
from ..evaluate.scores_file import ADAPTER, Evaluation, EvaluationSettings
from ..metrics.metric import Column
from ..run.rundir import PLUGIN, RunDir
from ..training.run_record import Run
from .run_result import RunResult

# Licences of language models in https://huggingface.co/docs/hub/repositories-licenses
_HUB_LICENCES = ("apache-2.0", "mit", "llama2", "llama3", "llama3.1", "llama3.2", "llama3.3", "llama4", "gemma")
# Keys that hold local folders, or accounts and hosts to which a run reports
_NOT_SHOWN = re.compile(f"output_dir|dataset_prepared_path|plugins|hub_|{merging.TRACKING.pattern}")
_PATCH = "@@ -1 +1 @@\n-x = 1\n+x = 2"
_LOCAL_PATH = re.compile(r"(?<![\w.<>/~-])(?:\.\.(?:/[^\s/=,:'\")\]}]+)+|(?:file://)?(?:/[^\s/=,:'\")\]}]+){2,})")


def card(result: RunResult, evaluation: Evaluation | None, merged: bool, repository: str | None) -> str:
    """Text of a model card, without names of machines, users and local folders.

    Args:
        result: the run.
        evaluation: evaluation of the run's adapter.
        merged: True for the card of the merged model.
        repository: repository on the hub, if the card will be pushed.
    """
    folder, of_study = result.folder, studies.study_of(result.run.origin)
    data = None if of_study is None or result.other_data else of_study.data
    with importing_axolotl(offline=True):
        from ..evaluate.prompter import as_code

        # the rows of a rehearsal are made like the study's
        declared = of_study.data if of_study and (data or result.run.rehearsal) else None
        known = {**constants(declared.fields), "input": _PATCH} if declared else {}
        prompt = as_code(folder.config, folder.output, known)
    facts = _facts(result, evaluation)
    scored_on = _scored_on(evaluation.settings, of_study) if evaluation else None
    tags = of_study.tags if of_study and data else []
    return _template().render(
        **facts,
        front_matter=_front_matter(facts, evaluation.columns if evaluation else {}, scored_on, merged, tags),
        command=_command(facts["run"]),
        chat=datafiles.chat_options(facts["config"]),
        merged=merged,
        repository=repository or ".",
        study=of_study,
        data=data,
        other_model=result.other_model,
        prompt=prompt,
        columns=evaluation.columns if evaluation else {},
        published={name: str(score) for name, score in (result.aim.scores if result.aim else {}).items()},
        of_base={name: score.base_model for name, score in result.scores.items() if score.base_model is not None},
        embedding_rows=embedding_rows(folder.output / ADAPTER),
        config_sha256=sha256(folder.config_file),
        adapter_sha256=sha256(folder.output / ADAPTER),
        scored_on=scored_on,
        decoding=_arguments(evaluation.settings.decoding if evaluation else studies.decoding_of(of_study, None)),
    )


def _facts(result: RunResult, evaluation: Evaluation | None) -> Row:
    """Public parts of a run's record, config, evaluation and base model."""
    run, cfg = result.run, result.config
    base, is_local = base_model(result.folder, run)
    entries = models.catalogue().items()
    about: yamlfiles.Config = next((entry for name, entry in entries if base in (name, entry.get("mirror"))), {})
    shown = {key: value for key, value in cfg.items() if not is_private(key)}
    if plugins := [name for name in cfg.get("plugins") or [] if name != PLUGIN]:
        shown["plugins"] = plugins
    differences = [difference for difference in run.differences if not is_private(difference.key)]
    overrides = [override for override in run.overrides if not _sets_private(override)]
    public_run = run.model_copy(update={"differences": differences, "overrides": overrides})
    facts = {
        "run": public_run.model_dump(exclude={"of_variant"}),
        "evaluation": evaluation.model_dump() if evaluation else None,
        "base": {"name": base, "local": is_local, "title": about.get("title", base)},
        "licence": about.get("licence"),
        "config": shown,
    }
    return _without_folders(without_secrets(facts), Path(run.cwd))


def _template() -> Any:
    jinja = template_environment(paths.TEMPLATES)
    jinja.filters |= {
        "address": _address,
        "code": _code,
        "fenced": _fenced,
        "prose": _prose,
        "text": tables.text_of,
        "yaml": yamlfiles.write_yaml,
    }
    return jinja.get_template("model-card.md.j2")


def is_private(key: str) -> bool:
    """True if a dotted key holds a secret, a local folder, an account or a host."""
    return bool(_NOT_SHOWN.match(key)) or names_secret(key)


def _sets_private(override: str) -> bool:
    """True if `key=value` sets a private key, possibly a nested one."""
    try:
        key, value = merging.parse_override(override)
    except UserError:
        key, value = override.partition("=")[0], None
    return any(is_private(below) for below, _ in merging.flatten(value, key))


def _arguments(decoding: studies.Decoding) -> str:
    """Decoding settings as arguments for transformers' `generate`."""
    sampling = ("temperature", "top_p", "top_k") if decoding.do_sample else ()
    names = ("max_new_tokens", "do_sample", *(("num_beams",) if decoding.num_beams > 1 else ()), *sampling)
    return ", ".join(f"{name}={getattr(decoding, name)!r}" for name in names)


def base_model(folder: RunDir, run: Run) -> tuple[str, bool]:
    """Return the name of the adapter's base model, and whether it is a local folder."""
    named = read_json(folder.output / "adapter_config.json").get("base_model_name_or_path")
    name = str(named or folder.config.get("base_model"))
    return name, Path(name).is_absolute() or Path(run.cwd, name).is_dir()


def _front_matter(
    facts: Row, columns: Mapping[str, Column], scored_on: str | None, merged: bool, tags: list[str]
) -> str:
    """Metadata of a card as YAML; only models and datasets on the hub are named."""
    from huggingface_hub import EvalResult, ModelCardData

    run, base, licence = (facts[key] for key in ("run", "base", "licence"))
    other_licence = None if licence in _HUB_LICENCES else licence
    named = [str(dataset.get("path")) for _, dataset in datafiles.datasets(facts["config"], "datasets")]
    local = [file["path"] for file in run["data"]]
    on_hub = [n for n in named if re.fullmatch(r"[\w.-]+/[\w.-]+", n) and not any(p.startswith(n) for p in local)]
    scores = facts["evaluation"]["scores"] if facts["evaluation"] and not run["rehearsal"] else {}
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type="json",
            dataset_name=getattr(column.parameters, "task", "").rpartition("/")[2] or scored_on or "",
            metric_type=column.metric.hub_type,
            metric_name=column.title,
            metric_value=round(scores[name], 4),
        )
        for name, column in columns.items()
        if scores.get(name) is not None
    ]
    qlora = ["qlora"] if facts["config"].get("adapter") == "qlora" else []
    relation = "finetune" if merged else "adapter"  # on the hub, "merge" means a merge of several models
    return ModelCardData(
        base_model=None if base["local"] else base["name"],
        base_model_relation=None if base["local"] else relation,
        license="other" if other_licence else licence,
        license_name=other_licence,
        license_link=f"https://huggingface.co/{base['name']}" if other_licence else None,
        datasets=on_hub or None,
        model_name=run["recipe"] if results else None,
        eval_results=results or None,
        library_name="transformers" if merged else "peft",
        pipeline_tag="text-generation",
        tags=["axolotl", "lora", *qlora, *tags],
    ).to_yaml()


def _scored_on(settings: EvaluationSettings, of_study: studies.Study | None) -> str:
    """Description of the scored rows."""
    if not (settings.test_set and of_study):
        return f"{settings.data_name}, {settings.rows_in_words}"
    subset = of_study.data.subsets.get(settings.test_set)
    return f"{of_study.data.name}, {subset.title if subset else 'the test set'}, {settings.rows_in_words}"


def _command(run: Row) -> str:
    """Command that repeats a run."""
    words = ["recipe", "run", run["recipe"] if run["recipe"] in paths.recipe_names() else run["recipe_file"]]
    for option, key in (("--profile", "profiles"), ("--set", "overrides"), ("--force", "forced")):
        words += [word for value in run[key] for word in (option, value)]
    for option, key in (("--gpus", "gpus_used"), ("--nodes", "nodes")):
        words += [option, str(run[key])] if run[key] > 1 else []
    return shlex.join(words)


def _without_folders(value: Any, cwd: Path) -> Any:
    """Shorten local paths in a value.

    A path below `cwd` becomes relative. Any other path is cut to its last part.
    """
    if isinstance(value, dict):
        return {name: _without_folders(below, cwd) for name, below in value.items()}
    if isinstance(value, list):
        return [_without_folders(below, cwd) for below in value]
    if not isinstance(value, str):
        return value
    path = Path(value)
    if ".." in path.parts or (path.is_absolute() and len(path.parts) > 2):
        return str(path.relative_to(cwd)) if path.is_relative_to(cwd) else path.name
    return _LOCAL_PATH.sub(lambda found: _without_folders(found[0].removeprefix("file://"), cwd), value)


def _code(value: Any) -> str:
    """Value as one line of Markdown code; a dash for None."""
    if value is None:
        return "–"
    text = " ".join(value.split()) if isinstance(value, str) else ""
    text = text or json.dumps(value, ensure_ascii=False)
    ticks = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{ticks} {text} {ticks}" if "`" in text else f"`{text}`"


def _fenced(text: str, language: str) -> str:
    """Text as a Markdown code block; the fence is longer than any in the text."""
    fence = "`" * (1 + max(map(len, re.findall("``+", text)), default=2))
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def _prose(text: Any) -> str:
    """Text on one line, escaped for Markdown and HTML."""
    escaped = re.sub(r"([\\`*_\[\]<>|~&])", r"\\\1", " ".join(str(text).split()))
    # a backslash before what begins a heading, a list or a rule
    return re.sub(r"^(?=[#+=-])|^(\d+)(?=[.)](?: |$))", r"\1\\", escaped)


def _address(url: str) -> str:
    """HTTP address, quoted for a Markdown link; empty for any other scheme."""
    return quote(url, safe="%/:?#=&@+,;~") if re.match("https?://", url) else ""
