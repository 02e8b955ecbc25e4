"""Reports in a browser, of runs written by hand."""

import math
import random
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson
import pytest
import run_folders
from run_folders import configure, evaluated

from qlora_recipes.base import paths, yamlfiles
from qlora_recipes.base.errors import UserError
from qlora_recipes.base.files import digest, sha256, write_rows
from qlora_recipes.config.datafiles import DataFile
from qlora_recipes.config.merging import Difference, Override, Source
from qlora_recipes.data import studies
from qlora_recipes.evaluate import evaluation_rows
from qlora_recipes.results.reports import report, report_figures, report_runs
from qlora_recipes.run.rundir import RunDir
from qlora_recipes.study.sweep import Sweep, Trial
from qlora_recipes.training.row_types import row_type
from qlora_recipes.training.run_record import Summary
from qlora_recipes.training.summary import summarise

STUDY = studies.find("haider2024")
QUESTIONS = {"field_instruction": "question", "field_output": "answer"}
LLAMA_3, LLAMA_2 = "haider2024/llama-3-8b", "haider2024/llama-2-7b"
SCORES = ("bleu4", "rouge_l", "bertscore_f1")  # of rows
ATTACKS = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(2)>",
    "</script><script>alert(3)</script><!-- ",
    "a\u2028b\u2029c\u0000d",
    "\u202egnirts\u202c \u2066x\u2069 \u200b",
    "{{ 7 * 7 }} {% raw %} ${7*7}",
    "x" * 100_000,
    "word " * 20_000,
    "",
]


def some_rows(count: int, data: random.Random) -> list[dict[str, Any]]:
    """Prepared test rows; the first carry what must be shown as text only."""
    rows = []
    for i in range(count):
        words = " ".join(data.choices(["value", "return", "index", "cache", "why", "not", "rename", "nit"], k=8))
        lines = [f"@@ -{i},4 +{i},5 @@ def f{i}():", " kept = 1", f"-old = {words}", f"+new = {words}", "+", " end"]
        output, attack = f"Why {words} {i}?", ATTACKS[i] if i < len(ATTACKS) else ""
        rows.append({"input": "\n".join([*lines, f"+{attack}"]), "output": f"{output} {attack}", "idx": 7 * i})
        rows[-1]["lang"] = ("py", "go", "cpp")[i % 3]
    return rows


def own_rows(count: int) -> list[dict[str, str]]:
    return [{"question": f"How much is {i} + 1?", "answer": str(i + 1)} for i in range(count)]


def a_run(
    folder: Path, recipe_name: str = LLAMA_3, name: str = "1", rows: int = 40, rehearsal: bool = True, **more: Any
) -> RunDir:
    """A finished and evaluated run, with telemetry of 30 steps."""
    data = random.Random(name)
    test = folder / "data" / "test.jsonl"
    if not test.exists():
        write_rows(test, some_rows(rows, random.Random(1)))
    predictions = []
    for i, row in enumerate(map(orjson.loads, test.read_bytes().splitlines())):
        score = round(100 * data.random() ** 3, 3)
        text = ATTACKS[i] if i < len(ATTACKS) else f"Rename {row['output'][4:20]}"
        predictions.append(
            {"row": i, "idx": row["idx"], "lang": row["lang"], "reference": row["output"], "prediction": text}
            | {"bleu4": score, "rouge_l": score / 100, "bertscore_f1": 0.8 + score / 1000}
        )
    means = {key: sum(row[key] for row in predictions) / len(predictions) for key in SCORES}
    intervals = {key: [0.9 * mean, 1.1 * mean] for key, mean in means.items()}
    run = run_folders.a_run(
        folder / "runs",
        recipe_name,
        name,
        bleu4=0,
        set={"lora_r": 64, "hub_token": "the-secret"},
        settings={"data": str(test), "data_sha256": sha256(test), "rows": len(predictions), "test_set": None},
        scores=means | {"rows": len(predictions), "intervals": intervals, "bertscore": {"model": "a-judge"}},
        rehearsal=rehearsal,
    )
    write_rows(run.path / "predictions.jsonl", predictions)
    load = {"rss_peak_gib": 2.42, "cpu_percent": 187.5}
    if not rehearsal:
        load = {"memory_reserved_gib": 7.25, "gpu_utilization": 97}
    records = []
    for step in range(31):
        record = {"time": 1.0 + step, "step": step, "max_steps": 30, "epoch": step / 15} | load
        if step % 10 == 0:
            loss = 4 * math.exp(-step / 60) + data.random() / 10
            records.append(record | {"eval_loss": loss + 0.1, "eval_loss_per_token": loss, "eval_tokens": TOKENS})
        if step:
            loss = 4 * math.exp(-step / 50) + data.random() / 5
            record |= {"loss": loss, "grad_norm": 1 + data.random(), "learning_rate": 2e-4 * (1 - step / 31)}
            records.append(record | {"step_seconds": 2.0, "tokens": 600, "tokens_per_second": 300.0})
    write_rows(run.metrics, records)
    changed = {
        "recipe_sha256": sha256(paths.RECIPES / f"{recipe_name}.yaml"),
        "cwd": str(folder),
        "overrides": [Override("lora_r", 64)],
        "differences": [
            Difference(key="lora_r", recipe=32, run=64, source=Source("override", "lora_r", "<b>\u202e</b>"))
        ],
        "data": [DataFile(path="data/codereviewer/train.jsonl", sha256="f" * 64, bytes=123456, rows=1000)],
        "summary": summarise(run.read_metrics()),
        "provenance": {"python": "3.13.5", "packages": {"axolotl": "0.21.0"}, "cpu": "a <processor>"},
    }
    run.write(run.read().model_copy(update=changed | more))
    return run


