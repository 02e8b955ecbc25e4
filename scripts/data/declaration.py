"""The data of a study as its study.yaml declares it: where it is published, and how rows are made of it."""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from ..base.errors import did_you_mean

SPLITS = ("train", "valid", "test")
ROWS = (".jsonl", ".json", ".csv")  # formats of raw files, each also compressed, as .gz

Text = Annotated[str, StringConstraints(min_length=1)]
Count = Annotated[int, Field(ge=1)]
_SHA256 = r"^[0-9a-f]{64}$"
_NAME = r"^\w[\w.-]*$"
_ADDRESS = r"^https?://\S+$"
_REPOSITORY = r"^[\w.-]+/[\w.-]+$"
FORMS = {
    _SHA256: "64 hexadecimal digits, as sha256sum prints them",
    _NAME: "a name of letters, digits, _, . and -",
    _ADDRESS: "an address that begins with http:// or https://",
    _REPOSITORY: "a repository of the hub as owner/name",
}
"""What texts of each pattern are, in words."""

Sha256 = Annotated[str, StringConstraints(pattern=_SHA256)]
Name = Annotated[str, StringConstraints(pattern=_NAME)]  # of a file or folder that is made


class Misdeclared(ValueError):
    """A value that contradicts another one.

    Attributes:
        at: the keys that lead to it from what was looked at.
        more: other mistakes there.
    """

    def __init__(self, problem: str, *at: str):
        super().__init__(problem)
        self.at = at
        self.more: list[Misdeclared] = []


def raise_all(mistakes: Iterable[Misdeclared]) -> None:
    """Raise the first of some mistakes, which has the others in it; nothing where there are none."""
    if found := list(mistakes):
        found[0].more = found[1:]
        raise found[0]


class Strict(BaseModel):
    """A part of a study.yaml: a key that it does not know is an error."""

    model_config = ConfigDict(extra="forbid", strict=True)


class SourceFile(Strict):
    """What is known of a file: its rows, its bytes, and its checksum."""

    rows: Count | None = None
    bytes: Count | None = None
    sha256: Sha256 | None = None


class Source(SourceFile):
    """What `recipe data fetch` downloads: a file at an address or of a hub's repository, or a data set of a hub.

    Attributes:
        url: the address of a file, which is kept as it is, or of a zip.
        files: those of a zip that are wanted, by their names without folders; its `bytes` are then about.
        hub: the id of a hub's repository.
        kind: what that holds: `dataset`, of which a split is written as JSON lines, or `model`, of which the file is
            taken that the source is named after.
        file: of a repository of kind `model`, where the source is not named after it.
        config: of a data set that has several.
        revision: the commit that is meant.
    """

    url: Annotated[str, StringConstraints(pattern=_ADDRESS)] | None = None
    files: dict[str, SourceFile] | None = None
    hub: Annotated[str, StringConstraints(pattern=_REPOSITORY)] | None = None
    kind: Literal["dataset", "model"] = "dataset"
    file: Text | None = None
    config: str | None = None
    split: str = "train"
    revision: Text | None = None

    @model_validator(mode="after")
    def _is_one_thing(self) -> Self:
        if (self.url is None) == (self.hub is None):
            raise Misdeclared("a source has either url, the address of a file, or hub, the id of a repository")
        of_hub = [key for key in ("kind", "file", "config", "split", "revision") if key in self.model_fields_set]
        if self.url is not None and of_hub:
            raise Misdeclared("is for a source with hub; this one has url, so delete it", of_hub[0])
        if self.hub is not None and self.files is not None:
            raise Misdeclared("is for a zip at a url; give each file of a repository a source of its own", "files")
        if self.hub is not None and self.revision is None:
            raise Misdeclared("give revision, the commit that is meant; a branch changes", "hub")
        of_kind = {"dataset": ("file",), "model": ("config", "split", "rows")}
        for key in of_kind[self.kind]:
            if self.hub and key in self.model_fields_set:
                raise Misdeclared(f"is not for kind {self.kind}; delete it", key)
        if self.files == {}:
            raise Misdeclared("list the files in the zip that are wanted", "files")
        return self


class PreparedFormat(Strict):
    """A format that rows can have, the folder for them, and the reason to use it.

    Attributes:
        row: expressions in the place of some of the study's.
    """

    folder: Text
    what: str = ""
    why: str = ""
    row: dict[str, Text] = {}


class Subset(Strict):
    """Rows of the test file: those that a file beside study.yaml lists, or a draw with a seed."""

    title: Text
    rows: Count
    positions: Name | None = None
    seed: int | None = None

    @model_validator(mode="after")
    def _is_listed_or_drawn(self) -> Self:
        if (self.positions is None) == (self.seed is None):
            raise Misdeclared("a subset has either positions, a file that lists its rows, or seed, to draw them")
        return self


