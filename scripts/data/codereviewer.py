"""Turns CodeReviewer's rows into the instruction, input and output that Axolotl's `alpaca` type reads."""

import hashlib
import re
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path, PurePath
from typing import IO, Any

import orjson

from .. import __version__
from ..base.errors import UserError
from ..base.files import DAMAGED_ZIP, Output, clear_parts, json_rows, making, read_json, sha256, write_json
from ..base.locks import LOOK, PATIENCE, held, is_held
from ..base.progress import say
from .draws import PlacedRow, choose, draw, method, obstacle
from .study import SPLITS, Data, SourceFile, Study, Subset

MANIFEST = "manifest.json"
PREPARE_LOCK = ".prepare.lock"


def tagged(patch: str) -> str:
    """A patch as the authors' released code writes it: on one line, with a tag before each line of the patch.

    The hunk header and blank lines are dropped, the others stripped; `<add>` stands for +, `<del>` for -,
    `<keep>` for the rest.
    """
    tags = {"+": "<add>", "-": "<del>"}
    lines = (line for line in patch.splitlines() if line[1:].strip() and not line.startswith("@@"))
    return "".join(tags.get(line[0], "<keep>") + line[1:].strip() for line in lines)


INPUT_FORMATS: dict[str, Callable[[str], str]] = {"diff": str, "tagged": tagged}


@dataclass
class RawSplit:
    """A raw file of one split, the format to write its rows in, and how many were read, kept and dropped so far."""

    label: str
    stream: IO[bytes]
    input_format: str
    instruction: str
    digest: Any = field(default_factory=hashlib.sha256)
    read: int = 0
    kept: int = 0
    duplicates: int = 0
    dropped: Counter[str] = field(default_factory=Counter)


def _raw_files(raw: list[Path], stack: ExitStack) -> Iterator[tuple[str, IO[bytes]]]:
    """The label and stream of each raw file, and of those within folders and zips; the stack closes them."""
    names = [f"msg-{split}.jsonl" for split in SPLITS]
    none = "holds no msg-train.jsonl, msg-valid.jsonl or msg-test.jsonl"
    for folder in filter(Path.is_dir, raw):
        if not any((folder / name).is_file() for name in names):
            raise UserError(f"{folder}: {none}; name the folder or the files that are to be prepared")
    inside = ([file / name for name in names if (file / name).is_file()] if file.is_dir() else [file] for file in raw)
    for file in chain.from_iterable(inside):
        if not file.is_file():
            raise UserError(f"{file}: no such file")
        if file.stat().st_size == 0:
            raise UserError(f"{file}: the file is empty")
        if file.suffix != ".zip":
            yield str(file), stack.enter_context(file.open("rb"))
            continue
        archive = stack.enter_context(zipfile.ZipFile(file))
        members = [name for name in archive.namelist() if PurePath(name).name in names]
        if not members:
            raise UserError(f"{file}: {none}")
        for name in members:
            yield f"{file}:{name}", stack.enter_context(archive.open(name))


def _by_split(raw: list[Path], stack: ExitStack) -> dict[str, tuple[str, IO[bytes]]]:
    """The label and stream of the raw file of each split."""
    splits: dict[str, tuple[str, IO[bytes]]] = {}
    for label, stream in _raw_files(raw, stack):
        match = re.search(r"(train|valid|test)[^/]*\.jsonl$", stream.name)
        if not match:
            raise UserError(f"{label}: the name of a raw file says train, valid or test, as msg-train.jsonl does")
        if match[1] in splits:
            raise UserError(f"{label}: a second file for {match[1]}, after {splits[match[1]][0]}")
        splits[match[1]] = label, stream
    return splits


@contextmanager
def _zip_errors() -> Iterator[None]:
    """Report what can be wrong with a zip, which shows when it is opened or only while it is read."""
    try:
        yield
    except DAMAGED_ZIP as error:
        raise UserError(f"the zip is damaged ({error}); fetch it again") from None
    except RuntimeError as error:  # encrypted, or packed by another method
        raise UserError(f"the zip cannot be read: {error}") from None


