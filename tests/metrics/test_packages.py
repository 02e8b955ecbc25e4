"""Metrics of other packages: that of the folder `example`, as an installation leaves it, and faulty ones."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from run_folders import a_run, evaluated

from qlora_recipes.base.files import write_rows
from qlora_recipes.metrics import registry
from qlora_recipes.metrics.metric import METRICS, MetricRegistry

EXAMPLE = Path(__file__).with_name("example")
BUILD = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of installed packages."""
    monkeypatch.delattr(METRICS, "_entry_points", raising=False)  # of the packages until now
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    return folder


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example's wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    source = shutil.copytree(EXAMPLE, folder / "source")
    subprocess.run([sys.executable, "-c", BUILD, folder], cwd=source, check=True, capture_output=True)
    return next(folder.glob("*.whl"))


@pytest.fixture
def installed(site: Path, wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)


ROWS = [{"reference": "the cat sat", "prediction": "The cat sat"}] * 5


def test_a_metric_of_a_package_scores_as_this_projects_do(installed, recipe, tmp_path):
    write_rows(tmp_path / "answers.jsonl", ROWS)
    scores = recipe.json("score", "answers.jsonl", "--metric", "word_recall", "--metric", "exact_match")
    assert (scores["word_recall"], scores["exact_match"]) == (pytest.approx(200 / 3), 0)
    ignoring = recipe.json("score", "answers.jsonl", "--metric", "word_recall: {ignore_case: true}")
    assert ignoring["word_recall"] == 100


def test_a_run_is_evaluated_with_it(installed, recipe, run):
    options = ("--adapter", "none", "--limit", "2", "--max-new-tokens", "4", "--metric", "bertscore:none")
    assert recipe.json("evaluate", run.path, *options, "--metric", "word_recall")["word_recall"] == 0


def test_scores_without_the_package_name_it(installed, site, recipe, tmp_path, monkeypatch):
    run = a_run(tmp_path / "runs", "start/qlora", "1", 5.0)
    evaluated(run, {"word_recall": 7.0, "metrics": {"word_recall": {}}, "intervals": {}})
    assert [row["word_recall"] for row in recipe.json("results")] == [7.0]
    shutil.rmtree(next(site.glob("*.dist-info")))
    monkeypatch.delattr(METRICS, "_entry_points")
    missing = recipe.ok("results", "--json").stderr
    assert missing.startswith("runs/start/qlora/1/scores.json: no metric is called word_recall; ")
    assert missing.endswith("; install the metric's package, or score it anew with `recipe evaluate`\n")


def test_a_study_declares_it(installed, recipe, tmp_path):
    recipe.ok("study", "new", "mine")
    file = tmp_path / "recipes" / "mine" / "study.yaml"
    declared = file.read_text().replace(
        "  exact_match: {}\n", "  exact_match: {}\n  word_recall: {ignore_case: true}\n"
    )
    file.write_text(declared)
    recipe.ok("study", "check", "mine")
    file.write_text(declared.replace("ignore_case", "ignore_cases"))
    assert recipe.fails("study", "check", "mine").stderr == (
        "recipe: recipes/mine/study.yaml:35: metrics.word_recall.ignore_cases: Extra inputs are not permitted, "
        "not true; word_recall takes ignore_case\n"
    )


def package(site: Path, name: str, entry: str, module: str) -> None:
    """Write the files of an installed package with a metric."""
    info = site / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{MetricRegistry.GROUP}]\n{entry}\n")
    (site / f"{name}.py").write_text(module)


COPY = "from qlora_recipes.metrics.metric import METRICS\nMETRIC = METRICS['bleu4']\n"


@pytest.mark.parametrize(
    ("entry", "module", "problem"),
    [
        pytest.param("bleu4 = theirs:METRIC", COPY, "metric bleu4: another metric has this name", id="built in"),
        pytest.param(
            "recall = theirs:METRIC", COPY, "metric recall: theirs:METRIC is no Metric with this name", id="name"
        ),
        pytest.param(
            "recall = theirs:METRICS", COPY, "metric recall: theirs:METRICS is no Metric with this name", id="kind"
        ),
        pytest.param(
            "recall = theirs:X",
            COPY,
            "metric recall: AttributeError: module 'theirs' has no attribute 'X'",
            id="attribute",
        ),
        pytest.param(
            "recall = theirs:METRIC", "1 / 0", "metric recall: ZeroDivisionError: division by zero", id="error"
        ),
    ],
)
def test_a_faulty_package_is_named(site, monkeypatch, entry, module, problem):
    monkeypatch.delitem(sys.modules, "theirs", raising=False)
    package(site, "theirs", entry, module)
    with pytest.raises(registry.WrongMetric) as error:
        registry.column("recall")
    assert error.value.problem == f"theirs 1.0: {problem}; correct or uninstall the package"


def test_two_packages_with_the_same_metric_are_refused_even_if_nobody_asks_for_it(site, recipe, tmp_path):
    write_rows(tmp_path / "answers.jsonl", ROWS)
    for name in ("theirs", "others"):
        package(site, name, f"recall = {name}:METRIC", "")
    refused = recipe.fails("score", "answers.jsonl", "--metric", "exact_match")
    assert refused.stderr.endswith(
        " 1.0: metric recall: another metric has this name; correct or uninstall the package\n"
    )
