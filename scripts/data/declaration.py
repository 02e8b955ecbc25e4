"""Declaration of a study's data in study.yaml: origin and preparation."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from ..base.errors import did_you_mean, recipe_command

SPLITS = ("train", "valid", "test", "train_pairs", "test_pairs")

Key = tuple[str, ...]
"""Path of keys in study.yaml, outermost first."""
Mistake = tuple[Key, str]
"""Place and description of a mistake."""

Text = Annotated[str, StringConstraints(min_length=1)]
Count = Annotated[int, Field(ge=1)]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Name = Annotated[str, StringConstraints(pattern=r"^\w[\w.-]*$")]
_PART = r"[^/\\.\x00-\x1f\x7f][^/\\\x00-\x1f\x7f]*"  # of a path: neither `.` nor `..`, and no control character
FilePath = Annotated[str, StringConstraints(pattern=rf"^({_PART}/)*{_PART}$")]
DataFolder = Annotated[str, StringConstraints(pattern=rf"^data(/{_PART})+$")]
RowsFile = Annotated[str, StringConstraints(pattern=r"\.(jsonl|json|csv)$")]
SplitName = Annotated[str, StringConstraints(pattern=rf"^({'|'.join(SPLITS)})$")]


class Strict(BaseModel):
    """Part of study.yaml; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", strict=True)


def exactly_one(part: BaseModel, first: str, second: str) -> None:
    """Raise ValueError unless exactly one of two keys is given."""
    if (getattr(part, first) is None) == (getattr(part, second) is None):
        raise ValueError(f"give either {first.rstrip('_')} or {second}")


def undeclared(at: Key, name: str | None, declared: Collection[str]) -> Iterator[Mistake]:
    """Yield a mistake if there is a name, but it is not declared."""
    if name is not None and name not in declared:
        hint = did_you_mean(name, declared) or f"; known: {', '.join([*declared][:20])}"
        yield at, f"{name} is unknown{hint}"


class SourceFile(Strict):
    """Facts about a file: number of rows, size in bytes, and checksum."""

    rows: Count | None = None
    bytes: Count | None = None
    sha256: Sha256 | None = None


class DataSource(SourceFile):
    """Source that `recipe data fetch` downloads, from a URL or the hub.

    Attributes:
        url: URL of a file or, with `files`, of a zip.
        files: files to extract from the zip, by name without folders. `bytes` is then the approximate size
            of the zip; `recipe data fetch` refuses one of twice that size.
        hub: id of a repository on the hub.
        kind: `dataset` (write a split as JSON lines) or `model` (download one file).
        file: file to download from a `model` repository; by default, the file with the name of the source.
        config: configuration to load, if the data set has several.
        revision: commit of the repository.
    """

    url: Annotated[str, StringConstraints(pattern=r"^https?://\S+$")] | None = None
    files: Annotated[dict[FilePath, SourceFile], Field(min_length=1)] | None = None
    hub: Annotated[str, StringConstraints(pattern=r"^[\w.-]+/[\w.-]+$")] | None = None
    kind: Literal["dataset", "model"] = "dataset"
    file: FilePath | None = None
    config: str | None = None
    split: str = "train"
    revision: Text | None = None

    @property
    def is_own(self) -> bool:
        """True for a file that nobody publishes; users copy it to the raw folder."""
        return not self.url and not self.hub

    def contents(self, name: str) -> Mapping[str, SourceFile]:
        """Files of the source by name; a source of one file has the file's name, `name`."""
        return self.files or {name: self}

    @model_validator(mode="after")
    def _has_one_origin(self) -> Self:
        if self.url and self.hub:
            raise ValueError("give url or hub, not both; with neither, users copy the file to the raw folder")
        if self.hub and self.revision is None:
            raise ValueError("give a commit as revision, because branches change")
        return self


class PreparedFormat(Strict):
    """Format of prepared rows, and the folder for them.

    Attributes:
        fields: expressions that replace the study's expressions, by field.
    """

    folder: DataFolder
    fields: dict[str, Text] = {}


class Subset(Strict):
    """Test rows listed in a file beside study.yaml, or sampled with a seed."""

    title: Text
    rows: Count
    positions: Name | None = None
    seed: int | None = None

    @model_validator(mode="after")
    def _is_listed_or_sampled(self) -> Self:
        exactly_one(self, "positions", "seed")
        return self


class Order(Strict):
    """Order of written rows: each bucket of consecutive rows is sorted.

    Attributes:
        buckets: size of each bucket, in rows.
        longest_first: expression for the number to sort by, largest first.
    """

    buckets: Count
    longest_first: Text