class Order(Strict):
    """Runs of so many rows, each sorted by the value of an expression, longest first."""

    buckets: Count
    longest_first: Text


class Split(Strict):
    """Rows of a raw file, or drawn out of another split; by default all that are kept.

    Attributes:
        from_, out_of: the raw file, or the split that rows are drawn from, and then not in.
        draw: how many rows to draw at random.
        seed: of that draw.
        take: how many rows to take from the beginning.
        rows: how many there will be, where that is known and follows from nothing else.
        row, drop: expressions in the place of all of the study's, for a raw file with other fields.
        order: in which order they are written.
        tokens: of all rows as trained on, without padding, by base_model.
        subsets: of the test rows, by the names of the files that they become.
    """

    model_config = ConfigDict(extra="forbid", validate_by_alias=True, validate_by_name=True)

    from_: Text | None = Field(None, alias="from")
    out_of: str | None = None
    draw: Count | None = None
    seed: int | None = None
    take: Count | None = None
    rows: Count | None = None
    row: dict[str, Text] | None = None
    drop: dict[str, Text] | None = None
    order: Order | None = None
    tokens: dict[Text, Count] = {}
    subsets: dict[Name, Subset] = {}

    @model_validator(mode="after")
    def _has_one_origin(self) -> Self:
        if (self.from_ is None) == (self.out_of is None):
            raise Misdeclared("a split has either from, the name of a raw file, or out_of, the name of another split")
        if self.draw and self.take:
            raise Misdeclared("a split has draw or take, not both", "take")
        if self.out_of and not self.draw:
            raise Misdeclared("give draw, how many rows to draw out of it", "out_of")
        if self.out_of and (own := next((key for key in ("row", "drop") if getattr(self, key) is not None), None)):
            raise Misdeclared(f"rows out of {self.out_of} are made as that split's; delete it", own)
        if self.draw is None and self.seed is not None:
            raise Misdeclared("is of a draw; give draw too, or delete it", "seed")
        return self


