"""CodeReviewer rows into the instruction, input and output that Axolotl's `alpaca` type reads."""

import hashlib
import random
import re
import time
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import IO, Any

import orjson

from .. import __version__
from ..base.errors import UserError
from ..base.files import clear_parts, json_rows, making, read_json, replacing, sha256
from ..base.locks import LOOK, PATIENCE, held, is_held
from ..base.progress import say
from .study import Data, SourceFile, Study

SPLITS = ("train", "valid", "test")
MANIFEST = "manifest.json"
LOCK = ".prepare.lock"


def tagged(patch: str) -> str:
    """A patch as the authors' released code writes it: one line, each line of the patch behind a tag.

    The hunk header and blank lines are dropped, the others stripped; `<add>` stands for +, `<del>` for -,
    `<keep>` for the rest.
    """
    tags = {"+": "<add>", "-": "<del>"}
    parts = []
    for line in patch.splitlines():
        content = line[1:].strip()
        if content and not line.startswith("@@"):
            parts.append(tags.get(line[0], "<keep>") + content)
    return "".join(parts)


INPUT_FORMATS: dict[str, Callable[[str], str]] = {"diff": lambda patch: patch, "tagged": tagged}


@dataclass
class Split:
    """What was read of one split and what became of it."""

    source: str
    read: int = 0
    kept: int = 0
    duplicates: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    source_sha256: str = ""
    source_bytes: int = 0


@contextmanager
def _opened(raw: list[Path]) -> Iterator[dict[str, tuple[str, IO[bytes]]]]:
    """The splits found in raw files and zips: each one's label and stream."""
    with ExitStack() as stack:
        found: dict[str, tuple[str, IO[bytes]]] = {}

        def add(name: str, label: str, stream: IO[bytes]) -> None:
            match = re.search(r"(train|valid|test)[^/]*\.jsonl$", name)
            if not match:
                raise UserError(f"{label}: the name of a raw file says train, valid or test, as msg-train.jsonl does")
            if match[1] in found:
                raise UserError(f"{label}: a second file for {match[1]}, after {found[match[1]][0]}")
            found[match[1]] = label, stack.enter_context(stream)

        for file in raw:
            if not file.is_file():
                raise UserError(f"{file}: no such file")
            if file.stat().st_size == 0:
                raise UserError(f"{file}: the file is empty")
            if file.suffix == ".zip":
                archive = stack.enter_context(zipfile.ZipFile(file))
                wanted = {f"msg-{split}.jsonl" for split in SPLITS}
                members = [name for name in archive.namelist() if PurePath(name).name in wanted]
                if not members:
                    raise UserError(f"{file}: holds no msg-train.jsonl, msg-valid.jsonl or msg-test.jsonl")
                for name in members:
                    add(name, f"{file}:{name}", archive.open(name))
            else:
                add(file.name, str(file), file.open("rb"))
        yield found


@contextmanager
def _zip_errors() -> Iterator[None]:
    """Tell what can be wrong with a zip, which shows when it is opened or only while it is read."""
    try:
        yield
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise UserError(f"the zip is damaged ({error}); fetch it again") from None
    except (RuntimeError, NotImplementedError) as error:  # encrypted, or packed by another method
        raise UserError(f"the zip cannot be read: {error}") from None


def _rows(
    stream: IO[bytes], split: Split, as_input: Callable[[str], str], instruction: str, for_scores: bool
) -> Iterator[tuple[int, bytes]]:
    """The kept rows of a raw stream as JSON lines, each with its position; counts into `split` as it goes.

    Rows that scores are made of also carry that position, as `idx`, and their language.
    """
    seen: set[bytes] = set()
    digest = hashlib.sha256()

    def lines() -> Iterator[bytes]:
        for line in stream:
            digest.update(line)
            split.source_bytes += len(line)
            yield line

    for idx, row in enumerate(json_rows(lines(), split.source, ("patch", "msg"))):
        split.read += 1
        patch, msg = row["patch"], row["msg"]
        shown = as_input(patch)
        if not msg.strip() or not shown.strip():
            split.dropped["empty msg" if not msg.strip() else "empty patch"] += 1
            continue
        key = hashlib.blake2b(f"{patch}\0{msg}".encode(errors="surrogatepass"), digest_size=8).digest()
        split.duplicates += key in seen
        seen.add(key)
        split.kept += 1
        made = {"instruction": instruction, "input": shown, "output": msg}
        if for_scores:
            made |= {"idx": idx, "lang": row.get("lang")}
        yield idx, orjson.dumps(made) + b"\n"
    split.source_sha256 = digest.hexdigest()


