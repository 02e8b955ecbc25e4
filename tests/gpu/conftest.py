"""`make verify`: figures of this machine, as a table and in build/verify.json.

It takes the GPUs that CUDA_VISIBLE_DEVICES shows, as tests/conftest.py, which hides them, is not loaded.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

os.environ |= {"AXOLOTL_DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # see terminal.prepare_environment
os.environ["AXOLOTL_DATASET_NUM_PROC"] = "0"  # as in tests/conftest.py
os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")

import trainings
from figures import Figure

from qlora_recipes.base import tables
from qlora_recipes.base.files import write_json
from qlora_recipes.training.run_record import collect

RESULTS = Path("build", "verify.json")
COLUMNS = ("what", "measured", "bound", "result", "why")
ROWS: list[dict[str, Any]] = []


def add_row(test: str, what: str, result: str, why: str = "", measured: float | None = None, **more: Any) -> None:
    ROWS.append({"test": test, "what": what, "measured": measured, "result": result, "why": why} | more)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all trainings; `--basetemp` puts it on another disk."""
    return tmp_path_factory.mktemp("verify")


@pytest.fixture(scope="session")
def training(folder: Path) -> Path:
    """A run of the rehearsal's model, by the settings of a recipe."""
    return trainings.train(folder, "undisturbed", trainings.RECIPE, trainings.of_small_model(folder))


@pytest.fixture
def check(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Records figures, and fails the test if one of them does not keep its bound."""

    def add(*figures: Figure) -> None:
        for one in figures:
            result = "pass" if one.passed else "FAIL"
            more = {"expected": one.expected, "bound": one.limit, "unit": one.unit}
            add_row(request.node.nodeid, one.what, result, measured=one.measured, **more)
        assert [one for one in figures if not one.passed] == []

    return add


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    what = report.nodeid.rpartition("::test_")[2].replace("_", " ")
    if report.skipped:
        add_row(report.nodeid, what, "skip", report.longrepr[2].removeprefix("Skipped: "))
    elif report.failed and not any(row["test"] == report.nodeid and row["result"] == "FAIL" for row in ROWS):
        add_row(report.nodeid, what, "FAIL", str(report.longrepr.reprcrash.message).strip().partition("\n")[0])


def pytest_terminal_summary(terminalreporter: Any) -> None:
    tables.print_table([{name: _cell(row, name) for name in COLUMNS} for row in ROWS])
    RESULTS.parent.mkdir(exist_ok=True)
    write_json(RESULTS, {"machine": collect(), "rows": ROWS})
    terminalreporter.write_line(f"written to {RESULTS}")


def _cell(row: dict[str, Any], name: str) -> str:
    value = row.get(name)
    if name == "measured" and value is not None:
        return f"{value:,.7g} {row['unit']}".rstrip()
    return "" if value is None else str(value)
