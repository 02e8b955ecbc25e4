"""Results of a run beside published scores."""

from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from ..base.errors import UserError
from ..base.files import Row, sha256
from ..base.yamlfiles import Config, read_yaml, write_flow
from ..config import datafiles, keys, merging, models
from ..config.compose import REHEARSAL
from ..config.merging import Difference, Source
from ..data import manifest, studies
from ..data.manifest import is_the_studys
from ..data.published import GridPoint, Published, PublishedScore
from ..data.studies import Study
from ..evaluate.score import by_declared_model, columns_of_training
from ..evaluate.scores_file import (
    Changed,
    Evaluation,
    changed,
    find_evaluation,
    read_scores,
    served_evaluations,
)
from ..evaluate.settings import BASE
from ..metrics.metric import BenchmarkMetric, Column, LossMetric, ScoreRecord, is_of_trainer
from ..metrics.registry import need_evaluation
from ..run.rundir import RunDir
from ..training.run_record import Run, Summary
from .score_records import PROFILES


@dataclass(frozen=True, slots=True)
class RunScore:
    """Score of a run by one metric.

    Attributes:
        base_model: score of the base model without adapter.
        published: published score that the run should reach.
        difference: difference from the published score; None if the two are not comparable.
        decodings: scores with the study's other decoding configurations, by name.
    """

    value: float | None
    base_model: float | None
    published: PublishedScore | None
    difference: float | None
    decodings: dict[str, float | None]

    def as_json(self, name: str) -> Row:
        """JSON fields; their names begin with the metric's name."""
        return {
            name: self.value,
            f"{name}_base_model": self.base_model,
            f"{name}_published": float(self.published.value) if self.published else None,
            f"{name}_difference": self.difference,
            f"{name}_decodings": self.decodings,
        }


