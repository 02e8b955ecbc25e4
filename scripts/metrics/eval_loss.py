"""The eval loss of a run as a metric: measured in training, on the rows for evaluation, not on predictions."""

from .metric import Metric

METRIC = Metric(
    name="eval_loss",
    label="eval loss",
    hub_type="loss",
    low=0,
    high=None,
    unit="nats a token",
    source="the last of the training, a mean over all tokens that count",
    higher_is_better=False,
    of_loss=float,
)
