"""Write the model card of a run."""

import json
import re
import shlex
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from ..base import hub, paths, tables, yamlfiles
from ..base.files import Row, embedding_rows, read_json, sha256
from ..base.hub import importing_axolotl
from ..base.paths import template_environment
from ..base.run_files import RunFile
from ..base.secrets import names_secret, without_secrets
from ..base.yamlfiles import Config
from ..config import datafiles, keys, merging, models
from ..config.merging import Override
from ..data import studies
from ..data.declaration import Data
from ..data.raw_rows import constants
from ..data.studies import Study
from ..evaluate import evaluation_rows
from ..evaluate.scores_file import Evaluation
from ..metrics.metric import Column, LossMetric, ScoreRecord, ScoringInput
from ..run.rundir import PLUGIN, RunDir
from ..training.run_record import Run
from .run_result import RunResult

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

# Licences of language models in https://huggingface.co/docs/hub/repositories-licenses
_HUB_LICENCES = ("apache-2.0", "mit", "llama2", "llama3", "llama3.1", "llama3.2", "llama3.3", "llama4", "gemma")
# Data sets and tasks on the hub by task of lm-evaluation-harness, as in https://huggingface.co/docs/hub/eval-results
_HUB_BENCHMARKS = {
    "gsm8k": ("openai/gsm8k", "gsm8k"),
    "gsm8k_cot": ("openai/gsm8k", "gsm8k"),
    "mmlu_pro": ("TIGER-Lab/MMLU-Pro", "mmlu_pro"),
}
_PATCH = "@@ -1 +1 @@\n-x = 1\n+x = 2"
_LOCAL_PATH = re.compile(r"(?<![\w.<>/~-])(?:\.\.(?:/[^\s/=,:'\")\]}]+)+|(?:file://)?(?:/[^\s/=,:'\")\]}]+){2,})")


@dataclass(frozen=True)
class Base:
    """Base model of an adapter.

    Attributes:
        is_local: True if the name is that of a local folder.
    """

    name: str
    is_local: bool