TOKENS = {"count": 900, "sha256": "a" * 64}


def html_of(*runs: RunDir) -> str:
    return report.runs_page(report_runs.reported_runs(runs)).html()


def a_sweep(folder: Path) -> Sweep:
    """A sweep of three trials, of two seeds each, and a fourth that has not run."""
    trials = []
    for name, rank in {"Paper": 32, "High rank": 64, "Low rank": 16, "Odd": 8}.items():
        for seed in (42, 43):
            values, digest = {"lora_r": rank, "lora_alpha": 32}, f"{name} {seed}"
            trials.append(Trial(name=name, settings=values, seed=seed, digest=digest, planned_gib=7.1))
            if name != "Odd":
                a_run(folder, name=digest, digest=digest)
    sweep = Sweep(name="ranks", recipe=LLAMA_3, rehearsal=True, keys=["lora_r", "lora_alpha"], trials=trials)
    sweep.write(folder / "runs")
    return sweep


def test_a_report_has_the_runs_scores_and_differences(tmp_path):
    reported = report_runs.reported_runs([a_run(tmp_path)])
    page = report.runs_page(reported)
    assert page.kind == "Run 1"
    scores = [
        ("first eval loss", "4.0337"),
        ("eval loss, nats per token", "2.5189"),
        ("rows", "40"),
        ("BLEU-4", "20.62 (18.56 to 22.68)"),
        ("ROUGE-L", "0.2062 (0.1856 to 0.2268)"),
    ]
    scores += [("BERTScore F1", "0.8206 (0.7386 to 0.9027)"), ("BERTScore F1 by", "a-judge")]
    assert [tuple(row.values()) for row in page.scores] == scores
    assert page.scored_on == "40 of 5,000 rows of data/test.jsonl"
    why = "--set lora_r=<b>\u202e</b>"
    assert reported[0].differs == [{"setting": "lora_r", "recipe": "32", "this run": "64", "why": why}]


def test_each_setting_has_its_source(tmp_path, monkeypatch):
    run = a_run(tmp_path)
    (reported,) = report_runs.reported_runs([run])
    sources = {row["setting"]: row["source"] for row in reported.settings}
    assert sources["lora_r"] == "--set lora_r=<b>\u202e</b>"
    assert sources["fp16"] == "authors' notebook; the paper's GPU, an RTX 5000 (Turing), has no bf16"
    assert sources["hub_token"] == "set by the run"
    monkeypatch.setattr(yamlfiles, "sources", lambda file: {})
    (reported,) = report_runs.reported_runs([run])
    assert {row["setting"]: row["source"] for row in reported.settings}["lora_alpha"] == "the recipe"


