"""Published predictions whose references are in another form than the study's rows: GSM8K's, by its own authors."""

from pathlib import Path

import orjson
import pytest
from conftest import SHARED, Recipe

from qlora_recipes.base.errors import UserError
from qlora_recipes.base.files import write_rows
from qlora_recipes.data import study
from qlora_recipes.scores import published
from qlora_recipes.scores.score import score

GSM8K = SHARED / "gsm8k"


@pytest.mark.skipif(not GSM8K.is_dir(), reason="the data sets' files are not part of the project")
def test_gsm8ks_published_solutions_score_as_printed(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_study = study.find("loftq-gsm8k")
    assert recipe("data", "prepare", GSM8K, "--study", "loftq-gsm8k").returncode == 0
    rows = [orjson.loads(line) for line in (GSM8K / "solutions-6b.jsonl").read_bytes().splitlines()]
    file = tmp_path / of_study.data.raw / "example_model_solutions.jsonl"
    as_published = [row | {"ground_truth": row.pop("reference")} for row in rows]
    write_rows(file, as_published)
    monkeypatch.chdir(tmp_path)
    by_name = {baseline.name: baseline for baseline in of_study.baselines}
    for name, printed in (("GPT-3 6B, finetuned", 21.68), ("GPT-3 6B, with a verifier", 39.04)):
        predictions = by_name[name].predictions
        assert predictions and by_name[name].scores["accuracy"].value == printed
        pairs, matched = published.read(of_study, next(iter(of_study.published)), predictions, "test")
        assert matched and len(pairs) == 1319
        assert score(pairs, of_study.columns)[0]["accuracy"] == pytest.approx(printed, abs=0.005)
    write_rows(file, [as_published[1], as_published[0], *as_published[2:]])
    assert predictions
    with pytest.raises(UserError, match=r"solutions\.jsonl: 2 of 1,319 .*test\.jsonl"):
        published.read(of_study, next(iter(of_study.published)), predictions, "test")
