"""Published predictions whose references are in another form than the study's rows: GSM8K's, by its own authors."""

import orjson
import pytest
from conftest import SHARED

from qlora_recipes.base.files import write_rows
from qlora_recipes.data import studies
from qlora_recipes.evaluate.score import score
from qlora_recipes.study import published_predictions

GSM8K = SHARED / "gsm8k"


@pytest.mark.skipif(not GSM8K.is_dir(), reason="the data sets' files are not part of the project")
def test_gsm8ks_published_solutions_score_as_printed(place):
    study = studies.find("loftq-gsm8k")
    rows = [orjson.loads(line) for line in (GSM8K / "solutions-6b.jsonl").read_bytes().splitlines()]
    as_published = [row | {"ground_truth": row.pop("reference")} for row in rows]
    write_rows(place / study.data.raw / "example_model_solutions.jsonl", as_published)
    by_name = {baseline.name: baseline for baseline in study.baselines}
    for name, printed in (("GPT-3 6B, finetuned", 21.68), ("GPT-3 6B, with a verifier", 39.04)):
        predictions = by_name[name].predictions
        assert predictions
        assert str(by_name[name].scores["accuracy"]) == str(printed)
        pairs = published_predictions.read(study, predictions, "test")
        assert len(pairs) == 1319
        assert score(pairs, study.columns, {})[0].scores["accuracy"].value == pytest.approx(printed, abs=0.005)