def test_text_of_a_run_is_escaped_and_its_secrets_are_masked(tmp_path):
    html = html_of(a_run(tmp_path))
    parts = ["--set lora_r=&lt;b&gt;⟨U+202E⟩&lt;/b&gt;", "a &lt;processor&gt;", "f" * 64, "Rehearsal."]
    assert [part for part in parts if part not in html] == []
    assert [part for part in ("the-secret", "<script>alert") if part in html] == []


def test_the_first_row_shows_what_is_learnt(tmp_path):
    run = a_run(tmp_path)
    pieces = [{"text": "<s>What?\n", "learnt": False}, {"text": "This.</s>", "learnt": True}]
    write_rows(run.metrics, [{"step": 0, "first_row": pieces}, *run.read_metrics()])
    assert '<div class="said">&lt;s&gt;What?\n<mark>This.&lt;/s&gt;</mark></div>' in html_of(run)
    with run.metrics.open("a") as metrics:
        metrics.write('{"step": 0, "first_row": [["x", true]]}\n')  # a damaged line
    assert html_of(run).count("<mark>") == 1


def test_a_run_with_nothing_yet(tmp_path):
    run = a_run(tmp_path, summary=Summary())
    for file in (run.metrics, run.path / "scores.json", run.path / "predictions.jsonl", run.config_file):
        file.unlink()
    page = report.runs_page(report_runs.reported_runs([run]))
    assert page.training == []
    assert page.scores == []
    assert page.reader_data == ""
    assert "Not evaluated yet: <code>recipe evaluate RUN</code>" in page.html()


def test_curves_are_the_telemetry(tmp_path):
    run = a_run(tmp_path)
    metrics = run.read_metrics()
    figures = {figure.key: figure for figure in report_figures.training_figures({"a": metrics})}
    assert {key for key, figure in figures.items() if figure.traces} == {"loss", "rate", "cpu", "norm", "speed"}
    training, validation = figures["loss"].traces
    assert training["x"] == list(range(1, 31))
    assert training["y"] == pytest.approx([record["loss"] for record in metrics if "loss" in record], rel=1e-5)
    assert validation["x"] == [0, 10, 20, 30]
    assert figures["cpu"].title == "CPU load"
    assert figures["cpu"].traces[0]["y"][0] == 187.5


def test_curves_of_preference_pairs_have_rewards_of_training_and_validation():
    steps = [{"step": step, "loss": 0.6, "reward_accuracy": 0.5 + step / 10} for step in (1, 2)]
    metrics = [*steps, {"step": 2, "eval_loss": 0.5, "eval_reward_accuracy": 0.75, "eval_reward_margin": 0.2}]
    figures = {figure.key: figure for figure in report_figures.training_figures({"a": metrics})}
    curves = {}
    for key in ("accuracy", "margin"):
        for trace in figures[key].traces:
            curves[key, trace["name"]] = trace["x"], trace["y"]
    assert curves == {
        ("accuracy", "a, training"): ([1, 2], [0.6, 0.7]),
        ("accuracy", "a, validation"): ([2], [0.75]),
        ("margin", "a, validation"): ([2], [0.2]),
    }


def test_few_steps_are_points_that_hide_no_others():
    steps = [{"step": i, "loss": 1.0} for i in range(report_figures.FEW_POINTS)]
    few, many = (next(report_figures.training_figures({"a": rows})).traces[0] for rows in (steps[1:], steps))
    assert (few["mode"], few["marker"]["symbol"], many["mode"]) == ("lines+markers", "circle-open", "lines")


def test_many_steps_are_averaged():
    many = [{"step": i, "loss": float(i)} for i in range(10_000)]
    averaged = next(report_figures.training_figures({"a": many})).traces[0]
    assert len(averaged["x"]) == report_figures.MOST_POINTS
    assert averaged["x"] == averaged["y"]  # the mean loss of ten steps is drawn at their mean step