class Split(Strict):
    """Split of a data set: by default, all rows of its raw files except filtered rows.

    Attributes:
        from_: raw file or files.
        sample_from: another split to sample rows from; the sampled rows are removed from it.
        sample: number of rows to sample at random.
        seed: seed of the sample.
        shuffle: seed for `Dataset.shuffle` of the datasets library. Rows are shuffled before `first` applies. With
            `sample_from`, the other split is shuffled: its first rows become the sample, and the remaining rows stay in
            shuffled order.
        first: number of rows to take from the beginning.
        rows: number of rows, if it is known but does not follow from other keys.
        fields, filters: expressions that replace all of the study's, for raw files with different fields.
        order: order of the written rows.
        tokens: number of training tokens without padding, by base_model.
        subsets: subsets of the test rows, by file name without suffix.
    """

    model_config = ConfigDict(extra="forbid", validate_by_alias=True, validate_by_name=True)

    from_: RowsFile | Annotated[list[RowsFile], Field(min_length=1)] | None = Field(None, alias="from")
    sample_from: str | None = None
    sample: Count | None = None
    seed: int = 42
    shuffle: Annotated[int, Field(ge=0)] | None = None
    first: Count | None = None
    rows: Count | None = None
    fields: dict[str, Text] | None = None
    filters: dict[str, Text] | None = None
    order: Order | None = None
    tokens: dict[Text, Count] = {}
    subsets: dict[Name, Subset] = {}

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Self:
        exactly_one(self, "from_", "sample_from")
        keys = {key for key in self.model_fields_set if getattr(self, key) is not None}
        for key in ("seed", "sample_from"):
            if key in keys and self.sample is None:
                raise ValueError(f"{key} needs sample, the number of rows to sample")
        excluding = (("first", "sample"), ("fields", "sample_from"), ("filters", "sample_from"), ("seed", "shuffle"))
        for key, other in excluding:
            if {key, other} <= keys:
                raise ValueError(f"{key} and {other} exclude each other; delete one")
        return self


