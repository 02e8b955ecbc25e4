"""How metrics are declared, what each says of itself, and what is refused."""

import pytest

from qlora_recipes.base.errors import UserError
from qlora_recipes.base.files import Row
from qlora_recipes.metrics import registry
from qlora_recipes.metrics.metric import LossMetric, RowMetric, ScoringInput
from qlora_recipes.metrics.registry import METRICS, WrongMetric

PAIRS = [("rename this variable please", "rename this variable"), ("why?", "why?"), ("a  B", "a b"), ("use it", "")]


@pytest.mark.parametrize(
    "name", sorted(set(METRICS) - {"bertscore_f1", "benchmark", "mean_of_groups"})
)  # which need more
def test_scores_are_within_the_range_that_a_metric_names(name):
    metric = METRICS[name]
    column = registry.column(name)
    rows: list[Row] = [{"reference": reference, "prediction": prediction} for reference, prediction in PAIRS]
    if isinstance(metric, RowMetric):
        for row, score in zip(rows, metric.score_rows(PAIRS, metric.parameters()), strict=True):
            row[name] = score
            assert metric.low <= score <= (metric.high or score)
    value = metric.measure(column, ScoringInput(rows=rows, loss=1.25)).value
    assert value is not None
    assert metric.low <= value <= (metric.high or value)
    assert metric.source and metric.label and metric.hub_type
    perfect = [(reference, reference) for reference, _ in PAIRS]
    if isinstance(metric, RowMetric) and name != "number":  # of which these texts have none
        assert metric.score_rows(perfect, metric.parameters()) == pytest.approx([metric.high] * len(PAIRS))


def test_the_eval_loss_and_the_perplexity_are_of_the_run():
    record = METRICS["perplexity"].measure(registry.column("perplexity"), ScoringInput(loss=0))
    assert record.value == 1
    assert {name for name, metric in METRICS.items() if isinstance(metric, LossMetric)} == {"eval_loss", "perplexity"}


def test_a_column_is_a_metric_with_parameters_under_a_name_and_a_label():
    entry = {"metric": "number", "label": "GSM8K accuracy", "markers": ["A: "]}
    column = registry.column("accuracy", entry)
    assert column.label == "GSM8K accuracy, %"
    assert column.entry == entry
    assert registry.column("accuracy", column.entry) == column
    assert column.meaning.endswith("; with markers ['A: ']")
    plain = registry.column("number")
    assert not column.same_scores(plain)
    assert column.same_scores(registry.column("other", {"metric": "number", "markers": ["A: "]}))


@pytest.mark.parametrize(
    ("name", "entry", "key", "says"),
    [
        ("blue4", {}, "", "blue4"),
        ("accuracy", {"metric": "numbers"}, "metric", "number?"),
        ("number", {"marker": ["A"]}, "marker", "parser, markers"),
        ("number", {"parser": "us"}, "parser", "'loftq', 'peft'"),
        ("chrf", {"char_order": 99999999}, "char_order", "20"),
        ("rows", {"metric": "bleu4"}, "", "rows"),
    ],
)
def test_what_is_no_metric_is_refused_with_its_key(name, entry, key, says):
    with pytest.raises(WrongMetric) as error:
        registry.column(name, entry)
    assert error.value.key == key
    assert says in error.value.problem


def test_metrics_are_asked_for_as_study_yaml_declares_them():
    asked = registry.requested(["rouge_l", 'number: {markers: ["A: "]}', "chrf: {word_order: 2}"])
    entries = [("rouge_l", {}), ("number", {"markers": ["A: "]}), ("chrf", {"word_order": 2})]
    assert [column.entry for column in asked.values()] == [{"metric": name} | more for name, more in entries]


@pytest.mark.parametrize(
    ("texts", "says"),
    [
        (["bleu"], "--metric bleu: "),
        (["number: {"], "--metric number: {: "),
        (["number: {marker: x}"], "marker: "),
        (["number", "number: {parser: peft}"], "'other: {metric"),
    ],
)
def test_what_cannot_be_asked_for_is_refused(texts, says):
    with pytest.raises(UserError) as error:
        registry.requested(texts)
    assert says in str(error.value)