def test_prompts_are_those_that_were_evaluated(tmp_path):
    trials = report_runs.reported_runs([a_run(tmp_path)])
    (shown,) = report_runs.reader(trials)
    ((name, text),) = shown["prompt"][3]
    assert (name, text.partition(" @@")[0]) == ("input", "@@ -3,4 +3,5")
    assert shown["data"] == "data/test.jsonl"
    test = tmp_path / "data" / "test.jsonl"
    test.write_bytes(test.read_bytes() + b"\n")
    (shown,) = report_runs.reader(trials)
    assert shown["prompt"] is None


def test_prompts_of_held_out_rows_are_read_from_the_evaluations_copy(tmp_path, monkeypatch):
    run, loaded = a_run(tmp_path), []
    monkeypatch.setattr(evaluation_rows, "_load", loaded.append)
    rows = [{"dataset": "datasets.0", "row": row} for row in own_rows(40)]
    settings = {
        "data": "val_set_size 0.5 of mine.jsonl",
        "data_sha256": digest([["datasets.0", r["row"]] for r in rows]),
    }
    configure(run, test_datasets=None, val_set_size=0.5, datasets=[{"path": "mine.jsonl", "type": QUESTIONS}])
    record = run.read()
    run.write(record.model_copy(update={"recipe": "mine", "data": []}))
    settings |= {"rows": 40, "test_set": None}
    evaluated(run, {"rows": 40, "bleu4": 1.0}, rehearsal=True, **settings)
    (shown,) = report_runs.reader(report_runs.reported_runs([run]))
    assert shown["prompt"] is None
    assert loaded == []  # Axolotl loads no rows for a report
    write_rows(run.path / "evaluation-rows.jsonl", rows)
    (shown,) = report_runs.reader(report_runs.reported_runs([run]))
    assert shown["prompt"][1] == [("question", "How much is 1 + 1?")]


@pytest.mark.parametrize(
    ("entry", "row", "prompt"),
    [
        pytest.param(
            {"type": "alpaca"},
            {"instruction": "Add.", "input": "1 + 1", "output": "2", "idx": 3},
            [("instruction", "Add."), ("input", "1 + 1")],
            id="alpaca",
        ),
        pytest.param(
            {"type": "alpaca"}, {"instruction": "Hi", "input": "", "output": "Ho"}, [("instruction", "Hi")], id="empty"
        ),
        pytest.param(
            {
                "type": "chat_template",
                "field_messages": "turns",
                "message_property_mappings": {"role": "from", "content": "value"},
            },
            {
                "system": "Be brief.",
                "turns": [{"from": "user", "value": "1 + 1?"}, {"from": "assistant", "value": "2"}],
            },
            [("system", "Be brief."), ("user", "1 + 1?")],
            id="chat",
        ),
        pytest.param(
            {"type": "input_output"},
            {"segments": [{"text": "1 + 1 = ", "label": False}, {"text": "2", "label": True}]},
            [("text", "1 + 1 = ")],
            id="segments",
        ),
        pytest.param({}, {"input_ids": [1], "attention_mask": [1], "labels": [1]}, [], id="tokenized"),
        pytest.param({"type": "mine"}, {"asked": "1 + 1?", "n": 3}, [("asked", "1 + 1?")], id="unknown type"),
    ],
)
def test_the_prompt_of_a_row_is_what_precedes_its_answer(entry, row, prompt):
    assert row_type(entry).prompt_of(row) == prompt


def test_runs_on_the_same_rows_share_them_and_are_told_apart_by_their_labels(tmp_path):
    runs = [a_run(tmp_path, name="1"), a_run(tmp_path, name="2"), a_run(tmp_path, LLAMA_2)]
    (shown,) = report_runs.reader(report_runs.reported_runs(runs))
    assert [model["label"] for model in shown["models"]] == ["llama-3-8b, 1", "llama-3-8b, 2", "llama-2-7b"]
    (tmp_path / "data" / "test.jsonl").unlink()
    runs.append(a_run(tmp_path, LLAMA_2, "3", rows=7))
    assert len(report_runs.reader(report_runs.reported_runs(runs))) == 2


def test_runs_of_one_recipe_are_called_by_their_folders(tmp_path):
    runs = report_runs.reported_runs([a_run(tmp_path, name="1"), a_run(tmp_path, name="2")])
    assert [reported.label for reported in runs] == ["1", "2"]


