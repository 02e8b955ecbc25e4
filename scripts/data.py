"""CodeReviewer rows into the instruction, input and output that Axolotl's `alpaca` type reads."""

import hashlib
import random
import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import IO, Any

import orjson

from . import __version__
from .errors import UserError
from .files import json_rows, replacing
from .study import Data

SPLITS = ("train", "valid", "test")
MANIFEST = "manifest.json"


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


def _rows(stream: IO[bytes], split: Split, as_input: Callable[[str], str], instruction: str) -> Iterator[bytes]:
    """The kept rows of a raw stream as JSON lines; counts into `split` as it goes."""
    seen: set[bytes] = set()
    digest = hashlib.sha256()

    def lines() -> Iterator[bytes]:
        for line in stream:
            digest.update(line)
            split.source_bytes += len(line)
            yield line

    for row in json_rows(lines(), split.source, ("patch", "msg")):
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
        yield orjson.dumps({"instruction": instruction, "input": shown, "output": msg}) + b"\n"
    split.source_sha256 = digest.hexdigest()


def _sample(rows: Iterator[bytes], size: int, seed: int) -> Iterator[bytes]:
    """`size` rows drawn at random, each with the same chance, in their order; all of them where size is 0."""
    if not size:
        yield from rows
        return
    chance = random.Random(seed)
    drawn: list[tuple[int, bytes]] = []
    for i, row in enumerate(rows):
        if i < size:
            drawn.append((i, row))
        elif (j := chance.randrange(i + 1)) < size:
            drawn[j] = i, row
    yield from (row for _, row in sorted(drawn))


def prepare(
    raw: list[Path],
    out: Path,
    data: Data,
    input_format: str = "diff",
    instruction: str | None = None,
    valid_rows: int = 1000,
    seed: int = 42,
) -> dict[str, Any]:
    """Write train.jsonl, valid.jsonl and test.jsonl, as far as raw files for them are given, and a manifest.

    Rows are read as a stream, and nothing is replaced before every row of every file was read well.

    Args:
        raw: CodeReviewer's msg-{train,valid,test}.jsonl, or the zip that holds them.
        out: the folder to write to.
        data: the study's data: its instruction and the checksums known of its files.
        input_format: `diff`, the patch as it is, or `tagged`, see `tagged`.
        instruction: another instruction than the study's.
        valid_rows: how many rows to draw for valid.jsonl; 0 keeps all.
        seed: the seed of that draw.

    Returns:
        The manifest: per split the rows read, kept, dropped by reason and duplicate, and checksums of the
        raw file and of what was written. Duplicates are counted and kept, as in the study.

    Raises:
        UserError: a file is missing, empty, or has a row that is no CodeReviewer row.
    """
    instruction = instruction or data.instruction
    for file in raw:
        if file.resolve() in {(out / f"{name}.jsonl").resolve() for name in SPLITS}:
            raise UserError(f"{file}: would be overwritten; write to another folder with --out")
    splits: dict[str, Any] = {}
    with ExitStack() as stack, _zip_errors(), _opened(raw) as found:
        for name in (split for split in SPLITS if split in found):
            label, stream = found[name]
            split = Split(label)
            rows = _rows(stream, split, INPUT_FORMATS[input_format], instruction)
            size = valid_rows if name == "valid" else 0
            digest, written = hashlib.sha256(), 0
            target = stack.enter_context(replacing(out / f"{name}.jsonl"))
            for row in _sample(rows, size, seed):
                target.write(row)
                digest.update(row)
                written += 1
            if not written:
                raise UserError(f"{label}: no row is left to write; {dict(split.dropped) or 'it has none'}")
            known = data.files.get(f"msg-{name}.jsonl")
            splits[name] = {
                "input_format": input_format,
                "instruction": instruction,
                "source": label,
                "source_sha256": split.source_sha256,
                "source_bytes": split.source_bytes,
                "is_the_study_file": split.source_sha256 == known.sha256 if known and known.sha256 else None,
                "read": split.read,
                "kept": split.kept,
                "dropped": dict(split.dropped),
                "duplicates_kept": split.duplicates,
                "drawn": {"rows": written, "seed": seed} if size and written < split.kept else None,
                "file": f"{name}.jsonl",
                "rows": written,
                "sha256": digest.hexdigest(),
            }
    manifest = {
        "made_by": f"qlora-recipes {__version__}",
        "splits": _former(out) | splits,
    }
    with replacing(out / MANIFEST) as stream:
        stream.write(orjson.dumps(manifest, option=orjson.OPT_INDENT_2) + b"\n")
    return manifest


def _former(out: Path) -> dict[str, Any]:
    """The splits of an earlier manifest in the same folder, which stay."""
    try:
        splits = orjson.loads((out / MANIFEST).read_bytes())["splits"]
    except (OSError, orjson.JSONDecodeError, TypeError, KeyError):
        return {}
    return splits if isinstance(splits, dict) else {}
