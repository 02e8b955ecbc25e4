"""CodeReviewer rows into the instruction, input and output that Axolotl's `alpaca` type reads."""

import hashlib
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
from .draws import Draw, Listed, Written, draws
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
class Source:
    """The raw rows of a split, and what rows are to be made of them."""

    label: str
    stream: IO[bytes]
    input_format: str
    instruction: str


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


def _rows(source: Source, split: Split, for_scores: bool) -> Iterator[tuple[int, bytes]]:
    """The kept rows of a source as JSON lines, each with its position; counts into `split` as it goes.

    Rows that scores are made of also carry that position, as `idx`, and their language.
    """
    seen: set[bytes] = set()
    digest = hashlib.sha256()

    def lines() -> Iterator[bytes]:
        for line in source.stream:
            digest.update(line)
            split.source_bytes += len(line)
            yield line

    for idx, row in enumerate(json_rows(lines(), split.source, ("patch", "msg"))):
        split.read += 1
        patch, msg = row["patch"], row["msg"]
        shown = INPUT_FORMATS[source.input_format](patch)
        if not msg.strip() or not shown.strip():
            split.dropped["empty msg" if not msg.strip() else "empty patch"] += 1
            continue
        key = hashlib.blake2b(f"{patch}\0{msg}".encode(errors="surrogatepass"), digest_size=8).digest()
        split.duplicates += key in seen
        seen.add(key)
        split.kept += 1
        made = {"instruction": source.instruction, "input": shown, "output": msg}
        if for_scores:
            made |= {"idx": idx, "lang": row.get("lang")}
        yield idx, orjson.dumps(made) + b"\n"
    split.source_sha256 = digest.hexdigest()


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
            source = Source(*found[name], input_format, instruction)
            draw = Draw(valid_rows, seed) if name == "valid" and valid_rows else None
            chosen = draws(of_study, subsets, seed) if name == "test" else {}
            splits[name] = _write_split(stack, out, name, source, draw, chosen, of_study)
        stack.close()  # puts the files in place
        return _account(out, splits)


def _write_split(
    stack: ExitStack,
    out: Path,
    name: str,
    source: Source,
    draw: Draw | None,
    chosen: dict[str, Draw | Listed],
    of_study: Study,
) -> dict[str, Any]:
    """Write a split's file, and those of its subsets, once the stack is left; what the manifest says of it.

    Args:
        draw: what draws the rows to keep; None keeps all.
        chosen: the subsets, by the names of their files.
    """
    split, whole = Split(source.label), Written(stack, out / f"{name}.jsonl")
    for idx, row in _rows(source, split, for_scores=name == "test"):
        if draw:
            draw.offer(idx, row)
        else:
            whole.add(row)
        for subset in chosen.values():
            subset.offer(idx, row)
    for row in draw.rows() if draw else ():
        whole.add(row)
    if not whole.rows:
        raise UserError(f"{source.label}: no row is left to write; {dict(split.dropped) or 'it has none'}")
    of_study_file = _is(of_study.data.files.get(f"msg-{name}.jsonl"), split)
    made, left_out = {}, {}
    for key, subset in chosen.items():
        if reason := subset.missing(bool(of_study_file)):
            left_out[key] = reason
            continue
        part = Written(stack, out / f"{key}.jsonl")
        for row in subset.rows():
            part.add(row)
        made[key] = subset.about | part.as_json()
    return {
        "input_format": source.input_format,
        "instruction": source.instruction,
        "source": source.label,
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
    for name, subset in draws(of_study, (), 0).items():
        if name not in made and name not in test.get("left_out", {}):
            return f"{name}.jsonl is missing"
        if name in made and made[name] | subset.about != made[name]:
            return f"{name}.jsonl has other rows"
    for written in [*splits.values(), *made.values()]:
        file = out / str(written.get("file"))
        if not file.is_file() or sha256(file) != written.get("sha256"):
            return f"{file.name} is not as {MANIFEST} says"
    return None


def _former(out: Path) -> dict[str, Any]:
    """The splits of an earlier manifest in the same folder, which stay."""
    splits = read_json(out / MANIFEST).get("splits")
    return splits if isinstance(splits, dict) else {}
