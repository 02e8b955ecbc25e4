"""Declarations of metrics, their ranges, and mistakes in them."""

import pytest

from qlora_recipes.base.errors import UserError
from qlora_recipes.base.files import Row
from qlora_recipes.metrics import registry
from qlora_recipes.metrics.metric import EvalLosses, LossMetric, Rewards, RowMetric, ScoringInput
from qlora_recipes.metrics.registry import METRICS, WrongMetric

LOSSES = EvalLosses(1.25, 1.5, Rewards(0.75, -0.5, 20))
PAIRS = [("rename this variable please", "rename this variable"), ("why?", "why?"), ("a  B", "a b"), ("use it", "")]


@pytest.mark.parametrize(
    "name", sorted(set(METRICS) - {"bertscore_f1", "benchmark", "mean_of_groups", "execution", "execution_plug_value"})
)  # which need more
def test_scores_are_within_the_range_that_a_metric_names(name):
    metric = METRICS[name]
    column = registry.column(name)
    rows: list[Row] = [{"reference": reference, "prediction": prediction} for reference, prediction in PAIRS]
    if isinstance(metric, RowMetric):
        for row, score in zip(rows, metric.score_rows(PAIRS, metric.parameters()), strict=True):
            row[name] = score
            assert metric.low <= score <= (metric.high or score)
    value = metric.measure(column, ScoringInput(rows=rows, losses=LOSSES)).value
    assert value is not None
    assert metric.low <= value <= (metric.high or value)
    assert metric.source and metric.label and metric.hub_type
    perfect = [(reference, reference) for reference, _ in PAIRS]
    if isinstance(metric, RowMetric) and name != "number":  # of which these texts have none
        assert metric.score_rows(perfect, metric.parameters()) == pytest.approx([metric.high] * len(PAIRS))


def test_the_eval_loss_and_the_perplexity_are_of_the_run():
    record = METRICS["perplexity"].measure(registry.column("perplexity"), ScoringInput(losses=EvalLosses(0)))
    assert record.value == 1
    of_runs = {name for name, metric in METRICS.items() if isinstance(metric, LossMetric)}
    assert of_runs == {"eval_loss", "perplexity", "reward_accuracy", "reward_margin"}


@pytest.mark.parametrize(
    ("entry", "losses", "value"),
    [
        pytest.param({}, EvalLosses(1.25, 1.5), 1.25, id="per token by default"),
        pytest.param({"by": "tokens"}, EvalLosses(1.25, 1.5), 1.25, id="per token"),
        pytest.param({"by": "trainer"}, EvalLosses(1.25, 1.5), 1.5, id="the Trainer's"),
        pytest.param({"by": "trainer"}, EvalLosses(1.25), None, id="the Trainer's is missing"),
    ],
)
def test_an_eval_loss_is_per_token_or_the_trainers(entry, losses, value):
    column = registry.column("loss", {"metric": "eval_loss"} | entry)
    assert column.metric.measure(column, ScoringInput(losses=losses)).value == value


@pytest.mark.parametrize(
    ("entry", "label"),
    [
        ({}, "eval loss, nats per token"),
        ({"by": "trainer"}, "eval loss"),  # of a preference training: per pair
        ({"by": "trainer", "label": "DPO loss"}, "DPO loss"),
    ],
)
def test_only_a_loss_per_token_has_that_unit(entry, label):
    assert registry.column("eval_loss", entry).label == label


def test_an_eval_loss_of_something_else_is_refused():
    with pytest.raises(WrongMetric) as raised:
        registry.column("loss", {"metric": "eval_loss", "by": "rows"})
    assert str(raised.value) == "by: Input should be 'tokens' or 'trainer', not rows; eval_loss takes by"


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
    ("name", "entry", "key", "problem"),
    [
        pytest.param("blue4", {}, "", "no metric is called blue4; did you mean bleu4?", id="unknown name"),
        pytest.param(
            "accuracy",
            {"metric": "numbers"},
            "metric",
            "no metric is called numbers; did you mean number?",
            id="unknown metric",
        ),
        pytest.param(
            "number",
            {"marker": ["A"]},
            "marker",
            "Extra inputs are not permitted, not [A]; number takes parser, markers",
            id="unknown parameter",
        ),
        pytest.param(
            "number",
            {"parser": "us"},
            "parser",
            "no parser is called us; the parsers are loftq, peft, pissa, loraga; number takes parser, markers",
            id="unknown parser",
        ),
        pytest.param(
            "chrf",
            {"char_order": 99999999},
            "char_order",
            "Input should be less than or equal to 20, not 99999999; chrf takes char_order, word_order, beta",
            id="parameter out of range",
        ),
        pytest.param(
            "rows",
            {"metric": "bleu4"},
            "",
            "rows has another meaning in results; give the column another name",
            id="name of a field",
        ),
        pytest.param(
            "a-b",
            {"metric": "bleu4"},
            "",
            "a-b must consist of letters, digits and _; give the column another name",
            id="hyphen in a name",
        ),
        pytest.param("chrf", {"label": 5}, "label", "expected a text", id="number as a label"),
    ],
)
def test_a_wrong_declaration_is_refused_with_its_key(name, entry, key, problem):
    with pytest.raises(WrongMetric) as error:
        registry.column(name, entry)
    assert (error.value.key, error.value.problem) == (key, problem)


def test_metrics_are_asked_for_as_study_yaml_declares_them():
    asked = registry.requested(["rouge_l", 'number: {markers: ["A: "]}', "chrf: {word_order: 2}"])
    entries = [("rouge_l", {}), ("number", {"markers": ["A: "]}), ("chrf", {"word_order": 2})]
    assert [column.entry for column in asked.values()] == [{"metric": name} | more for name, more in entries]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        pytest.param(["bleu"], "bleu: no metric is called bleu; did you mean bleu4 or sacrebleu?", id="unknown name"),
        pytest.param(
            ["number: {"],
            "number: {: not valid YAML: did not find expected node content (column 1)",
            id="not YAML",
        ),
        pytest.param(
            ["- a"],
            "- a: expected a metric's name, or parameters as in 'number: {markers: [\"A: \"]}'",
            id="not a mapping",
        ),
        pytest.param(
            ["number: {marker: x}"],
            "number: {marker: x}: marker: Extra inputs are not permitted, not x; number takes parser, markers",
            id="unknown parameter",
        ),
        pytest.param(
            ["number", "number: {parser: peft}"],
            "number: {parser: peft}: two metrics are called number; rename one, as in 'other: {metric: number}'",
            id="twice the same name",
        ),
    ],
)
def test_a_wrong_value_of_metric_is_refused(texts, message):
    with pytest.raises(UserError) as error:
        registry.requested(texts)
    assert str(error.value) == f"--metric {message}"
