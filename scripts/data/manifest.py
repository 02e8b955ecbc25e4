"""The manifest beside prepared rows: what was read for them, what was left out, and whether they are a study's."""

from pathlib import Path
from typing import Any

from .. import __version__
from ..base.files import clear_parts, read_json, sha256, write_json
from .declaration import SPLITS
from .draws import method
from .study import Study

MANIFEST = "manifest.json"
Entry = dict[str, Any]


def entries(out: Path) -> dict[str, Entry]:
    """The splits in a folder's manifest; empty if it has no such mapping."""
    splits = read_json(out / MANIFEST).get("splits")
    return splits if isinstance(splits, dict) else {}


def update(out: Path, splits: dict[str, Entry]) -> dict[str, Any]:
    """Put the entries of some splits into the manifest; removes earlier subsets that there are no more."""
    former = entries(out)
    clear_parts(out / MANIFEST)
    manifest = {"made_by": f"qlora-recipes {__version__}", "splits": former | splits}
    write_json(out / MANIFEST, manifest)
    if "test" in splits:
        for key in former.get("test", {}).get("subsets", {}).keys() - splits["test"]["subsets"]:
            (out / f"{key}.jsonl").unlink(missing_ok=True)  # of the test rows before these
    return manifest


def table(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """A manifest's files, a row each: what was read for it, and what of that is not in it."""
    raw_file = {True: "the study's", False: "not the study's", None: "the study's, as far as is known"}
    rows = []
    for split in manifest["splits"].values():
        elsewhere = split.get("drawn_out", {})
        left_out = split["dropped"] | {f"in {name}.jsonl": count for name, count in elsewhere.items()}
        rest = "not drawn" if "seed" in (split["drawn"] or {}) else "behind those taken"
        left_out[rest] = split["kept"] - split["rows"] - sum(elsewhere.values())
        rows.append(
            {
                "file": split["file"],
                "rows": split["rows"],
                "read": split["read"],
                "left out": ", ".join(f"{count} ({why})" for why, count in left_out.items() if count) or "none",
                "repeated rows kept": split["duplicates_kept"],
                "raw file": raw_file[split["is_the_study_file"]],
            }
        )
        drawn = {"read": None, "left out": None, "repeated rows kept": None, "raw file": None}
        subsets = split.get("subsets", {}).values()
        rows += [{"file": subset["file"], "rows": subset["rows"]} | drawn for subset in subsets]
    return rows


def is_the_studys(entry: Entry) -> bool:
    """Whether the rows of a split are made of the study's raw file, and by its expressions."""
    return bool(entry.get("is_the_study_file")) and not entry.get("replaced")


def how_made(of_study: Study, split: str, input_format: str, row: dict[str, str]) -> Entry:
    """What the manifest records of how a split's rows are made, where some expressions are not the study's."""
    from .expressions import constants

    data = of_study.data
    fields = data.row_of(split, input_format, row)
    made: Entry = {"row": fields, "drop": data.drop_of(split), "constants": constants(fields)}
    if replaced := sorted(row.keys() & fields):
        made["replaced"] = replaced
    if split == "test":
        made["carry"] = data.carry
    if order := data.splits[split].order:
        made["order"] = order.model_dump()
    return made


def constants_of(entry: Entry) -> dict[str, Any]:
    """The fields that all rows of a split have in common, by its entry; earlier versions knew only the instruction."""
    return entry["constants"] if "constants" in entry else {"instruction": entry["instruction"]}


def _is_made_so(entry: Entry, made: Entry) -> bool:
    """Whether an entry's rows are made in a way. Earlier versions knew rows with an instruction only, the rest of which
    the format's name said."""
    if "row" not in entry:
        return constants_of(entry) == made["constants"]
    return made.items() <= entry.items()


def is_not_prepared(of_study: Study, out: Path, input_format: str) -> str | None:
    """Why a folder does not hold the study's data in an input format, by its manifest and the files' checksums."""
    splits = entries(out)
    for name in (split for split in SPLITS if split in of_study.data.splits):
        entry = splits.get(name)
        if not entry:
            return f"{MANIFEST} lists no {name}.jsonl"
        made = how_made(of_study, name, input_format, {})
        if entry.get("input_format") != input_format or not _is_made_so(entry, made):
            return f"{name}.jsonl has another input format, or rows made by other expressions"
        if entry.get("is_the_study_file") is False:
            return f"{name}.jsonl is made of another file than the study's"
    test = splits.get("test", {})
    subsets = test.get("subsets", {})
    for name, subset in of_study.data.subsets.items():
        if name not in subsets and name not in test.get("left_out", {}):
            return f"{name}.jsonl is missing"
        if name in subsets and not method(subset, of_study.folder).items() <= subsets[name].items():
            return f"{name}.jsonl has other rows"
    for written in (*splits.values(), *subsets.values()):
        file = out / str(written.get("file"))
        if not file.is_file() or sha256(file) != written.get("sha256"):
            return f"{file.name} is not as {MANIFEST} says"
    return None