class _Draw:
    """`size` rows drawn at random, each with the same chance, in their order; all where there are no more."""

    def __init__(self, size: int, seed: int):
        self.about = {"rows": size, "seed": seed}
        self._size, self._chance = size, random.Random(seed)
        self._offered = 0
        self._drawn: list[tuple[int, bytes]] = []

    def offer(self, idx: int, row: bytes) -> None:
        self._offered += 1
        if len(self._drawn) < self._size:
            self._drawn.append((idx, row))
        elif (place := self._chance.randrange(self._offered)) < self._size:
            self._drawn[place] = idx, row

    def missing(self, of_study_file: bool) -> str | None:
        return f"only {self._offered} rows to draw from" if self._offered < self._size else None

    def rows(self) -> list[bytes]:
        return [row for _, row in sorted(self._drawn)]


class _Listed:
    """The rows at the positions that a file lists, in the order of that list; they count in the study's file only."""

    def __init__(self, file: Path):
        self.about = {"positions": file.name, "sha256_of_positions": sha256(file)}
        self._positions: list[int] = read_json(file)["rows"]
        self._wanted = set(self._positions)
        self._found: dict[int, bytes] = {}

    def offer(self, idx: int, row: bytes) -> None:
        if idx in self._wanted:
            self._found[idx] = row

    def missing(self, of_study_file: bool) -> str | None:
        return None if of_study_file else "its positions are of the study's msg-test.jsonl, which this is not"

    def rows(self) -> list[bytes]:
        return [self._found[idx] for idx in self._positions if idx in self._found]


def _subsets(of_study: Study, sizes: Sequence[int], seed: int) -> dict[str, _Draw | _Listed]:
    """The study's subsets of its test rows, and draws of other sizes."""
    made: dict[str, _Draw | _Listed] = {f"test-{size}": _Draw(size, seed) for size in sizes}
    for name, subset in of_study.data.subsets.items():
        listed = subset.positions
        made[name] = _Listed(of_study.folder / listed) if listed else _Draw(subset.rows, subset.seed or 0)
    return made


def prepare(
    raw: list[Path],
    out: Path,
    of_study: Study,
    input_format: str = "diff",
    instruction: str | None = None,
    valid_rows: int = 1000,
    subsets: Sequence[int] = (),
    seed: int = 42,
    patience: float = LOOK,
) -> dict[str, Any]:
    """Write train.jsonl, valid.jsonl and test.jsonl, as far as raw files for them are given, and a manifest.

    Beside test.jsonl go the study's subsets of it. Rows are read as a stream, and nothing is replaced before
    every row of every file was read well.

    Args:
        raw: CodeReviewer's msg-{train,valid,test}.jsonl, or the zip that holds them.
        out: the folder to write to.
        of_study: its data's instruction, subsets, and the checksums known of its files.
        input_format: `diff`, the patch as it is, or `tagged`, see `tagged`.
        instruction: another instruction than the study's.
        valid_rows: how many rows to draw for valid.jsonl; 0 keeps all.
        subsets: sizes of further draws from the test rows, each for a test-<size>.jsonl.
        seed: the seed of these draws.
        patience: seconds to wait for another process that is preparing data in the same folder.

    Returns:
        The manifest: per split the rows read, kept, dropped by reason and duplicate, and checksums of the
        raw file and of what was written. Duplicates are counted and kept, as in the study.

    Raises:
        UserError: a file is missing, empty, or has a row that is no CodeReviewer row, or another process is preparing
            data in the folder.
    """
    instruction = instruction or of_study.data.instruction
    for file in raw:
        if file.resolve() in {(out / f"{name}.jsonl").resolve() for name in SPLITS}:
            raise UserError(f"{file}: would be overwritten; write to another folder with --out")
    splits: dict[str, Any] = {}
    with _zip_errors(), _opened(raw) as found, _held(out, patience), ExitStack() as stack:
        for name in (split for split in SPLITS if split in found):
            label, stream = found[name]
            split = Split(label)
            draw = _Draw(valid_rows, seed) if name == "valid" and valid_rows else None
            chosen = _subsets(of_study, subsets, seed) if name == "test" else {}
            whole = _Written(stack, out / f"{name}.jsonl")
            for idx, row in _rows(stream, split, INPUT_FORMATS[input_format], instruction, name == "test"):
                if draw:
                    draw.offer(idx, row)
                else:
                    whole.add(row)
                for subset in chosen.values():
                    subset.offer(idx, row)
            for row in draw.rows() if draw else ():
                whole.add(row)
            if not whole.rows:
                raise UserError(f"{label}: no row is left to write; {dict(split.dropped) or 'it has none'}")
            known = of_study.data.files.get(f"msg-{name}.jsonl")
            of_study_file = _is(known, split)
            made, left_out = {}, {}
            for key, subset in chosen.items():
                if reason := subset.missing(bool(of_study_file)):
                    left_out[key] = reason
                    continue
                part = _Written(stack, out / f"{key}.jsonl")
                for row in subset.rows():
                    part.add(row)
                made[key] = subset.about | part.as_json()
            splits[name] = {
                "input_format": input_format,
                "instruction": instruction,
                "source": label,
                "source_sha256": split.source_sha256,
                "source_bytes": split.source_bytes,
                "is_the_study_file": of_study_file,
                "read": split.read,
                "kept": split.kept,
                "dropped": dict(split.dropped),
                "duplicates_kept": split.duplicates,
                "drawn": draw.about if draw and whole.rows < split.kept else None,
                **whole.as_json(),
                **({"subsets": made, "left_out": left_out} if chosen else {}),
            }
        stack.close()  # puts the files in place
        return _account(out, splits)