class Data(Strict):
    """Origin and preparation of a study's data.

    Attributes:
        key: name of the data set in `recipe data fetch`.
        source: web page of the publication; empty for data of one's own.
        sources: downloads by name.
        fields: fields of a prepared row, each computed by an expression over the raw row.
        extra_fields: additional fields of test rows.
        lookups: further raw files by name; all expressions can use their rows, as a list.
        filters: conditions for leaving out a row, by reason; expressions over the raw row and the prepared fields.
        input_formats: formats of prepared rows by name; `recipe data prepare` writes each.
        test_set: test set of the published scores: `test`, or one of the subsets.
        sample: folder beside study.yaml with a few rows for rehearsals, in files named like the raw files.
    """

    key: Name
    name: Text
    source: str = ""
    licence: Text
    paper: str = ""
    sources: Annotated[dict[FilePath, DataSource], Field(min_length=1)]
    fields: dict[str, Text]
    extra_fields: dict[str, Text] = {}
    lookups: dict[Name, RowsFile] = {}
    filters: dict[Text, Text] = {}
    input_formats: dict[str, PreparedFormat] = {}
    splits: Annotated[dict[SplitName, Split], Field(min_length=1)]
    test_set: str = "test"
    sample: Name | None = None

    @property
    def raw(self) -> Path:
        """Folder for the published files."""
        return Path("data", f"{self.key}-raw")

    @property
    def files(self) -> dict[str, SourceFile]:
        """Files that `recipe data fetch` writes to `raw`, by name."""
        files: dict[str, SourceFile] = {}
        for name, source in self.sources.items():
            files |= source.contents(name)
        return files

    def sources_of(self, files: Collection[str]) -> list[str]:
        """Names of the sources that contain any of the files."""
        return [name for name, source in self.sources.items() if not source.contents(name).keys().isdisjoint(files)]

    def missing(self, files: Iterable[str]) -> list[str]:
        """Names of the sources of files that are not in `raw`."""
        return self.sources_of([file for file in files if not (self.raw / file).is_file()])

    def fetch_command(self, sources: Iterable[str]) -> str:
        """Command that fetches sources; it names them, because it would leave out some by default."""
        words = ["data", "fetch", self.key]
        for source in sources:
            words += ["--only", source]
        return recipe_command(*words)

    @property
    def formats(self) -> dict[str, PreparedFormat]:
        """Formats of prepared rows; only `default` if the study declares no format."""
        return self.input_formats or {"default": PreparedFormat(folder=f"data/{self.key}")}

    @property
    def subsets(self) -> dict[str, Subset]:
        """Subsets of the test rows."""
        return self.splits["test"].subsets if "test" in self.splits else {}

    def title_of(self, test_set: str) -> str:
        """Description of a test set."""
        if test_set in self.subsets:
            return self.subsets[test_set].title
        return "the complete test set" if "test" in self.splits else "the rows that the recipes hold out"

    @property
    def scored_rows(self) -> int | None:
        """Number of rows behind the published scores, if known."""
        subset = self.subsets.get(self.test_set)
        return subset.rows if subset else self.rows_of("test")

    def _origin(self, split: str) -> Split:
        """Split whose raw files, fields and filters apply: this one, or the one that its rows are sampled from."""
        declared = self.splits[split]
        return self.splits.get(str(declared.sample_from), declared)

    def raw_files_of(self, split: str) -> list[str]:
        """Names of a split's raw files, in order."""
        files = self._origin(split).from_ or []
        return [files] if isinstance(files, str) else files

    def raw_rows_of(self, split: str) -> int | None:
        """Number of rows in a split's raw files; None if unknown."""
        total = 0
        for name in self.raw_files_of(split):
            rows = self.files[name].rows
            if rows is None:
                return None
            total += rows
        return total

    @property
    def raw_files(self) -> list[str]:
        """Names of the raw files of all splits, and of lookups."""
        names = dict.fromkeys(self.lookups.values())
        for split in self.splits:
            names |= dict.fromkeys(self.raw_files_of(split))
        return list(names)

    def fields_of(self, split: str, input_format: str) -> dict[str, str]:
        """Expressions for the fields of a split."""
        fields = self._origin(split).fields
        if fields is None:
            fields = self.fields
        replaced = self.formats[input_format].fields
        return fields | {name: text for name, text in replaced.items() if name in fields}

    def filters_of(self, split: str) -> dict[str, str]:
        """Expressions for the rows that a split leaves out."""
        filters = self._origin(split).filters
        return self.filters if filters is None else filters

    def rows_of(self, split: str) -> int | None:
        """Number of rows in a split; None if unknown, for example because of filters."""
        declared = self.splits.get(split)
        if declared is None:
            return None
        size = declared.rows or declared.sample or declared.first
        if size:
            return size
        raw_rows = self.raw_rows_of(split)
        if raw_rows is None or self.filters_of(split):
            return None
        return raw_rows - sum(other.sample or 0 for other in self.splits.values() if other.sample_from == split)

    def expressions(self) -> Iterator[tuple[Key, str]]:
        """Yield all expressions, with their paths of keys."""
        parts: list[tuple[Key, Data | Split | PreparedFormat]] = [(("data",), self)]
        parts += [(("data", "input_formats", name), form) for name, form in self.input_formats.items()]
        parts += [(("data", "splits", name), split) for name, split in self.splits.items()]
        for at, part in parts:
            for key in ("fields", "filters", "extra_fields"):
                texts = getattr(part, key, None) or {}
                for name, text in texts.items():
                    yield (*at, key, name), text
            if isinstance(part, Split) and part.order:
                yield (*at, "order", "longest_first"), part.order.longest_first

    def mistakes(self, folder: Path) -> Iterator[Mistake]:
        """Yield contradictions in the declaration, and files missing from the study's folder."""
        for name, split in self.splits.items():
            yield from self._mistakes_in_split(name, split)
        for name, file in self.lookups.items():
            yield from undeclared(("data", "lookups", name), file, self.files)
        yield from undeclared(("data", "test_set"), self.test_set, ["test", *self.subsets])
        for name, form in self.input_formats.items():
            for field in form.fields:
                yield from undeclared(("data", "input_formats", name, "fields", field), field, self.fields)
        for field in sorted(self.fields.keys() & {*self.extra_fields, "idx"}):
            yield ("data", "fields", field), "scored rows have another field of this name; rename one"
        for name, subset in self.subsets.items():
            yield from _mistakes_in_subset(name, subset, folder)
        if self.sample and not any((folder / self.sample / name).is_file() for name in self.raw_files):
            expected = " or ".join(f"{self.sample}/{name}" for name in self.raw_files)
            yield ("data", "sample"), f"no {expected} beside study.yaml; add a few rows, or delete the key"

    def _mistakes_in_split(self, name: str, split: Split) -> Iterator[Mistake]:
        """Undeclared files and splits, and subsets of a split other than test."""
        at = ("data", "splits", name)
        if split.from_:
            for file in self.raw_files_of(name):
                yield from undeclared((*at, "from"), file, self.files)
        complete = [other for other in self.splits if other != name and self.splits[other].from_]
        yield from undeclared((*at, "sample_from"), split.sample_from, complete)
        if split.subsets and name != "test":
            yield (*at, "subsets"), "only the split test can have subsets; delete them"


def _mistakes_in_subset(name: str, subset: Subset, folder: Path) -> Iterator[Mistake]:
    """A name that a split has, and a missing file of positions."""
    at = ("data", "splits", "test", "subsets", name)
    if name in SPLITS:
        yield at, "a split has this name; choose another"
    if subset.positions and not (folder / subset.positions).is_file():
        problem = f"no such file beside study.yaml: {subset.positions}; add it, with row numbers from 0"
        yield (*at, "positions"), problem