class Data(Strict):
    """Where a study's data is published, and how it is prepared.

    Attributes:
        key: its name in `recipe data fetch`.
        source: the page that it is published on.
        sources: what is downloaded, by name.
        row: the fields of a prepared row, each as an expression over the raw one.
        carry: further fields of rows that are scored.
        drop: which rows are left out: expressions over the raw row and the prepared fields, by reason.
        input_formats: by name, the study's own first.
        scored_on: the test set that the published scores are on: `test`, or one of its subsets.
        sample: a folder beside study.yaml with a few rows for rehearsals, under the names of the raw files.
    """

    key: Name
    name: Text
    source: Text
    licence: Text
    paper: str = ""
    sources: Annotated[dict[str, Source], Field(min_length=1)]
    row: dict[str, Text]
    carry: dict[str, Text] = {}
    drop: dict[Text, Text] = {}
    input_formats: dict[str, PreparedFormat] = {}
    splits: dict[str, Split]
    scored_on: str = "test"
    sample: Name | None = None

    @property
    def raw(self) -> Path:
        """The folder for the files as they are published."""
        return Path("data", f"{self.key}-raw")

    @property
    def files(self) -> dict[str, SourceFile]:
        """What is known of the files that `recipe data fetch` puts there, by name."""
        return {
            name: known
            for source_name, source in self.sources.items()
            for name, known in (source.files or {source_name: source}).items()
        }

    def sources_of(self, files: Collection[str]) -> list[str]:
        """The sources that give some files."""
        return [name for name, source in self.sources.items() if any(file in files for file in source.files or (name,))]

    @property
    def formats(self) -> dict[str, PreparedFormat]:
        """The formats that rows can have; if the study declares none, its only one."""
        return self.input_formats or {"default": PreparedFormat(folder=f"data/{self.key}")}

    @property
    def subsets(self) -> dict[str, Subset]:
        """The test set's subsets."""
        return self.splits["test"].subsets if "test" in self.splits else {}

    def title_of(self, test_set: str) -> str:
        """A test set in words."""
        return self.subsets[test_set].title if test_set in self.subsets else "the whole test set"

    @property
    def scored_rows(self) -> int | None:
        """How many rows the published scores are on, where that is known."""
        subset = self.subsets.get(self.scored_on)
        return subset.rows if subset else self.rows_of("test")

    def raw_file(self, split: str) -> str:
        """The name of the raw file that a split's rows are in."""
        declared = self.splits[split]
        return declared.from_ or self.raw_file(str(declared.out_of))

    @property
    def raw_files(self) -> list[str]:
        """The names of the raw files that splits are made of."""
        return list(dict.fromkeys(map(self.raw_file, self.splits)))

    def row_of(self, split: str, input_format: str, instead: Mapping[str, str] | None = None) -> dict[str, str]:
        """The expressions for the fields of a split's rows, some replaced by other ones."""
        row = self.row if (own := self._made_as(split).row) is None else own
        others = self.formats[input_format].row | dict(instead or {})
        return row | {field: text for field, text in others.items() if field in row}

    def drop_of(self, split: str) -> dict[str, str]:
        """The expressions for the rows that a split is without."""
        return self.drop if (own := self._made_as(split).drop) is None else own

    def rows_of(self, split: str) -> int | None:
        """How many rows a split will have; None where that is not known, as some may be left out."""
        if (declared := self.splits.get(split)) is None:
            return None
        if chosen := declared.rows or declared.draw or declared.take:
            return chosen
        known = self.files[self.raw_file(split)].rows
        gone = sum(other.draw or 0 for other in self.splits.values() if other.out_of == split)
        return None if known is None or self.drop_of(split) else known - gone

    def _made_as(self, split: str) -> Split:
        declared = self.splits[split]
        return self._made_as(declared.out_of) if declared.out_of else declared

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Self:
        raise_all(self._mistakes())
        return self

    def _mistakes(self) -> Iterator[Misdeclared]:
        names = [name for key, source in self.sources.items() for name in source.files or (key,)]
        for name, count in Counter(names).items():
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts or "\\" in name:
                yield Misdeclared(f"{name!r} leads out of the folder; name a file in it", "sources")
            if count > 1:
                yield Misdeclared(f"{count} sources give a file {name}; name one otherwise", "sources")
        unknown = sorted(self.splits.keys() - set(SPLITS))
        if unknown or not self.splits:
            yield Misdeclared(f"the splits are {', '.join(SPLITS)}", "splits", *unknown[:1])
        for split, declared in self.splits.items():
            yield from self._mistakes_of(split, declared)
        test_sets = ["test", *self.subsets] if "test" in self.splits else []
        if test_sets and self.scored_on not in test_sets:
            there = did_you_mean(self.scored_on, test_sets) or f"; there are {', '.join(test_sets)}"
            yield Misdeclared(f"no test set {self.scored_on}{there}", "scored_on")
        folders = {str(self.raw): "the raw files"}
        for name, form in self.input_formats.items():
            if (folder := str(Path(form.folder))) in folders:
                yield Misdeclared(f"is that of {folders[folder]}; give it another", "input_formats", name, "folder")
            folders[folder] = name
            for field in form.row.keys() - self.row.keys():
                there = f"there are {', '.join(self.row)}"
                yield Misdeclared(f"is no field of row; {there}", "input_formats", name, "row", field)
        for field in sorted(self.row.keys() & {*self.carry, "idx"}):
            at = ("carry", field) if field in self.carry else ("row", field)
            yield Misdeclared("is a field that rows which are scored have beside those of row; rename one", *at)

    def absent(self, folder: Path) -> Iterator[Misdeclared]:
        """What study.yaml names and a study's folder does not have."""
        for name, subset in self.subsets.items():
            if subset.positions and not (folder / subset.positions).is_file():
                problem = f"no file {subset.positions} beside study.yaml; it holds the list rows of positions, from 0"
                yield Misdeclared(problem, "splits", "test", "subsets", name, "positions")
        if self.sample and not any((folder / self.sample / name).is_file() for name in self.raw_files):
            problem = f"no folder {self.sample} with {' or '.join(self.raw_files)} beside study.yaml"
            yield Misdeclared(f"{problem}; put a few rows there, or delete the key", "sample")

    def _mistakes_of(self, split: str, declared: Split) -> Iterator[Misdeclared]:
        at = "splits", split
        if declared.from_ is not None:
            suffix = PurePosixPath(declared.from_.removesuffix(".gz")).suffix
            if declared.from_ not in self.files:
                there = did_you_mean(declared.from_, self.files) or f"; there are {', '.join(self.files)}"
                yield Misdeclared(f"no source gives a file {declared.from_}{there}", *at, "from")
            elif suffix not in ROWS:
                yield Misdeclared(f"rows are read from {', '.join(ROWS)}, each also with .gz", *at, "from")
        elif declared.out_of not in self.splits or self.splits[declared.out_of].from_ is None:
            yield Misdeclared("name another split, one with from", *at, "out_of")
        if declared.subsets and split != "test":
            yield Misdeclared("are of test only; delete them here", *at, "subsets")
        for name in declared.subsets:
            if name in SPLITS:
                yield Misdeclared("is a split's name; choose another", *at, "subsets", name)