def test_only_real_runs_of_a_study_stand_beside_published_scores(tmp_path):
    a_run(tmp_path, rehearsal=False)
    page = report.study_page(STUDY, False, tmp_path / "runs")
    assert [str(row["published"]) for row in page.overview] == ["5.27"]
    assert page.section.tables[-1].title == "To compare with"
    a_run(tmp_path, name="2")
    page = report.study_page(STUDY, True, tmp_path / "runs")
    assert ["published" in row for row in page.overview] == [False]
    assert page.section.tables[-1].title == "Other scores, and costs of the runs"


def test_a_report_does_not_mix_rehearsals_and_real_runs(tmp_path):
    with pytest.raises(UserError) as raised:
        html_of(a_run(tmp_path), a_run(tmp_path, name="2", rehearsal=False))
    assert str(raised.value) == "rehearsals and real runs are not comparable; name only one kind"


def test_a_sweep_without_a_run_has_no_report(tmp_path):
    sweep = Sweep(name="ranks", recipe=LLAMA_3, rehearsal=True, keys=["lora_r"], trials=[])
    with pytest.raises(UserError) as raised:
        report.sweep_page(sweep, tmp_path)
    assert str(raised.value) == "ranks: no trial has a run yet; start them with `recipe sweep`"


def test_a_sweep_shows_its_trade_offs(recipe, tmp_path):
    sweep = a_sweep(tmp_path)
    page = report.sweep_page(sweep, tmp_path / "runs")
    (table,) = page.section.tables
    assert [row["trial"] for row in table.rows] == ["Paper", "High rank", "Low rank", "Odd"]
    assert page.section.notes[0] == "front: on the Pareto front over peak memory and eval_loss"
    assert [figure.key for figure in page.section.figures] == ["sweep-memory-eval_loss"]
    assert page.runs[-1].label == "Low rank, Low rank 43"
    assert recipe.ok("report", "ranks").stdout == "report.html\n"
    assert 'data-figure="sweep-memory-eval_loss"' in (tmp_path / "report.html").read_text()


@pytest.fixture(scope="module")
def browser(programs: Callable[[str], None]) -> Iterator[Any]:
    programs("browser")
    sync_api = pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        yield browser
        browser.close()


PHONE, DESKTOP = (390, 844), (1280, 900)
FITS = "document.documentElement.scrollWidth <= innerWidth"
CUT = """[...document.querySelectorAll(".scroll")].filter((box) => box.scrollWidth > box.clientWidth).length
+ [...document.querySelectorAll(".legend .scrollbar")].filter((bar) => bar.getAttribute("height") > 0).length"""
"""Tables and legends that scroll."""


