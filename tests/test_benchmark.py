"""The table that `make benchmark` puts into the README."""

from pathlib import Path

import benchmark_table
import pytest

ROWS = [{"what": f"row {i}", "over": "another", "ratio": "1.00", "": "1 s"} for i in range(7)]


def test_the_table_replaces_the_one_of_before(tmp_path: Path) -> None:
    text = benchmark_table.README.read_text()
    file = tmp_path / "README.md"
    file.write_text(text)
    benchmark_table.write([ROWS[0] | {"what": "of before"}], file)
    benchmark_table.write(ROWS, file)
    lines = file.read_text().splitlines()
    assert len(lines) <= 200
    begin, end = (lines.index(marker.strip()) for marker in (benchmark_table.BEGIN, benchmark_table.END))
    assert end - begin <= 10 and "cores" in lines[begin + 1] and "of before" not in file.read_text()
    before, begun, rest = text.partition(benchmark_table.BEGIN)
    assert begun and file.read_text().startswith(before)
    assert file.read_text().endswith(rest.partition(benchmark_table.END)[2])
    assert lines[begin + 3 : end] == [f"| row {i} | another | 1.00 | 1 s |" for i in range(7)]


def test_without_markers_nothing_is_written(tmp_path: Path) -> None:
    file = tmp_path / "README.md"
    file.write_text("other\n")
    benchmark_table.write(ROWS, file)
    assert file.read_text() == "other\n"


def test_growth_compares_the_times_of_a_row_and_the_peaks() -> None:
    def prepared(folder: Path, count: int) -> benchmark_table.Measured:
        return (2e6, 50.0, True) if count == 10 else (1e6, 75.0, True)

    assert benchmark_table.growth(prepared, few=10) == (2, 1.5, 75, 1)
    with pytest.raises(AssertionError):
        benchmark_table.growth(lambda *_: (1.0, 1.0, False), few=10)