@contextmanager
def _held(out: Path, patience: float) -> Iterator[None]:
    """Let no other process prepare data in a folder meanwhile."""
    with making(out), held(out / LOCK, "another preparation is going on", patience, remove=True):
        yield


def wait_for_others(out: Path) -> None:
    """Return once no other process is preparing data in a folder, or after `PATIENCE` seconds."""
    deadline = time.monotonic() + PATIENCE
    if is_held(out / LOCK):
        say(f"{out}: waiting for another process that prepares it")
    while is_held(out / LOCK) and time.monotonic() < deadline:
        time.sleep(0.1)


def _account(out: Path, splits: dict[str, Any]) -> dict[str, Any]:
    """The manifest, written anew with some splits in the place of those before, whose further subsets are removed."""
    former = _former(out)
    clear_parts(out / MANIFEST)
    manifest = {
        "made_by": f"qlora-recipes {__version__}",
        "splits": former | splits,
    }
    with replacing(out / MANIFEST) as stream:
        stream.write(orjson.dumps(manifest, option=orjson.OPT_INDENT_2) + b"\n")
    if "test" in splits:
        for key in former.get("test", {}).get("subsets", {}).keys() - splits["test"]["subsets"]:
            (out / f"{key}.jsonl").unlink(missing_ok=True)  # of the test rows before these
    return manifest


def _is(known: SourceFile | None, split: Split) -> bool | None:
    """Whether what was read is a file of the study; None where it has as many rows, and no checksum is known."""
    if known is None or (known.sha256 is None and split.read == known.rows):
        return None
    return split.source_sha256 == known.sha256


def fetched(data: Data) -> list[Path]:
    """The raw files that `recipe data fetch` left.

    Raises:
        UserError: it left none.
    """
    files = [data.raw / name for name in data.files]
    if missing := [file for file in files if not file.is_file()]:
        raise UserError(f"{missing[0]}: no such file; `recipe data fetch {data.key}` gets it, or name RAW files")
    return files


def is_not_prepared(of_study: Study, out: Path, input_format: str) -> str | None:
    """Why a folder does not hold the study's data in one form, as its manifest and the files themselves tell."""
    splits = _former(out)
    test = splits.get("test", {})
    made: dict[str, Any] = test.get("subsets", {})
    for name in SPLITS:
        split = splits.get(name, {})
        if not split:
            return f"{MANIFEST} knows no {name}.jsonl"
        if split.get("input_format") != input_format or split.get("instruction") != of_study.data.instruction:
            return f"{name}.jsonl has another input format or instruction"
        if split.get("is_the_study_file") is False:
            return f"{name}.jsonl is made of another file than the study's"
    for name, subset in _subsets(of_study, (), 0).items():
        if name not in made and name not in test.get("left_out", {}):
            return f"{name}.jsonl is missing"
        if name in made and made[name] | subset.about != made[name]:
            return f"{name}.jsonl has other rows"
    for written in [*splits.values(), *made.values()]:
        file = out / str(written.get("file"))
        if not file.is_file() or sha256(file) != written.get("sha256"):
            return f"{file.name} is not as {MANIFEST} says"
    return None


class _Written:
    """A file that takes its place when the stack is left well, and what was written to it."""

    def __init__(self, stack: ExitStack, file: Path):
        self.rows = 0
        self._file, self._digest = file, hashlib.sha256()
        clear_parts(file)
        self._stream = stack.enter_context(replacing(file))

    def add(self, row: bytes) -> None:
        self._stream.write(row)
        self._digest.update(row)
        self.rows += 1

    def as_json(self) -> dict[str, Any]:
        return {"file": self._file.name, "rows": self.rows, "sha256": self._digest.hexdigest()}


def _former(out: Path) -> dict[str, Any]:
    """The splits of an earlier manifest in the same folder, which stay."""
    splits = read_json(out / MANIFEST).get("splits")
    return splits if isinstance(splits, dict) else {}