def _rows(split: RawSplit, for_scores: bool) -> Iterator[PlacedRow]:
    """The rows of a split to keep as JSON lines, each with its position in the raw file.

    Rows that are to be scored also carry that position, as `idx`, and their language.
    """
    seen: set[bytes] = set()

    def lines() -> Iterator[bytes]:
        for line in split.stream:
            split.digest.update(line)
            yield line

    for idx, row in enumerate(json_rows(lines(), split.label, ("patch", "msg"))):
        split.read += 1
        patch = row["patch"]
        msg = row["msg"]
        shown = INPUT_FORMATS[split.input_format](patch)
        if not msg.strip() or not shown.strip():
            split.dropped["empty msg" if not msg.strip() else "empty patch"] += 1
            continue
        key = hashlib.blake2b(f"{patch}\0{msg}".encode(errors="surrogatepass"), digest_size=8).digest()
        split.duplicates += key in seen
        seen.add(key)
        split.kept += 1
        prepared = {"instruction": split.instruction, "input": shown, "output": msg}
        if for_scores:
            prepared |= {"idx": idx, "lang": row.get("lang")}
        yield idx, orjson.dumps(prepared) + b"\n"


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
    """Write train.jsonl, valid.jsonl and test.jsonl, those for which there are raw files, and a manifest.

    The study's subsets of test.jsonl are written beside it. Rows are read as a stream, of which only the prepared rows
    of test.jsonl are held in memory, and no file is replaced before every raw file was read without an error.

    Args:
        raw: CodeReviewer's msg-{train,valid,test}.jsonl, or the zip or folder that holds them.
        out: the folder to write to.
        of_study: gives the instruction, the subsets, and the known checksums of the raw files.
        input_format: `diff`, the patch as it is, or `tagged`, see `tagged`.
        instruction: replaces the study's.
        valid_rows: how many rows to draw for valid.jsonl; 0 keeps all.
        subsets: sizes of further draws from the test rows, each for a test-<size>.jsonl.
        seed: the seed of these draws.
        patience: seconds to wait for another process that is preparing data in the same folder.

    Returns:
        The manifest: for each split the rows read, kept, dropped by reason and duplicate, and checksums of the
        raw file and of what was written. Duplicates are counted and kept, as in the study.

    Raises:
        UserError: a file is missing, empty, or has a row that is not one of CodeReviewer's, or another process is
            preparing data in the folder.
    """
    for file in raw:
        if file.resolve() in {(out / f"{name}.jsonl").resolve() for name in SPLITS}:
            raise UserError(f"{file}: would be overwritten; write to another folder with --out")
    lock = held(out / PREPARE_LOCK, "another preparation is running", patience, remove=True)
    with _zip_errors(), making(out), lock, ExitStack() as stack:
        streams = _by_split(raw, stack)
        draws = {f"test-{size}": Subset(title=f"{size} rows", rows=size, seed=seed) for size in subsets}
        splits: dict[str, Any] = {}
        for name in (split for split in SPLITS if split in streams):
            split = RawSplit(*streams[name], input_format, instruction or of_study.data.instruction)
            splits[name] = _write_split(stack, out, name, split, of_study, valid_rows, draws, seed)
        stack.close()  # puts the files in place
        return _update_manifest(out, splits)


def _write_split(
    stack: ExitStack,
    out: Path,
    name: str,
    split: RawSplit,
    of_study: Study,
    valid_rows: int,
    draws: dict[str, Subset],
    seed: int,
) -> dict[str, Any]:
    """Write a split's file, and subsets of the test rows, which take their places when the stack is closed.

    Args:
        draws: subsets that are not the study's, by the names of their files.

    Returns:
        The manifest's entry.
    """
    kept = _rows(split, for_scores=name == "test")
    test_rows = list(kept) if name == "test" else []
    rows = draw(kept, valid_rows, seed) if name == "valid" and valid_rows else test_rows or kept
    whole = _write(stack, out / f"{name}.jsonl", rows)
    if not whole["rows"]:
        raise UserError(f"{split.label}: no row is left to write; {dict(split.dropped) or 'it has none'}")
    is_study_file = _is(of_study.data.files.get(f"msg-{name}.jsonl"), split)
    entry = {
        "input_format": split.input_format,
        "instruction": split.instruction,
        "source": split.label,
        "source_sha256": split.digest.hexdigest(),
        "source_bytes": split.stream.tell(),
        "is_the_study_file": is_study_file,
        "read": split.read,
        "kept": split.kept,
        "dropped": dict(split.dropped),
        "duplicates_kept": split.duplicates,
        "drawn": {"rows": valid_rows, "seed": seed} if whole["rows"] < split.kept else None,
        **whole,
    }
    if name == "test":
        entry |= {"subsets": {}, "left_out": {}}
        for key, subset in (draws | of_study.data.subsets).items():
            if reason := obstacle(subset, len(test_rows), bool(is_study_file)):
                entry["left_out"][key] = reason
            else:
                chosen = choose(subset, of_study.folder, test_rows)
                entry["subsets"][key] = method(subset, of_study.folder) | _write(stack, out / f"{key}.jsonl", chosen)
    return entry