@dataclass(frozen=True)
class RunResult:
    """Run with its current evaluations."""

    folder: RunDir
    run: Run

    @cached_property
    def study(self) -> Study | None:
        return studies.usable_study_of(self.run.origin)

    @cached_property
    def config(self) -> Config:
        """Config that Axolotl received; empty if the file is missing."""
        return self.folder.config if self.folder.config_file.is_file() else {}

    @cached_property
    def config_values(self) -> Config:
        """Settings of the config by dotted key."""
        return dict(merging.flatten(self.config))

    def setting(self, key: str) -> Any:
        """Value of a dotted key in the config; None if it is missing.

        If the recipe is unchanged, it follows from the recorded differences, because reading many configs takes long.
        """
        recipe = _recipe_settings(self.run.present_recipe, self.run.recipe_sha256)
        if recipe is None or keys.affects(key) == "run":
            return self.config_values.get(key)
        changes = {difference.key: difference.run for difference in self.run.differences}
        return changes.get(key, recipe.get(key))

    @cached_property
    def _last_evaluation(self) -> Evaluation | None:
        return read_scores(self.folder.path)

    @cached_property
    def changed(self) -> Changed | None:
        """`stale` or `edited` if files changed since the last evaluation, else None; see `changes.changed`."""
        return changed(self.folder.path, self._last_evaluation, self.run)

    @property
    def evaluation(self) -> Evaluation | None:
        """Last evaluation of the adapter; None if adapter, data or predictions have changed since."""
        return None if self.changed else self._last_evaluation

    @property
    def is_scored(self) -> bool:
        """True if the run is evaluated, or its metrics need no evaluation."""
        return self.evaluation is not None or not need_evaluation(self.columns.values())

    @property
    def score_records(self) -> dict[str, ScoreRecord]:
        """Records of the evaluation's scores by metric; empty without an evaluation."""
        return self.evaluation.scores if self.evaluation else {}

    @cached_property
    def base_evaluation(self) -> Evaluation | None:
        """Evaluation of the base model alone, with the run's rows and decoding."""
        return find_evaluation(self.folder.path, self.evaluation, adapter=BASE, adapter_sha256=None)

    @cached_property
    def served(self) -> list[Evaluation]:
        """Evaluations of GGUF files of the adapter."""
        return served_evaluations(self.folder.path, self.run)

    def scores_in(self, evaluation: Evaluation) -> dict[str, float | None]:
        """Scores of an evaluation by metric; None for a missing one."""
        return {name: _value(column, evaluation) for name, column in self.columns.items()}

    @cached_property
    def decoded(self) -> dict[str, Evaluation | None]:
        """Evaluations with the study's other decoding configurations, by name.

        None stands for a missing evaluation.
        """
        if self.study is None:
            return {}
        decoded = {}
        for name, decoding in self.study.decodings.items():
            decoded[name] = find_evaluation(self.folder.path, self.evaluation, decoding=decoding)
        return decoded

    @cached_property
    def columns(self) -> dict[str, Column]:
        """Metrics of the study, and additional metrics of the evaluation."""
        recorded = self.evaluation.columns if self.evaluation else {}
        if self.study is None:
            return recorded or columns_of_training(self.config, self.run.origin)
        return self.study.columns | recorded | self.study.columns  # the study's come first, and replace recorded ones

    @cached_property
    def summary(self) -> Summary:
        return self.folder.summary(self.run)

    @property
    def trouble(self) -> str | None:
        """Problem with the losses, or else the end of the last launch, or the refusal of a first one."""
        if self.summary.trouble or not self.run.launches:
            return self.summary.trouble or self.run.summary.trouble
        return self.run.launches[-1].error

    @property
    def changes(self) -> Config:
        """Settings that the user changed, with the run's values; without those of trackers."""
        differences = [change.without_secrets() for change in self.run.differences if not _is_rehearsed(change.source)]
        return {change.key: change.run for change in differences if keys.affects(change.key) != "tracking"}

    @property
    def recipe_note(self) -> str | None:
        """Note on a recipe that is missing or has changed since the run began, with the changed settings."""
        note = self.run.recipe_note
        file = self.folder.recipe_file(self.run)
        if note is None or not self.config or file is None:
            return note
        try:
            present = dict(merging.flatten(read_yaml(file)))
        except UserError:  # missing or malformed
            return note
        former = self.config_values | {change.key: change.recipe for change in self.run.differences}
        changes = []
        for key, (before, after) in merging.differences(former, present).items():
            if keys.affects(key) != "run" and key != "plugins":  # to which a run adds its own
                changes.append(f"{key}: {write_flow(before)} -> {write_flow(after)}")
        return "; ".join([note, *changes])

    @property
    def rows_evaluated(self) -> int | None:
        return self.evaluation.shares.rows if self.evaluation else None

    def score(self, column: Column) -> float | None:
        """Score by a metric; None if it is missing, or if the metric's declaration changed."""
        if not isinstance(column.metric, LossMetric):
            return _value(column, self.evaluation)
        return column.metric.score(column, self.summary.eval_losses)

    def is_comparable(self, column: Column) -> bool:
        """True if a score is comparable with a published one.

        The run must be finished, and evaluated with the same rows, decoding, metric and scorer model. The eval loss is
        measured in training, and needs no evaluation, see `incomparable_loss`. A benchmark needs neither the study's
        rows nor its decoding.
        """
        if self.study is None or self.run.state != "finished":
            return False
        if self.run.rehearsal or self.is_of_something_else:
            return False
        if isinstance(column.metric, LossMetric):
            return self.incomparable_loss is None
        evaluation = self.evaluation
        if evaluation is None or self.score(column) is None or evaluation.settings.limit is not None:
            return False
        if not by_declared_model(column, evaluation.scores):
            return False
        if isinstance(column.metric, BenchmarkMetric):
            return True
        has_all_rows = evaluation.settings.test_set == self.study.data.test_set
        return has_all_rows and evaluation.settings.decoding == self.study.decoding

    @cached_property
    def incomparable_loss(self) -> str | None:
        """Reason not to compare the eval loss with the published one; None without a reason or a published one.

        Its tokens must be the recipe's and, if it is the Trainer's, its batches, too.
        """
        losses = [self.columns[name] for name in self.aim.scores if isinstance(self.columns[name].metric, LossMetric)]
        if not losses:
            return None
        has_rows = self.summary.eval_tokens or self.summary.eval_pairs
        if not has_rows and self.summary.eval_loss is not None:
            return "the scored tokens are unknown under tensor or context parallelism, and for streamed rows"
        if self._keys_of_tokens:
            return f"the eval loss may cover other tokens than the recipe's, by {', '.join(self._keys_of_tokens)}"
        if any(map(is_of_trainer, losses)) and self._keys_of_batches:
            changed = ", ".join(self._keys_of_batches)
            return f"the Trainer's eval loss is a mean over batches, which differ from the recipe's by {changed}"
        return None

    @property
    def _keys_of_tokens(self) -> list[str]:
        """Changed keys that may affect the tokens behind the eval loss."""
        changed = [key for key in other_settings(self.run) if keys.affects(key) in keys.EVALUATED]
        changed = [key for key in changed if not _is_training_path(key)]
        if "seed" in changed and not self._seed_selects_rows:
            changed.remove("seed")
        return changed

    @property
    def _seed_selects_rows(self) -> bool:
        """True if the seed decides which rows the eval loss covers, as in Axolotl 0.21 (utils/data/sft.py)."""
        evaluated = datafiles.test_sets(self.config) or datafiles.training_sets(self.config)
        if any(dataset.entry.keys() & {"shards", "weight"} for dataset in evaluated):
            return True
        return bool(self.config.get("val_set_size")) and self._seed_orders_rows

    @property
    def _seed_orders_rows(self) -> bool:
        """True if Axolotl 0.21 shuffles the rows by the seed before it holds some out (utils/data/shared.py)."""
        is_merge_shuffled = self.config.get("shuffle_merged_datasets") is not False
        return is_merge_shuffled or bool(self.config.get("shuffle_before_merging_datasets"))

    @property
    def _keys_of_batches(self) -> list[str]:
        """Changed keys that may put other rows into a batch of the evaluation."""
        changed = [key for key in other_settings(self.run) if keys.affects(key) in ("packing", "batches")]
        if "micro_batch_size" in changed and self.config.get("eval_batch_size"):
            changed.remove("micro_batch_size")  # the default of eval_batch_size
        if "seed" in other_settings(self.run) and self._seed_orders_rows:
            changed.append("seed")
        if self.run.ranks > 1:
            changed.append("the number of GPUs")
        return changed

    @cached_property
    def scores(self) -> dict[str, RunScore]:
        """Scores by metric, each with the base model's and the published score."""
        return {name: self._run_score(column, self.aim.scores.get(name)) for name, column in self.columns.items()}

    def _run_score(self, column: Column, published: PublishedScore | None) -> RunScore:
        value, difference = self.score(column), None
        if published and value is not None and self.is_comparable(column):
            difference = value - float(published.value)
        decodings = {}
        if not isinstance(column.metric, LossMetric):
            decodings = {name: _value(column, evaluation) for name, evaluation in self.decoded.items()}
        return RunScore(
            value=value,
            base_model=_value(column, self.base_evaluation),
            published=published,
            difference=difference,
            decodings=decodings,
        )

    @cached_property
    def aim(self) -> Published:
        """Published results that the run should reach; empty for a rehearsal, another model or other data."""
        if self.study is None or self.run.rehearsal or self.is_of_something_else:
            return Published()
        return self.study.aimed_at(self.run.origin)

    @cached_property
    def other_model(self) -> str | None:
        """Base model of the run; None if it is the recipe's model, a copy of it, or a rehearsal's small model."""
        for difference in self.run.from_origin:
            if difference.source.kind == "base":
                continue
            if difference.key == "base_model" and not models.is_copy(difference.run, difference.recipe):
                return None if self.run.rehearsal else str(difference.run)
        return None

    @cached_property
    def other_data(self) -> bool:
        """True if the config names data files that are not the study's, or a manifest shows other content.

        A rehearsal's rows are made like the study's, and do not count as other data.
        """
        if self.run.rehearsal:
            return False
        verified = 0
        for file in self.run.data:
            path = Path(self.run.cwd, file.path)
            for entry in manifest.entries(path.parent).values():
                if entry.get("file") != path.name:
                    continue
                if entry.get("sha256") != file.sha256 or entry.get("is_the_study_file") is False:
                    return True
                verified += is_the_studys(entry)
        for difference in self.run.from_origin:
            if _is_training_path(difference.key):
                return verified == 0 or verified < len(self.run.data)
        return False

    @property
    def grid_point(self) -> GridPoint | None:
        """Published grid point with the settings of the run; None for a rehearsal, or without one."""
        if self.study is None or self.run.rehearsal:
            return None
        return self.study.grid_point(self.run.origin, other_training(self.run))

    @property
    def is_of_something_else(self) -> bool:
        """True if base model or data differ from the recipe's.

        Published scores then do not apply.
        """
        return bool(self.other_model) or self.other_data


