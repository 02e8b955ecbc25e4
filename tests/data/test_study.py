"""A study.yaml that is wrong says where and what to do; what a study declares is what it has."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import Recipe
from run_folders import a_run

from qlora_recipes.base import paths, yamlfiles
from qlora_recipes.base.errors import UserError
from qlora_recipes.data import study
from qlora_recipes.data.published import ADAPTER_FILES, Score
from qlora_recipes.data.study import Study

RECIPE = "haider2024/llama-2-7b"


PUBLISHED = {"prediction": {"file": "msg-5000-pred.txt"}, "reference": {"file": "msg-5000-gold.txt"}}


def predicted(**predictions: Any) -> dict[str, Any]:
    """A change by which a recipe has published predictions."""
    return {"published": {RECIPE: {"predictions": predictions}}}


def loaded(folder: Path, change: dict[str, Any]) -> Study:
    """The first study with some keys changed; None deletes one."""
    shutil.copytree(paths.RECIPES / "haider2024", folder, dirs_exist_ok=True)
    content = yamlfiles.read_yaml(folder / "study.yaml") | change
    kept = {key: value for key, value in content.items() if value is not None}
    (folder / "study.yaml").write_text(yamlfiles.write_yaml(kept))
    return study.load(folder)


def test_the_committed_schema_is_that_of_the_declaration() -> None:
    assert study.SCHEMA.read_text(encoding="utf-8") == study.generate_schema()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"title": None}, "study.yaml:1: title: is missing; add it"),
        ({"titel": "x"}, "titel: no such key here; correct its name or delete it"),
        ({"tags": "code"}, "tags: expected a list, as in [a, b] instead of code"),
        ({"metrics": {}}, "metrics: holds nothing; give at least one"),
        ({"metrics": {"blue": {}}}, "metrics.blue: no metric is called blue; a column of another name says which"),
        ({"metrics": {"a": {"metric": "numbr"}}}, "metrics.a.metric: no metric is called numbr; did you mean number?"),
        ({"metrics": {"number": {"marker": ["x"]}}}, "metrics.number.marker: no parameter of number; it takes"),
        ({"metrics": {"number": {"markers": "x"}}}, "metrics.number.markers: expected a list, as in [a, b]"),
        ({"metrics": {"rows": {"metric": "number"}}}, "metrics.rows: rows means something else in results"),
        ({"published": {RECIPE: {"scores": {"bleu": 5}}}}, f"published.{RECIPE}.scores.bleu: bleu is not one of the"),
        ({"published": {RECIPE: {"scores": {"bleu4": "5 ± 1"}}}}, "scores.bleu4: expected a number, or as in {value: "),
        ({"published": {RECIPE: {"bleu4": 5}}}, f"published.{RECIPE}.bleu4: no such key here"),
        ({"published": {RECIPE: {"curve": "c.csv"}}}, "curve: no file c.csv lies beside study.yaml; add it"),
        (
            {"beside": {"a/b": {"of": "haider2024/lama-2-7b", "reproduces": True}}},
            "is not under published; did you mean",
        ),
        ({"tolerances": {"bleu": 0.1}}, "tolerances.bleu: bleu is not one of the study's metrics; did you mean bleu4"),
        ({"tolerances": {"bleu4": "small"}}, "tolerances.bleu4: expected a number instead of small"),
        ({"tolerances": {"train_loss": 0.1}}, "tolerances.train_loss: train_loss is not one of the study's metrics"),
        ({"published": {RECIPE: {"repeats": {"bleu4": [5.0]}}}}, "repeats.bleu4: give at least 2"),
        ({"published": {RECIPE: {"repeats": {"bleu": [5.0, 6.0]}}}}, "repeats.bleu: bleu is not one of the study's"),
        ({"columns": ["rouge"]}, "columns.0.rouge: rouge is not one of the study's metrics; did you mean rouge_l?"),
        ({"decoding": {"max_new_tokens": 0}}, "decoding.max_new_tokens: expected at least 1, not 0"),
        ({"decoding": {"max_new_tokens": 9, "topk": 4}}, "decoding.topk: no such key here"),
        ({"decoding": {"max_new_tokens": 9, "do_sample": "yes"}}, "decoding.do_sample: expected true or false instead"),
        ({"decodings": {"by beam": {"max_new_tokens": 9}}}, "decodings.by beam: give it a name of letters"),
        (
            {"baselines": [{"name": "x", "scores": {"f1": 1}, "test_set": "test"}]},
            "baselines.0.scores.f1: f1 is not one",
        ),
        (predicted(prediction={"file": "msg-5000-pred.txt"}), "predictions: give prediction and reference, the files"),
        (
            predicted(absent="no", **PUBLISHED),
            "predictions: give prediction and reference, the files with them, or abs",
        ),
        (
            predicted(reference={"file": "msg-5000-god.txt"}, prediction={"file": "msg-5000-pred.txt"}),
            "predictions.reference.file: no source of data gives a file msg-5000-god.txt; did you mean msg-5000-gold",
        ),
        (predicted(test_set="test-subset-3", **PUBLISHED), "predictions.test_set: no test set test-subset-3; did you"),
        (
            {"published": {RECIPE: {"adapter": "mine"}}},
            f"published.{RECIPE}.adapter: no source of data gives mine/adap",
        ),
    ],
)
def test_a_mistake_is_told_with_its_line_and_a_remedy(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError) as error:
        alone = dict.fromkeys(("columns", "tolerances", "baselines")) | {"published": {RECIPE: {}}, "beside": {}}
        loaded(tmp_path, alone | change)
    (line,) = str(error.value).splitlines()
    assert line.startswith(f"{tmp_path / 'study.yaml'}:")
    assert says in line


def test_all_mistakes_are_told_at_once_in_the_order_of_the_lines(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        loaded(
            tmp_path, {"titel": 1, "tags": 3, "metrics": {"blue": {}, "chrf": {"n": 1}}, "tolerances": {"blue": "x"}}
        )
    lines = [
        int(line.removeprefix(f"{tmp_path}/study.yaml:").partition(":")[0]) for line in str(error.value).splitlines()
    ]
    assert len(lines) == 5 + 15 and lines == sorted(lines) and lines[0] > 1


def test_the_line_is_that_of_a_recipe_whose_name_has_dots(tmp_path: Path) -> None:
    published = {"a/llama-3.1-8b": {}, "a/llama-3.2-3b": {"trainr": "x"}}
    with pytest.raises(UserError) as error:
        loaded(tmp_path, {"published": published, "beside": {}})
    number = int(str(error.value).removeprefix(f"{tmp_path}/study.yaml:").partition(":")[0])
    assert "trainr: x" in (tmp_path / "study.yaml").read_text().splitlines()[number - 1]


def test_what_a_study_declares(tmp_path: Path) -> None:
    curve = tmp_path / "a.csv"
    curve.write_text("step,train_loss\n1,2.5\n")
    score = {"value": 67.4, "spread": 1.0}
    of_study = loaded(
        tmp_path,
        {
            "metrics": {"accuracy": {"metric": "number", "label": "GSM8K"}, "perplexity": None},
            "published": {RECIPE: {"scores": {"accuracy": score, "perplexity": 3}, "curve": "a.csv"}},
            **{"columns": None, "beside": None, "tolerances": None, "baselines": None, "open_settings": None},
            "decodings": {"greedy": {"max_new_tokens": 9}},
        },
    )
    assert (of_study.first.name, of_study.first.label) == ("accuracy", "GSM8K, %")
    assert list(of_study.table) == list(of_study.columns) == ["accuracy", "perplexity"]
    published = of_study.published[RECIPE].scores
    assert published == {"accuracy": Score(value=67.4, spread=1.0), "perplexity": Score(value=3)}
    assert [str(score) for score in published.values()] == ["67.4 ± 1", "3"]
    assert (of_study.decodings["greedy"].top_k, of_study.beside, of_study.baselines) == (0, {}, [])


def test_thirty_mistakes_in_a_file_are_thirty_messages(tmp_path: Path) -> None:
    wrong = yamlfiles.read_yaml(paths.RECIPES / "haider2024" / "study.yaml")
    data = wrong["data"]
    data |= {"key": "code reviewer", "name": 3, "licence": "", "urls": "https://example.org"}
    del data["source"]
    archive = data["sources"]["Comment_Generation.zip"]
    archive |= {"url": "zenodo.org/x.zip", "bytes": "847 MB", "md5": "1"}
    archive["files"]["msg-valid.jsonl"] |= {"rows": 0, "sha256": "cb25"}
    data["row"]["input"] = ["patch"]
    data["splits"]["valid"] |= {"take": 5}
    data["splits"]["test"]["subsets"]["test-subset-2"] |= {"positions": "b.json"}
    data["splits"]["train"]["from"] = 1
    wrong |= {"title": None, "tags": "code", "titel": "x", "differences": [1], "columns": ["bleu"]}
    wrong["decoding"] |= {"max_new_tokens": 0, "do_sample": "no", "temperatur": 1}
    wrong["metrics"] |= {"blue4": {}, "accuracy": {"metric": "number", "parsed_as": "me"}, "chrf": {"order": 4}}
    wrong["published"]["haider2024/llama-2-7b"] = {"scores": {"bleu5": 5.0}, "curve": "curve.csv"}
    wrong["published"]["haider2024/code-llama-7b"] = {"scores": {"bleu4": "5.58"}, "trainr": "Axolotl"}
    wrong["beside"]["haider2024/all-linear/llama-2-7b"]["of"] = "haider2024/lama-2-7b"
    wrong["tolerances"] = {"bleu4": "small", "meteor": 1}
    wrong["baselines"][0] |= {"scores": {"bertscore": 0.8}}
    with pytest.raises(UserError) as error:
        loaded(tmp_path, wrong | {"title": 5})
    lines = str(error.value).splitlines()
    print("\n".join(line.replace(str(tmp_path), "…") for line in lines))
    assert len(lines) >= 30
    assert all(re.match(rf"{tmp_path}/study.yaml:[1-9]\d*: [^:]+: .+", line) for line in lines)


def test_what_authors_published_on_the_way_is_fetched_only_when_it_is_asked_for() -> None:
    first, loftq = study.find("haider2024"), study.find("loftq-gsm8k")
    assert first.fetched == ["Comment_Generation.zip"]
    others = set(loftq.data.sources) - set(loftq.fetched)
    assert others == {
        "example_model_solutions.jsonl",
        *(
            f"{model}-4bit-64rank/gsm8k/{file}"
            for model in ("Llama-2-7b-hf", "Meta-Llama-3-8B")
            for file in ADAPTER_FILES
        ),
    }
    assert [baseline.name for baseline in loftq.compared] == ["Llama 3 8B, all weights trained"]


def test_repeats_of_a_recipe_stand_for_the_others_of_its_study(tmp_path: Path) -> None:
    other, beside = "haider2024/llama-3-8b", "haider2024/all-linear/llama-2-7b"
    published = {RECIPE: {"repeats": {"bleu4": [5.0, 5.2]}}, other: {}}
    changed = loaded(tmp_path, {"published": published, "beside": {beside: {"of": RECIPE, "reproduces": True}}})
    assert [changed.repeats(name, "bleu4") for name in (RECIPE, beside, other)] == [[5.0, 5.2]] * 3
    assert changed.repeats(RECIPE, "rouge_l") == [] == study.load(paths.RECIPES / "haider2024").repeats(RECIPE, "bleu4")


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["list"], 0),
        (["check", "haider2024/code-llama-7b"], 0),
        (["run", "haider2024/code-llama-7b", "--rehearse", "--dry-run"], 0),
        (["results"], 0),
        (["check", "broken/mine"], 2),
        (["run", "broken/mine", "--rehearse", "--dry-run"], 2),
        (["study", "check", "broken"], 2),
        (["reproduce", "broken", "--dry-run"], 2),
    ],
    ids=str,
)
def test_a_malformed_study_is_an_error_for_itself_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: Recipe, words: list[str], code: int
) -> None:
    monkeypatch.chdir(tmp_path)
    (folder := tmp_path / "recipes" / "broken").mkdir(parents=True)
    (folder / "study.yaml").write_text("titel: x\n")
    (folder / "mine.yaml").write_text((paths.RECIPES / "haider2024" / "code-llama-7b.yaml").read_text())
    a_run(tmp_path / "runs", "broken/mine", "one", 5.0)
    done = recipe(*words)
    assert done.returncode == code
    assert "recipes/broken/study.yaml:1" in done.stderr + done.stdout
    assert code or "warning: the study broken is left out" in done.stderr