@contextmanager
def opened(
    browser: Any, html: str, folder: Path, size: tuple[int, int] = DESKTOP, scheme: str = "light"
) -> Iterator[Any]:
    """A report, opened and drawn; at the end nothing may have been fetched, logged or raised."""
    file = folder / "report.html"
    file.write_text(html)
    context = browser.new_context(viewport={"width": size[0], "height": size[1]}, color_scheme=scheme)
    page, wrong = context.new_page(), []
    page.on("console", lambda message: wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("dialog", lambda dialog: wrong.append(dialog.message) or dialog.dismiss())
    local = (file.as_uri(), "data:", "blob:")
    page.on("request", lambda request: request.url.startswith(local) or wrong.append(request.url))
    page.goto(file.as_uri())
    page.wait_for_selector("html[data-figures=drawn]", state="attached", timeout=60_000)
    if "reader-data" in html:
        page.wait_for_selector("html[data-reader=ready]", state="attached", timeout=60_000)
    yield page
    context.close()
    assert wrong == []


@pytest.fixture(scope="module")
def run_html(tmp_path_factory: pytest.TempPathFactory) -> str:
    return html_of(a_run(tmp_path_factory.mktemp("run")))


@pytest.mark.parametrize(("scheme", "size"), [("light", PHONE), ("dark", DESKTOP)])
def test_every_figure_is_drawn_fits_and_is_accessible(browser, run_html, tmp_path, scheme, size):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
    with opened(browser, run_html, tmp_path, size, scheme) as page:
        assert page.locator("figure").count() == 5
        assert page.locator("figure:not([data-figure=cpu]):has(.main-svg)").count() == 4
        assert page.evaluate(FITS)
        for details in page.locator("details > summary:visible").all():
            details.click()
        page.locator("figure[data-figure=cpu] .main-svg").first.wait_for()
        audit = axe.Axe().run(page).response
        assert "color-contrast" in [one["id"] for one in audit["passes"]]
        grave = [one for one in audit["violations"] if one["impact"] in ("serious", "critical")]
        assert [(one["id"], one["nodes"][0]["html"]) for one in grave] == []


def test_figures_can_be_saved_and_read_as_tables(browser, run_html, tmp_path):
    with opened(browser, run_html, tmp_path) as page:
        loss = page.locator("figure[data-figure=loss]")
        loss.locator("summary").click()
        loss.locator("tbody tr").first.wait_for()  # a table is filled once it is opened
        assert loss.locator("tbody tr").count() == 34
        assert loss.locator("thead th").all_inner_texts() == ["series", "optimizer step", "loss"]
        for form, start in (("csv", b'"series","optimizer step"'), ("svg", b"<svg"), ("png", b"\x89PNG")):
            with page.expect_download() as download:
                loss.get_by_role("button", name=f"Save Loss as {form.upper()}").click()
            assert download.value.suggested_filename == f"loss.{form}"
            assert Path(download.value.path()).read_bytes().startswith(start)


def test_reading_predictions(browser, run_html, tmp_path):
    with opened(browser, run_html, tmp_path) as page:
        position, row = page.locator("#position"), page.locator("#row")
        assert row.locator("h3").inner_text().startswith("Row 0 · py · position 0 ")
        assert row.locator(".diff ins .sign").first.inner_text() == "+"
        assert row.locator(".diff del").inner_text().startswith("-\nold = ")
        page.locator("#after").click()
        assert "Row 1 " in row.locator("h3").inner_text()
        page.keyboard.press("j")
        page.keyboard.press("ArrowRight")
        page.keyboard.press("k")
        assert position.inner_text() == "3 of 40"
        page.keyboard.press("/")
        page.keyboard.type("jk 12?")
        assert page.locator("#count").inner_text() == "0 of 40 rows match"
        assert row.locator("h3").count() == 0
        page.locator("#query").fill("def f12()")
        assert page.locator("#count").inner_text() == "1 of 40 rows match"
        page.locator("#clear").click()
        page.locator("#language").select_option("go")
        assert page.locator("#count").inner_text() == "13 of 40 rows match"
        page.locator("#low").fill("20")
        page.locator("#high").fill("60")
        page.locator("#order").select_option("down")
        scores = [float(text) for text in page.locator("#matches .head span:last-child").all_inner_texts()]
        assert scores and scores == sorted(scores, reverse=True) and 20 <= min(scores) <= max(scores) <= 60
        page.locator("#score").select_option("ROUGE-L")
        assert page.locator("#count").inner_text() == "0 of 40 rows match"


def test_own_rows_show_their_questions_and_no_diff(browser, tmp_path):
    run = a_run(tmp_path)
    rows = own_rows(8)
    write_rows(tmp_path / "mine.jsonl", rows)
    predictions = [{"row": i, "reference": row["answer"], "prediction": "2"} for i, row in enumerate(rows)]
    write_rows(run.path / "predictions.jsonl", predictions)
    configure(run, test_datasets=[{"path": "mine.jsonl", "type": QUESTIONS}])
    settings = {"data": str(tmp_path / "mine.jsonl"), "data_sha256": sha256(tmp_path / "mine.jsonl"), "test_set": None}
    evaluated(run, {"rows": 8, "sacrebleu": 1.0}, rehearsal=True, **settings)
    with opened(browser, html_of(run), tmp_path, PHONE) as page:
        assert page.locator("#row h4").all_inner_texts() == ["Question", "Reference", "Prediction"]
        assert page.locator("#row .said").first.inner_text() == "How much is 0 + 1?"
        assert page.locator("#filters label:visible").all_inner_texts() == [
            "Search in questions, references and predictions"
        ]
        page.locator("#query").fill("is 7 +")
        assert page.locator("#count").inner_text() == "1 of 8 rows match"
        assert page.locator("#overview th").first.inner_text() == "name"
        assert page.evaluate("document.querySelector('#overview .scroll').scrollWidth <= innerWidth")
        assert page.evaluate(FITS)


def test_a_diff_within_a_question_is_shown_by_lines(browser, tmp_path):
    asked = {"input": "Review this:\n- kindly\n@@ -1,2 +1,2 @@\n-a\n+b"}
    write_rows(tmp_path / "data" / "test.jsonl", [row | asked for row in some_rows(9, random.Random(1))])
    with opened(browser, html_of(a_run(tmp_path)), tmp_path) as page:
        assert page.locator("#row h4").all_inner_texts()[:2] == ["Input", "Diff"]
        assert page.locator("#row .said").first.inner_text() == "Review this:\n- kindly"
        assert page.locator(".diff > *").all_text_contents() == [" @@ -1,2 +1,2 @@", "-a", "+b"]


def test_what_others_wrote_is_shown_as_text(browser, run_html, tmp_path):
    with opened(browser, run_html, tmp_path, PHONE) as page:
        for i, attack in enumerate(ATTACKS):
            said = page.locator("#row .said").nth(1)
            marks = [f"U+{ord(mark):04X}" for mark in attack if mark in "\u2028\u2029\0\u202e\u202c\u2066\u2069\u200b"]
            assert said.locator(".mark").all_inner_texts() == marks
            shown = said.evaluate("one => one.textContent")
            start = re.split("[\u2028\u202e]", attack)[0][:1000]
            assert shown.startswith(start) if attack else shown == "(empty)"
            if len(attack) > 9000:
                while said.locator("button").count():
                    said.locator("button").click()
                assert said.evaluate("one => one.textContent") == attack
            assert page.evaluate(FITS)
            assert page.locator("main script, main img, main iframe, #row :is(b, a)").count() == 0
            if i + 1 < len(ATTACKS):
                page.keyboard.press("j")
                assert page.locator("#row h3").inner_text().startswith(f"Row {i + 1} ")


def test_the_tagged_form_is_shown_as_lines(browser, tmp_path):
    tagged = {"input": "<keep>a<add>b <i>c</i><del>d"}
    write_rows(tmp_path / "data" / "test.jsonl", [row | tagged for row in some_rows(9, random.Random(1))])
    with opened(browser, html_of(a_run(tmp_path)), tmp_path) as page:
        assert page.locator(".diff > *").all_text_contents() == [" a", "+b <i>c</i>", "-d"]


def test_several_runs_the_study_and_a_sweep_open_too(browser, tmp_path):
    one, other = a_run(tmp_path), a_run(tmp_path, LLAMA_2)
    with opened(browser, html_of(one, other), tmp_path) as page:
        headings = [text.split()[-1] for text in page.locator("#row h4").all_inner_texts()]
        assert headings == ["Diff", "Reference", "llama-3-8b", "llama-2-7b"]
        assert page.locator("#score option").count() == 6
    several = [a_run(tmp_path / "one-recipe", name=f"20261202-14285{i}-ab51237") for i in range(4)]
    with opened(browser, html_of(*several), tmp_path, PHONE) as page:
        assert page.evaluate(FITS)
        assert page.evaluate(CUT) == 0
    a_run(tmp_path, name="real", rehearsal=False)
    with opened(browser, report.study_page(STUDY, False, tmp_path / "runs").html(), tmp_path) as page:
        figure = page.locator("figure[data-figure=study-bleu4]")
        assert figure.locator(".main-svg").count()
        figure.locator("summary").click()
        last = figure.locator("tbody tr").last.inner_text()
        assert last.split("\t") == ["published, with its ± if known", "4.54", "llama-3.2-3b", "4.54", "4.54"]
    sweep = a_sweep(tmp_path / "sweep")
    html = report.sweep_page(sweep, tmp_path / "sweep" / "runs").html()
    with opened(browser, html, tmp_path, PHONE) as page:
        assert page.locator("figure[data-figure=sweep-memory-eval_loss] .main-svg").count()
        assert page.evaluate(FITS)
