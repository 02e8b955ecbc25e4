"""Find and read the evaluation rows of a run."""

import hashlib
from collections.abc import Sequence
from contextlib import chdir
from dataclasses import dataclass, replace
from heapq import nsmallest
from itertools import chain, islice
from pathlib import Path

import orjson

from ..base.errors import UserError
from ..base.files import JsonObject, Row, digest, json_rows, read_rows, reading, sha256, write_rows
from ..base.hub import importing_axolotl
from ..base.run_files import RunFile
from ..base.terminal import say
from ..base.yamlfiles import Config
from ..config import datafiles
from ..config.datafiles import DatasetRef
from ..data import manifest, studies
from ..data.manifest import is_the_studys
from ..run.rundir import RunDir
from ..training.row_types import Chat, row_type
from ..training.run_record import Run
from .scores_file import RowsState

# File in a run folder: rows that only Axolotl can load, each with its data set. The first evaluation writes it.
WITHOUT_ANSWERS = ("rl", "reward_model", "process_reward_model", "pretraining_dataset")
"""Config keys of trainings whose rows have no answers."""
_ELSEWHERE = "name a file of evaluation rows with --data"


def sample_positions(total: int, limit: int | None) -> list[int]:
    """Positions of the rows that a limit takes, ascending.

    Their order is pseudo-random and fixed: a larger limit takes the rows of a smaller one, and further rows.
    """
    if limit is None:
        return [*range(total)]
    return sorted(nsmallest(limit, range(total), key=_rank))


def _rank(position: int) -> bytes:
    return hashlib.sha256(f"qlora-recipes {position}".encode()).digest()


@dataclass(frozen=True)
class RowSource:
    """Source of evaluation rows.

    Attributes:
        data: file of the rows, or a description.
        datasets: data sets that hold the rows; for --data, the one in whose format the user's file is read.
        file: JSONL file with all rows; None for other sources.
        held_out: True for rows that val_set_size held out of the training data.
    """

    data: str
    datasets: list[DatasetRef]
    file: Path | None = None
    held_out: bool = False

    def local_files(self, folder: Path) -> list[Path]:
        """Files on this machine with the rows.

        Args:
            folder: the folder that the data sets' paths are relative to.
        """
        if self.file:
            return [self.file]
        with chdir(folder if folder.is_dir() else "."):
            files = chain.from_iterable(datafiles.present_files(dataset.entry) for dataset in self.datasets)
            return [file.absolute() for file in files]


@dataclass(frozen=True)
class EvaluationRow:
    """A row to score.

    Attributes:
        position: the row's position in its source.
        dataset: the data set that defines the row's format.
        content: the row's fields.
    """

    position: int
    dataset: DatasetRef
    content: Row


@dataclass(frozen=True)
class EvaluationRows:
    """Rows of a source, or a part of them.

    Attributes:
        sha256: hash of all rows of the source.
        files: states of the files with the rows.
    """

    sha256: str
    rows: list[EvaluationRow]
    files: list[RowsState]

    @property
    def groups(self) -> set[str]:
        """Names of the rows' groups."""
        return {str(row.content.get("group")) for row in self.rows}

    @property
    def references(self) -> list[str]:
        """Expected answer of each row; empty if the row's type has no field for it."""
        return [row_type(row.dataset.entry).answer_of(row.content) for row in self.rows]

    def at(self, positions: Sequence[int]) -> "EvaluationRows":
        """Rows at some positions of the source."""
        return replace(self, rows=[self.rows[position] for position in positions])


# for runs without rows that have answers
NO_SOURCE = RowSource("no rows", [])
NO_ROWS = EvaluationRows(hashlib.sha256().hexdigest(), [], [])


def source_of_file(file: Path, cfg: Config, folder: Path) -> RowSource:
    """Source for a user's file.

    If a data set in the config has the same path, the file is read in the format of that data set; otherwise in the
    format of the first data set. Evaluation data sets are searched before training data sets.
    """
    path = file.resolve()
    datasets = [*datafiles.test_sets(cfg), *datafiles.training_sets(cfg)]
    for dataset in datasets:
        if Path(folder, dataset.path).resolve() == path:
            return RowSource(str(path), [dataset], file)
    return RowSource(str(path), [next(iter(datasets), datafiles.NO_DATASET)], file)