@dataclass(frozen=True)
class Card:
    """Facts on a model card, without names of machines, users and local folders.

    Attributes:
        result: the run.
        merged: True for the card of the merged model.
        repository: repository on the hub, or the current folder.
    """

    result: RunResult
    merged: bool
    repository: str

    @property
    def evaluation(self) -> Evaluation | None:
        """Evaluation of the run's adapter."""
        return self.result.evaluation

    @cached_property
    def study(self) -> Study | None:
        return studies.study_of(self.result.run.origin)

    @cached_property
    def data(self) -> Data | None:
        """Data of the study, if the run used them; None for a rehearsal."""
        if self.study is None or self.result.run.rehearsal or self.result.other_data:
            return None
        return self.study.data

    @cached_property
    def run(self) -> Row:
        """Public part of run.json."""
        run = self.result.run
        overrides = [override.text for override in run.overrides if not _holds_private(override.key, override.value)]
        dumped = run.model_dump(exclude={"differences", "of_variant"})
        return self.public(dumped | {"overrides": overrides})

    @property
    def differences(self) -> list[Row]:
        """Differences from the recipe, except those of private keys."""
        rows = []
        for difference in self.result.run.differences:
            if not _holds_private(difference.key, difference.run):
                shown = difference.without_secrets()
                rows.append({"key": shown.key, "recipe": shown.recipe, "run": shown.run, "why": shown.source.text})
        return self.public(rows)

    @cached_property
    def config(self) -> Config:
        """Public part of the run's config."""
        keys = [key for key, _ in merging.flatten(self.result.config) if is_private(key)]
        config = merging.apply(self.result.config, map(Override, keys))
        plugins = [name for name in self.result.config.get("plugins") or [] if name != PLUGIN]
        if plugins:
            config["plugins"] = plugins
        return self.public(config)

    @cached_property
    def scored(self) -> Row | None:
        """Public part of scores.json."""
        if self.evaluation is None:
            return None
        return self.public(self.evaluation.model_dump() | {"scores": self.evaluation.flat()})

    @cached_property
    def base(self) -> Base:
        base = base_model(self.result.folder, self.result.run)
        return replace(base, name=self.public(base.name))

    @property
    def title(self) -> str:
        """Name of the base model."""
        return self._about_base.get("title", self.base.name)

    @property
    def licence(self) -> str | None:
        """Licence of the base model; None if it is unknown."""
        return self._about_base.get("licence")

    @cached_property
    def _about_base(self) -> Config:
        return models.entry_of(self.base.name)

    @cached_property
    def of_base(self) -> dict[str, float]:
        """Scores of the base model by metric."""
        return {name: score.base_model for name, score in self.result.scores.items() if score.base_model is not None}

    @property
    def scored_on(self) -> str:
        """Description of the scored rows of the evaluation."""
        assert self.evaluation
        settings = self.evaluation.settings
        if self.study is None or settings.test_set is None:
            return f"{settings.data_name}, {settings.rows_in_words}"
        data = self.study.data
        return f"{data.name}, {data.title_of(settings.test_set)}, {settings.rows_in_words}"

    @property
    def command(self) -> str:
        """Command that repeats the run."""
        run = self.run
        words = ["recipe", "run", run["recipe"] if run["recipe"] in paths.recipe_names() else run["recipe_file"]]
        for option, key in (("--profile", "profiles"), ("--set", "overrides"), ("--force", "forced")):
            for value in run[key]:
                words += [option, value]
        for option, key in (("--gpus", "gpus_used"), ("--nodes", "nodes")):
            if run[key] > 1:
                words += [option, str(run[key])]
        return shlex.join(words)

    @property
    def chat(self) -> str:
        """Options of `axolotl inference` for a chat."""
        return datafiles.chat_options(self.config)

    @cached_property
    def prompt(self) -> str | None:
        """Code that sets `inputs` to a prompt; None if that is not possible, see `tokens.as_code`."""
        fields = self.constant_fields
        if fields:
            fields = fields | {"input": _PATCH}
        with importing_axolotl(offline=True):
            from ..training.tokens import as_code

            return as_code(self.result.folder.config, self.result.folder.output, fields)

    @property
    def constant_fields(self) -> dict[str, str]:
        """Texts of the fields that are the same in all rows of the study's data; empty for other data."""
        if self.study is None:
            return {}
        if self.data or self.result.run.rehearsal:  # a rehearsal's rows are made like the study's
            return constants(self.study.data.fields)
        return {}

    @property
    def decoding(self) -> studies.Decoding:
        """Decoding of the evaluation, or else of the study."""
        if self.evaluation:
            return self.evaluation.settings.decoding
        return studies.decoding_of(self.study, None)

    @property
    def generate_arguments(self) -> str:
        """Decoding as arguments for transformers' `generate`."""
        return _arguments(self.decoding)

    @property
    def embedding_rows(self) -> int | None:
        """Rows of the adapter's embedding; None if the training added no tokens."""
        return embedding_rows(self.result.folder.adapter)

    @property
    def config_sha256(self) -> str:
        return sha256(self.result.folder.config_file)

    @property
    def adapter_sha256(self) -> str:
        return sha256(self.result.folder.adapter)

    @property
    def front_matter(self) -> str:
        """Metadata as YAML; only models and data sets on the hub are named."""
        from huggingface_hub import ModelCardData

        metadata = ModelCardData(library_name="peft", pipeline_tag="text-generation", tags=self._tags)
        if self.merged:
            metadata.library_name = "transformers"
        if not self.base.is_local:
            metadata.base_model = self.base.name
            # on the hub, "merge" means a merge of several models
            metadata["base_model_relation"] = "finetune" if self.merged else "adapter"
        metadata.license = self.licence
        if self.licence not in (None, *_HUB_LICENCES):
            metadata.license = "other"
            metadata.license_name = self.licence
            metadata.license_link = f"https://huggingface.co/{self.base.name}"
        metadata.datasets = self._hub_datasets or None
        metadata.eval_results = self._eval_results or None
        if metadata.eval_results:
            metadata.model_name = self.run["recipe"]
        return metadata.to_yaml()

    @property
    def _tags(self) -> list[str]:
        tags = ["axolotl", "lora"]
        if self.config.get("adapter") == "qlora":
            tags.append("qlora")
        if self.study and self.data:
            tags += self.study.tags
        return tags

    @property
    def _hub_datasets(self) -> list[str]:
        """Names of the data sets on the hub."""
        files = [file["path"] for file in self.run["data"]]
        names = []
        for dataset in datafiles.training_sets(self.config):
            name = dataset.path
            is_local = any(file.startswith(name) for file in files)
            if hub.NAME.fullmatch(name) and not is_local:
                names.append(name)
        return names

    @property
    def _eval_results(self) -> "list[EvalResult]":
        """Scores for the hub, except those in `.eval_results`; none for a rehearsal."""
        from huggingface_hub import EvalResult

        if self.run["rehearsal"]:
            return []
        results = []
        for column, score in self.scores.values():
            if score.value is None or hub_benchmark(score):
                continue
            dataset = self.dataset_of(column)
            result = EvalResult(
                task_type="text-generation",
                dataset_type=dataset,  # huggingface_hub joins results of one type, whatever their name
                dataset_name=dataset,
                metric_type=column.metric.hub_type,
                metric_name=column.title,
                metric_value=round(score.value, 4),
            )
            results.append(result)
        return results

    def dataset_of(self, column: Column) -> str:
        """Task of a benchmark, or description of the rows: those of the losses, or the scored ones."""
        if isinstance(column.metric, LossMetric):
            return self._evaluated_in_training
        return getattr(column.parameters, "task", "").rpartition("/")[2] or self.scored_on

    @cached_property
    def _evaluated_in_training(self) -> str:
        """Description of the rows of the eval losses and rewards, with the number of tokens or pairs."""
        result = self.result
        source = evaluation_rows.configured(result.config, Path(result.run.cwd))
        words = [self.public(source.data) if source else "rows of the training"]
        for unit, scored in (("tokens", result.summary.eval_tokens), ("pairs", result.summary.eval_pairs)):
            if scored:
                words.append(f"{scored['count']:,} {unit}")
        return ", ".join(words)

    @cached_property
    def scores(self) -> dict[str, tuple[Column, ScoreRecord]]:
        """Scores of the evaluation by metric; without one, those that the training measured."""
        if self.evaluation:
            return {name: (self.evaluation.columns[name], score) for name, score in self.evaluation.scores.items()}
        losses = ScoringInput(losses=self.result.summary.eval_losses)
        columns = {
            name: column for name, column in self.result.columns.items() if isinstance(column.metric, LossMetric)
        }
        return {name: (column, column.metric.measure(column, losses)) for name, column in columns.items()}

    @property
    def scored_at(self) -> str:
        """Time of the evaluation; without one, of the end of the training."""
        if self.evaluation:
            return self.evaluation.created
        return self.result.run.launches[-1].ended or self.result.run.created

    def public(self, value: Any) -> Any:
        """Copy of a value, with secrets masked and local paths shortened."""
        return yamlfiles.with_texts(without_secrets(value), partial(_without_folders, Path(self.result.run.cwd)))


