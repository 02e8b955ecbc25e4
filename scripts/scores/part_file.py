"""File of predictions during an evaluation, from which an interrupted evaluation continues."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import orjson

from ..base.errors import UserError
from ..base.files import Row, parse_json, read_bytes, replacing
from .evaluations import REFERENCE, EvaluationSettings, Prediction

KNOWN = {"batch_tokens", "agreement"}  # settings that are known only after an engine has started


def settings_line(settings: EvaluationSettings) -> bytes:
    """Line with the settings in `KNOWN`, for the predictions that follow it in the file."""
    return orjson.dumps(settings.model_dump(include=KNOWN)) + b"\n"


def resume(
    part: Path, settings: EvaluationSettings, positions: Sequence[int]
) -> tuple[dict[int, Row], EvaluationSettings]:
    """Read an interrupted evaluation, or start a new file.

    Args:
        part: file of the predictions.
        settings: model, engine and decoding.
        positions: positions of the requested rows in their source.

    Returns:
        Predictions by place in `positions`, and the settings, including those that only the file knows.

    Raises:
        UserError: the file has predictions of this adapter and data with other settings, or of more rows.
    """
    asked = settings.identity() | settings.model_dump(include={"engine", "model"})
    by_batch = settings.engine == REFERENCE and settings.decoding.do_sample  # else batches change only rounding
    if by_batch:
        asked |= settings.model_dump(include={"rows", "batch_size"})
    header = orjson.dumps(asked)
    first, *lines = read_bytes(part).split(b"\n") if part.is_file() else [b""]
    same = all(orjson.dumps({key: asked[key]})[1:-1] in first for key in ("adapter_sha256", "data_sha256"))
    differs = first != header and same and any(b'"prediction":' in line for line in lines)
    done: dict[int, Row] = {}
    for line in lines if first == header else ():
        with suppress(ValueError):  # skips lines truncated by a killed process or a power failure
            row = parse_json(line)
            if isinstance(row, dict) and "agreement" in row:
                known = {key: row.get(key) for key in KNOWN}
                settings = EvaluationSettings.model_validate(settings.model_dump() | known)
            else:
                Prediction.model_validate(row)
                done[row["row"]] = row
    if differs or done.keys() - set(positions):
        raise UserError(
            f"{part}: has predictions of an evaluation with other settings or more rows; repeat the command that made "
            "them, or delete the file to start again"
        )
    with replacing(part) as stream:
        stream.write(header + b"\n" + settings_line(settings))
        stream.writelines(orjson.dumps(row) + b"\n" for row in done.values())
    return {place: done[position] for place, position in enumerate(positions) if position in done}, settings