def default_source(run: Run, cfg: Config) -> RowSource | None:
    """Default evaluation rows of a run; None if it has none.

    For a study's prepared data, the default is the study's test set. For all other data, test_datasets and val_set_size
    in the config have priority over a test.jsonl beside the training data.
    """
    folder = Path(run.cwd)
    name = run.test_data or datafiles.test_file(cfg, folder)
    if name is None:
        return configured(cfg, folder)
    file = Path(folder, name)
    if test_entry(file) or any(studies.prepared_formats(name)):
        study = studies.study_of(run.origin)
        test_file = file.with_name(f"{study.data.test_set}.jsonl") if study else file
        if test_file.is_file():
            file = test_file
    elif source := configured(cfg, folder):
        return source
    first = next(iter(datafiles.training_sets(cfg)), datafiles.NO_DATASET)
    return RowSource(str(file.resolve()), [first], file)


def validation(run: Run, cfg: Config) -> RowSource | None:
    """Validation rows of a run; None if it has only test rows, or no rows."""
    folder = Path(run.cwd)
    for dataset in datafiles.test_sets(cfg):
        file = Path(folder, dataset.path)
        if file.is_file() and _set_of(test_entry(file), sha256(file)):
            return None
    return configured(cfg, folder)


def configured(cfg: Config, folder: Path) -> RowSource | None:
    """Rows of test_datasets, or rows that val_set_size held out of the training data."""
    if tests := datafiles.test_sets(cfg):
        file = None
        if len(tests) == 1 and not datafiles.first_rows(tests[0].entry):
            file = datafiles.jsonl(tests[0].entry, folder)
        return RowSource(str(file.resolve()) if file else _in_words(tests, folder), tests, file)
    if cfg.get("val_set_size"):
        trained = datafiles.training_sets(cfg)
        words = f"val_set_size {cfg['val_set_size']} of {_in_words(trained, folder)}"
        return RowSource(words, trained, held_out=True)
    return None


def test_entry(file: Path) -> JsonObject:
    """Return the entry of the test split from the manifest beside a data file."""
    return manifest.entries(file.parent).get("test", {})


def test_set(file: Path | None, digest: str) -> str | None:
    """Name of the study's test set that is identical to a file by hash, or None."""
    if file is None:
        return None
    test = test_entry(file)
    return _set_of(test, digest) if is_the_studys(test) else None


def _set_of(test: JsonObject, digest: str) -> str | None:
    """Name of the test set with this hash in a manifest's test entry; None without a match."""
    sets = {"test": test} | test.get("subsets", {})
    return next((name for name, entry in sets.items() if entry.get("sha256") == digest), None)


def require_reference(run_dir: RunDir, cfg: Config, source: RowSource | None) -> RowSource:
    """Return the source if its rows have answers to compare predictions with.

    Raises:
        UserError: the rows have no answers, or the source is None.
    """
    key = next((key for key in WITHOUT_ANSWERS if cfg.get(key)), "")
    for dataset in datafiles.datasets(cfg) if source is None else source.datasets:
        if dataset.type_name.startswith("completion"):
            key = f"{dataset.key}.type"
    if key:
        raise UserError(
            f"{run_dir.path}: rows for {key} have no answers to compare predictions with; `recipe results` shows the "
            "losses and rewards of held-out rows if the recipe has test_datasets or val_set_size"
        )
    if source is None:
        raise UserError(
            f"{run_dir.path}: no evaluation rows: its config has neither test_datasets nor val_set_size, and its "
            f"training data has no test.jsonl beside it; {_ELSEWHERE}, and give the recipe test_datasets for the next "
            "run"
        )
    return source


def read_source(source: RowSource, run_dir: RunDir, run: Run, cfg: Config, loads: bool = True) -> EvaluationRows:
    """Read the rows of a source.

    Local JSONL files are read directly. Axolotl loads the rows if val_set_size held them out, or if a data set is not
    a local JSONL file.

    Args:
        source: the source.
        run_dir: folder of the run.
        run: the run.
        cfg: the run's config.
        loads: whether Axolotl may load rows, which can run code in their files.

    Raises:
        UserError: the rows cannot be read, or there are no rows.
    """
    if source.file:
        kind = row_type(source.datasets[0].entry)
        fields = (kind.reference,) if kind.reference else ()
        is_default = source == default_source(run, cfg)
        hint = "; `recipe data prepare --study STUDY` writes test.jsonl" if is_default else ""
        contents = read_rows(source.file, fields, hint)
        if isinstance(kind, Chat) and kind.messages not in contents[0]:
            remedy = "`recipe new NAME --data FILE` writes questions and answers as chats to variants/NAME.jsonl"
            raise UserError(f"the field {kind.messages} is missing", file=source.file, line=1, remedy=remedy)
        pairs = [(source.datasets[0], row) for row in contents]
        states = [RowsState.of_rows(source.file, None)]
        sha256_of_rows = states[0].sha256
    else:
        pairs, states = _read_datasets(source, run_dir, run, cfg, loads)
        sha256_of_rows = digest([(dataset.key, row) for dataset, row in pairs])
    if not pairs:
        raise UserError(f"{source.data}: no rows; {_ELSEWHERE}")
    rows = [EvaluationRow(position, dataset, row) for position, (dataset, row) in enumerate(pairs)]
    return EvaluationRows(sha256_of_rows, rows, states)