def hub_benchmark(score: ScoreRecord) -> tuple[str, str] | None:
    """Data set and task on the hub of a score of all rows; None if the hub registers none."""
    benchmark = score.benchmark
    if benchmark is None or benchmark.rows < benchmark.total_rows:
        return None
    return _HUB_BENCHMARKS.get(benchmark.task)


def card(result: RunResult, merged: bool, repository: str | None) -> str:
    """Text of a model card.

    Args:
        result: the run.
        merged: True for the card of the merged model.
        repository: repository on the hub, if the card will be pushed.
    """
    return _template().render(card=Card(result, merged, repository or "."))


def _template() -> Any:
    jinja = template_environment(paths.TEMPLATES)
    jinja.filters |= {
        "link": _link,
        "code": _code,
        "fenced": _fenced,
        "prose": _prose,
        "text": tables.text_of,
        "yaml": yamlfiles.write_yaml,
    }
    return jinja.get_template("model-card.md.j2")


def is_private(key: str) -> bool:
    """True if a dotted key holds a secret, a local folder, an account or a host."""
    if keys.find(key).kind in ("write", "host", "account") or keys.affects(key) in ("upload", *keys.NOT_TRAINED):
        return True
    return merging.top_key(key) == "plugins" or names_secret(key)


def _holds_private(key: str, value: Any) -> bool:
    """True if a key, or a key in its value, is private."""
    return any(is_private(below) for below, _ in merging.flatten(value, key))


def _arguments(decoding: studies.Decoding) -> str:
    """Decoding settings as arguments for transformers' `generate`."""
    names = ["max_new_tokens", "do_sample"]
    if decoding.num_beams > 1:
        names.append("num_beams")
    if decoding.do_sample:
        names += ["temperature", "top_p", "top_k"]
    return ", ".join(f"{name}={getattr(decoding, name)!r}" for name in names)


def base_model(run_dir: RunDir, run: Run) -> Base:
    """Base model of a run's adapter."""
    recorded = read_json(run_dir.output / RunFile.ADAPTER_CONFIG).get("base_model_name_or_path")
    name = str(recorded or run_dir.config.get("base_model"))
    return Base(name, is_local=Path(name).is_absolute() or Path(run.cwd, name).is_dir())


def _without_folders(cwd: Path, value: str) -> str:
    """Shorten local paths in a text.

    A path below `cwd` becomes relative. Any other path is cut to its last part.
    """
    path = Path(value)
    is_long = path.is_absolute() and len(path.parts) > 2
    if not is_long and ".." not in path.parts:
        return _LOCAL_PATH.sub(lambda match: _without_folders(cwd, match[0].removeprefix("file://")), value)
    if path.is_relative_to(cwd):
        return str(path.relative_to(cwd))
    return path.name


def _code(value: Any) -> str:
    """Value as one line of Markdown code; a dash for None."""
    if value is None:
        return "–"
    text = ""
    if isinstance(value, str):
        text = " ".join(value.split())
    text = text or json.dumps(value, ensure_ascii=False)
    if "`" not in text:
        return f"`{text}`"
    ticks = "`" * (1 + max(map(len, re.findall("`+", text))))
    return f"{ticks} {text} {ticks}"


def _fenced(text: str, language: str) -> str:
    """Text as a Markdown code block; the fence is longer than any in the text."""
    fence = "`" * (1 + max(map(len, re.findall("``+", text)), default=2))
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def _prose(text: Any) -> str:
    """Text on one line, escaped for Markdown and HTML."""
    escaped = re.sub(r"([\\`*_\[\]<>|~&])", r"\\\1", " ".join(str(text).split()))
    # a backslash before what begins a heading, a list or a rule
    return re.sub(r"^(?=[#+=-])|^(\d+)(?=[.)](?: |$))", r"\1\\", escaped)


def _link(url: str) -> str:
    """HTTP URL, quoted for a Markdown link; empty for any other scheme."""
    return quote(url, safe="%/:?#=&@+,;~") if re.match("https?://", url) else ""
