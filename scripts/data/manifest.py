"""Manifest of prepared rows, which accounts for every raw row."""

from pathlib import Path

from .. import __version__
from ..base.files import Row, read_json, sha256, write_json
from .declaration import Subset
from .studies import Study

MANIFEST = "manifest.json"


def entries(out: Path) -> dict[str, Row]:
    """Entries of the splits in a folder's manifest."""
    splits = read_json(out / MANIFEST).get("splits")
    if not isinstance(splits, dict):
        return {}
    return {name: entry for name, entry in splits.items() if isinstance(entry, dict)}


def _subsets(splits: dict[str, Row]) -> dict[str, Row]:
    """Entries of the subsets of test rows, by name."""
    return splits.get("test", {}).get("subsets", {})


def lists(out: Path, study: Study, file: Path) -> bool:
    """True if a folder's manifest was written for a study, and lists a file."""
    if read_json(out / MANIFEST).get("study") != study.folder.name:
        return False
    splits = entries(out)
    return file.name in {MANIFEST, *(f"{name}.jsonl" for name in (*splits, *_subsets(splits)))}


def update(out: Path, study: Study, splits: dict[str, Row]) -> Row:
    """Update splits in the manifest, after deleting files of subsets that it will no longer list."""
    former = entries(out)
    if "test" in splits:
        for key in _subsets(former).keys() - splits["test"]["subsets"]:
            (out / Path(f"{key}.jsonl").name).unlink(missing_ok=True)  # a subset of earlier test rows
    made_by = f"qlora-recipes {__version__}"
    manifest = {"made_by": made_by, "study": study.folder.name, "splits": former | splits}
    write_json(out / MANIFEST, manifest)
    return manifest


def table(manifest: Row) -> list[Row]:
    """Table of a manifest's files, with counts of rows read and left out."""
    rows = []
    for split in manifest["splits"].values():
        row = {
            "file": split["file"],
            "rows": split["rows"],
            "read": split["read"],
            "left out": _left_out(split),
            "verified": _VERIFIED[split["is_the_study_file"]],
        }
        rows.append(row)
        for subset in split.get("subsets", {}).values():
            rows.append(dict.fromkeys(row) | {"file": subset["file"], "rows": subset["rows"]})
    return rows


_VERIFIED = {True: "yes", False: "differs", None: None}
"""Cells for the raw files of a split: None if study.yaml has no checksum."""


def _left_out(split: Row) -> str:
    """Number of raw rows that a split leaves out, by reason."""
    moved = split.get("moved", {})
    counts = split["dropped"] | {f"in {name}.jsonl": count for name, count in moved.items()}
    counts["not chosen"] = split["kept"] - split["rows"] - sum(moved.values())
    return ", ".join(f"{count} ({cause})" for cause, count in counts.items() if count) or "none"


def is_the_studys(entry: Row) -> bool:
    """True if an entry's rows come from the study's verified raw file and expressions."""
    return bool(entry.get("is_the_study_file"))


def how_made(study: Study, split: str, input_format: str) -> Row:
    """Part of a manifest entry that describes the preparation of a split."""
    data, declared = study.data, study.data.splits[split]
    entry = {
        "input_format": input_format,
        "raw_files": {name: data.files[name].sha256 for name in (*data.raw_files_of(split), *data.lookups.values())},
        "fields": data.fields_of(split, input_format),
        "filters": data.filters_of(split),
        "extra_fields": data.extra_fields,
        "subset_rows": {name: _how_chosen(subset, study.folder) for name, subset in declared.subsets.items()},
    }
    return entry | declared.model_dump(include={"first", "sample", "seed", "sample_from", "shuffle", "order"})


def _how_chosen(subset: Subset, folder: Path) -> Row:
    """Description of the choice of a subset's rows."""
    if subset.positions is None:
        return {"rows": subset.rows, "seed": subset.seed}
    file = folder / subset.positions
    return {"positions": file.name, "sha256_of_positions": sha256(file)}


def is_not_prepared(study: Study, out: Path, input_format: str) -> str | None:
    """Reason why a folder lacks the study's prepared data; None if it has them.

    Compares the manifest with the study, and the files with their checksums.
    """
    splits = entries(out)
    for name in study.data.splits:
        entry = splits.get(name)
        if not entry:
            return f"{MANIFEST} lists no {name}.jsonl"
        if not how_made(study, name, input_format).items() <= entry.items():
            return f"{name}.jsonl was prepared with another input format, other raw files, expressions or settings"
        if entry.get("is_the_study_file") is False:
            return f"{name}.jsonl was prepared from a file other than the study's"
    for entry in (*splits.values(), *_subsets(splits).values()):
        file = out / str(entry.get("file"))
        if not file.is_file() or sha256(file) != entry.get("sha256"):
            return f"{file.name} is missing or differs from its checksum in {MANIFEST}"
    return None