def _read_datasets(
    source: RowSource, run_dir: RunDir, run: Run, cfg: Config, loads: bool
) -> tuple[list[tuple[DatasetRef, Row]], list[RowsState]]:
    """Rows of data sets, each with its data set, and the states of the files."""
    files = [file for dataset in source.datasets if (file := datafiles.jsonl(dataset.entry, Path(run.cwd)))]
    if source.held_out or len(files) < len(source.datasets):
        rows_file = run_dir.path / RunFile.ROWS
        if loads and not rows_file.is_file():
            _load(source, rows_file, run, cfg)
        return _loaded_rows(source, rows_file), [RowsState.of_rows(rows_file, None)]
    pairs, states = [], []
    for dataset, file in zip(source.datasets, files, strict=True):
        first = datafiles.first_rows(dataset.entry)
        pairs += [(dataset, row) for row in read_rows(file)[:first]]
        states.append(RowsState.of_rows(file, first))
    return pairs, states


def _in_words(datasets: list[DatasetRef], folder: Path) -> str:
    """Describe data sets by name, subset and split, without local folders."""
    descriptions = []
    for dataset in datasets:
        entry, path = dataset.entry, dataset.path
        words = [Path(path).name if Path(folder, path).exists() else path]
        words += [f"{key} {entry[key]}" for key in ("name", "data_files", "split") if entry.get(key)]
        descriptions.append(", ".join(words))
    return " and ".join(descriptions)


def _loaded_rows(source: RowSource, rows_file: Path) -> list[tuple[DatasetRef, Row]]:
    """Rows that `_load` wrote, each with its data set."""
    by_key = {dataset.key: dataset for dataset in source.datasets}
    try:
        return [(by_key[line["dataset"]], line["row"]) for line in read_rows(rows_file, ("dataset",))]
    except KeyError:  # written for other data sets
        raise UserError("damaged", file=rows_file, remedy="move it away") from None


def _load(source: RowSource, rows_file: Path, run: Run, cfg: Config) -> None:
    """Load the rows of a source with Axolotl, and write them to a file, each with the key of its data set.

    Raises:
        UserError: a file of the data is missing or has changed since training.
    """
    if source.held_out and (path := run.changed_data):
        raise UserError(
            f"{path}: missing or changed since training; val_set_size needs it unchanged; restore the file, or "
            f"{_ELSEWHERE}"
        )
    say(f"loading {source.data}")  # no progress bar: its thread can deadlock with forked processes
    with importing_axolotl(offline=run.rehearsal), chdir(run.cwd):
        for dataset in source.datasets:
            datafiles.existing_files(dataset)
        from ..training.tokens import Tokenizer

        tokenizer = Tokenizer(cfg)
        pairs = []
        if source.held_out:
            pairs = tokenizer.held_out()
        else:
            for dataset in source.datasets:
                pairs += [(dataset, row) for _, row in tokenizer.load(dataset)]
    lines = [{"dataset": dataset.key, "row": row} for dataset, row in pairs]
    # default=str for dates and bytes, which JSON lacks; such fields hold no training text
    write_rows(rows_file, orjson.loads(orjson.dumps(lines, default=str)))


def trained_positions(test: EvaluationRows, run: Run, cfg: Config) -> list[int] | None:
    """Positions of evaluated rows that are also training rows, by the fields that their type reads.

    None if unknown: val_set_size holds rows out of the training data, a training data set is not one local JSONL file,
    or a file has changed since training.
    """
    if cfg.get("val_set_size") or run.changed_data:
        return None
    trained = set()
    for dataset in datafiles.training_sets(cfg):
        file = datafiles.jsonl(dataset.entry, Path(run.cwd))
        if file is None:
            return None
        kind = row_type(dataset.entry)
        with reading(file) as lines:
            rows = islice(json_rows(lines, file, ()), datafiles.first_rows(dataset.entry))
            trained |= {hash(kind.content_of(row)) for row in rows}
    positions = []
    for row in test.rows:
        if hash(row_type(row.dataset.entry).content_of(row.content)) in trained:
            positions.append(row.position)
    return positions