@cache
def _recipe_settings(file: Path, digest: str) -> Config | None:
    """Settings of a recipe by dotted key; None if its file is missing or has another hash."""
    if not file.is_file() or sha256(file) != digest:
        return None
    return dict(merging.flatten(read_yaml(file)))


def _value(column: Column, evaluation: Evaluation | None) -> float | None:
    """Score in an evaluation; None if it is missing, or if the metric's declaration changed."""
    if evaluation is None or not column.same_scores(evaluation.columns.get(column.name)):
        return None
    return evaluation.scores[column.name].value


def other_settings(run: Run) -> Config:
    """Settings that differ from the recipe's, except trackers, output, GPUs, and a copy of its model."""
    return {change.key: change.run for change in run.from_origin if not _is_negligible(change)}


def other_training(run: Run) -> Config:
    """`other_settings` without the seed and the paths of data."""
    changes = other_settings(run)
    return {key: value for key, value in changes.items() if key != "seed" and keys.find(key).kind != "data"}


def _is_training_path(key: str) -> bool:
    """True for the path of rows to train on; `other_data` compares the files."""
    return keys.find(key).kind == "data" and keys.affects(key) == "rows"


def trained_settings(cfg: Config) -> Config:
    """Settings of a config by dotted key, without trackers and output folders."""
    settings = {}
    for key, value in merging.flatten(cfg):
        if keys.affects(key) not in keys.NOT_TRAINED:
            settings[key] = value
    return settings


def _is_rehearsed(source: Source) -> bool:
    """True for a change that every rehearsal makes."""
    return source.kind == "rehearsal" or source == Source("profile", REHEARSAL)


def _is_negligible(change: Difference) -> bool:
    """True for another tracker, output or number of GPUs, a stated default, and a copy of the recipe's model."""
    if change.source.kind == "base":
        return True
    if change.key in ("base_model", "tokenizer_config"):
        return models.is_copy(change.run, change.recipe)
    if change.source.kind in ("gpus", "default"):
        return True
    if change.source.kind == "profile" and change.source.name in PROFILES:
        return True
    return keys.affects(change.key) in keys.NOT_TRAINED
