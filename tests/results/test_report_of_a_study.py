"""The report and the card of a study of another kind than the first."""

from pathlib import Path

import small_study
from run_folders import a_run
from small_study import PLAIN, WIDE

from qlora_recipes.results import card, listing
from qlora_recipes.results.reports import report, report_runs
from qlora_recipes.results.run_result import RunResult


def test_scores_spreads_curves_and_what_was_measured_stand_in_it(runs):
    small_study.decoded(small_study.ran(runs, PLAIN, "a", 66.0), 64.5)
    small_study.ran(runs, WIDE, "b", 71.0)
    page = report.study_page(small_study.read(), False, runs)
    assert [figure.key for figure in page.section.figures] == ["study-accuracy", "study-perplexity"]
    html = page.html()
    parts = ("67.4 ± 1.0", "9,175,040", "plain: greedy", "64.50", "accuracy, %")
    assert [part for part in parts if part not in html] == []
    assert "BLEU-4" not in html


def test_runs_of_different_studies_share_no_column(runs):
    ours = small_study.ran(runs, PLAIN, "a", 66.0)
    other = a_run(runs, "haider2024/llama-2-7b", "b", 5.0)
    both = report_runs.reported_runs([ours, other])
    first, second = (listing.cells(reported, report_runs.headings(both)) for reported in both)
    shown = [row.get(heading) for row in (first, second) for heading in ("accuracy, %", "BLEU-4")]
    assert shown == [66, None, None, 5]
    rows = {row["score"]: row for row in report_runs.scores(both, report_runs.headings(both), details=True)}
    accuracies = ["66.00 (65.50 to 66.50)", "67.4 ± 1.0", None, None]
    assert [*rows["accuracy, %"].values()] == ["accuracy, %", *accuracies]


def test_a_card_has_the_studys_metrics_and_its_tags(runs):
    small_study.write(Path(), tags=["arithmetic"])
    folder = small_study.ran(runs, PLAIN, "a", 66.0)
    folder.output.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder.output / name).write_text("{}")
    text = card.card(RunResult(folder, folder.read()), merged=False, repository=None)
    parts = [
        "- arithmetic",
        "name: accuracy, %",
        "type: accuracy",
        "- `accuracy`: ",
        "67.4 ± 1.0",
        "A. Nobody: On sums",
    ]
    assert [part for part in parts if part not in text] == []
    assert "code-review" not in text