def _write(stack: ExitStack, file: Path, rows: Iterable[PlacedRow]) -> dict[str, Any]:
    """Write a file of rows, which takes its place when the stack is closed; what the manifest says of it."""
    output = Output(stack, file)
    count = 0
    for _, row in rows:
        output.write(row)
        count += 1
    return {"file": file.name, "rows": count, "sha256": output.sha256()}


def table(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """A manifest's files, a row each: what was read for it, and what of that is not in it."""
    raw_file = {True: "the study's", False: "not the study's", None: "of as many rows as the study's"}
    rows = []
    for split in manifest["splits"].values():
        left_out = dict(split["dropped"]) | {"not drawn": split["kept"] - split["rows"]}
        rows.append(
            {
                "file": split["file"],
                "rows": split["rows"],
                "read": split["read"],
                "left out": ", ".join(f"{count} ({reason})" for reason, count in left_out.items() if count) or "none",
                "repeated rows kept": split["duplicates_kept"],
                "raw file": raw_file[split["is_the_study_file"]],
            }
        )
        drawn = {"read": None, "left out": None, "repeated rows kept": None, "raw file": None}
        subsets = split.get("subsets", {}).values()
        rows += [{"file": subset["file"], "rows": subset["rows"]} | drawn for subset in subsets]
    return rows


def wait_for_others(out: Path) -> None:
    """Return once no other process is preparing data in a folder, or after `PATIENCE` seconds."""
    deadline = time.monotonic() + PATIENCE
    if is_held(out / PREPARE_LOCK):
        say(f"{out}: waiting for another process that prepares it")
    while is_held(out / PREPARE_LOCK) and time.monotonic() < deadline:
        time.sleep(0.1)


def _update_manifest(out: Path, splits: dict[str, Any]) -> dict[str, Any]:
    """Put the entries of some splits into the manifest; removes earlier subsets that there are no more."""
    former = _former(out)
    clear_parts(out / MANIFEST)
    manifest = {"made_by": f"qlora-recipes {__version__}", "splits": former | splits}
    write_json(out / MANIFEST, manifest)
    if "test" in splits:
        for key in former.get("test", {}).get("subsets", {}).keys() - splits["test"]["subsets"]:
            (out / f"{key}.jsonl").unlink(missing_ok=True)  # of the test rows before these
    return manifest


def _former(out: Path) -> dict[str, Any]:
    """The splits in a folder's manifest; empty if it has no such mapping."""
    splits = read_json(out / MANIFEST).get("splits")
    return splits if isinstance(splits, dict) else {}


def _is(known: SourceFile | None, split: RawSplit) -> bool | None:
    """Whether what was read is a file of the study; None if it has as many rows, and no checksum is known."""
    if known is None or (known.sha256 is None and split.read == known.rows):
        return None
    return split.digest.hexdigest() == known.sha256


def fetched(data: Data) -> list[Path]:
    """The raw files that `recipe data fetch` left.

    Raises:
        UserError: it left none.
    """
    files = [data.raw / name for name in data.files]
    if missing := [file for file in files if not file.is_file()]:
        remedy = f"`recipe data fetch {data.key}` gets it, or name a folder that has it"
        raise UserError(f"{missing[0]}: no such file; {remedy}")
    return files


def is_not_prepared(of_study: Study, out: Path, input_format: str) -> str | None:
    """Why a folder does not hold the study's data in an input format, by its manifest and the files' checksums."""
    splits = _former(out)
    for name in SPLITS:
        split = splits.get(name)
        if not split:
            return f"{MANIFEST} lists no {name}.jsonl"
        if split.get("input_format") != input_format or split.get("instruction") != of_study.data.instruction:
            return f"{name}.jsonl has another input format or instruction"
        if split.get("is_the_study_file") is False:
            return f"{name}.jsonl is made of another file than the study's"
    subsets = splits["test"].get("subsets", {})
    for name, subset in of_study.data.subsets.items():
        if name not in subsets and name not in splits["test"].get("left_out", {}):
            return f"{name}.jsonl is missing"
        if name in subsets and not method(subset, of_study.folder).items() <= subsets[name].items():
            return f"{name}.jsonl has other rows"
    for written in (*splits.values(), *subsets.values()):
        file = out / str(written.get("file"))
        if not file.is_file() or sha256(file) != written.get("sha256"):
            return f"{file.name} is not as {MANIFEST} says"
    return None
