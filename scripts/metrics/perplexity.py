"""The perplexity of a run: e to the power of its eval loss, which is measured in training."""

import math

from .metric import Metric

METRIC = Metric(
    name="perplexity",
    label="perplexity",
    hub_type="perplexity",
    low=1,
    high=None,
    source="exp of the eval loss a token",
    higher_is_better=False,
    of_loss=math.exp,
)
