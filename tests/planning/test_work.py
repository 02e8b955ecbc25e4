"""What a training takes: how many tokens a plan counts with, where it has them from, and the operations of one."""

import shutil
from pathlib import Path
from typing import Any

import orjson
import pytest
from conftest import config_with

from qlora_recipes.base import yamlfiles
from qlora_recipes.base.errors import UserError
from qlora_recipes.checks import check
from qlora_recipes.configs import gpus
from qlora_recipes.configs.compose import Request, compose
from qlora_recipes.planning import plan, planner, work

PUBLISHED = "peft-metamathqa/lora-rank32"


@pytest.fixture
def own(tiny: Path, sample: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A config with a tokenizer and rows that are here, and an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data = [{"path": str(sample / "train.jsonl"), "type": "alpaca"}]
    change = {"base_model": str(tiny), "revision_of_model": None, "special_tokens": {"pad_token": "</s>"}}
    file = tmp_path / "own.yaml"
    config = config_with(change | {"datasets": data, "test_datasets": None, "evals_per_epoch": None})
    file.write_text(yamlfiles.write_yaml(config))
    return file


def found(file: Path | str, *overrides: str, **more: Any) -> work.Lengths:
    """The lengths of a config that are known."""
    known, _ = work.lengths_of(compose(Request(str(file), overrides=list(overrides))), **more)
    assert known
    return known


def test_some_rows_tell_of_all_and_are_tokenized_once(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "ENOUGH", 40)
    some = found(own)
    assert " 37 " in some.are
    assert some.rows == 109 and some.longest is None
    with monkeypatch.context() as patched:
        patched.setattr(check, "training_lengths", None)
        assert found(own, "learning_rate=0.1") == some
    every = found(own, counted=True)
    assert every.longest and some.tokens == pytest.approx(every.tokens, rel=0.1)
    assert every.tokens < every.padded < 1.5 * every.tokens
    assert found(own) == every  # the better figure is kept
    assert found(own, "val_set_size=0.5").rows == 54
    short = found(own, "sequence_len=300", counted=True)
    assert short.rows < 109 and short.longest and short.longest <= 300  # the others are dropped


def test_rows_that_change_are_tokenized_again(own: Path, tmp_path: Path) -> None:
    before = found(own)
    (path,) = {dataset["path"] for dataset in yamlfiles.read_yaml(own)["datasets"]}
    rows = [orjson.loads(line) for line in Path(path).read_bytes().splitlines()]
    longer = tmp_path / "longer.jsonl"
    longer.write_bytes(b"".join(orjson.dumps(row | {"output": row["output"] * 2}) + b"\n" for row in rows))
    assert found(own, f"datasets.0.path={longer}").tokens > before.tokens
    kept = found(own, f"datasets.0.path={longer}")
    longer.write_bytes(b"".join(orjson.dumps(row | {"output": row["output"] * 3}) + b"\n" for row in rows))
    assert found(own, f"datasets.0.path={longer}").tokens > kept.tokens


def test_rows_that_cannot_be_tokenized_say_so_and_hinder_no_plan(own: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"instruction": "a", "output": "b"}\n{"instruction": \n')
    composed = compose(Request(str(own), overrides=[f"datasets.0.path={broken}"]))
    assert work.lengths_of(composed)[0] is None
    with pytest.raises(UserError, match="row"):
        work.lengths_of(composed, counted=True)


def test_hours_count_padding(own: Path) -> None:
    planned = plan.of_request(Request(str(own)), gpus.find("T4"))
    known, took = found(own), planned["work"]
    per_token = work.flops_of_token(plan.plan(yamlfiles.read_yaml(own))[1], round(known.padded / known.rows))
    padded = known.padded * yamlfiles.read_yaml(own)["num_epochs"]
    assert took["hours"] == pytest.approx(padded * per_token / (65e12 * work.UTILIZATION) / 3600, rel=1e-3)
    assert planned["longest_batch"]["tokens"] == known.longest
    assert not any("upper bound" in note for note in planned["notes"])


def test_a_studys_own_count_is_taken_for_its_own_rows_and_tokenizer() -> None:
    assert found(PUBLISHED).tokens == 4198051 and found(PUBLISHED).rows == 20000
    for change in (
        *("sequence_len=512", "base_model=meta-llama/Llama-2-7b-hf", "revision_of_model=main", "val_set_size=0.5"),
        *("datasets.0.path=mine.jsonl", "datasets.0.split=train[:100]", "special_tokens.bos_token=<s>"),
    ):
        composed = compose(Request(PUBLISHED, overrides=[change]))
        assert work.lengths_of(composed)[0] is None, change


def test_a_studys_own_count_holds_where_only_padding_changes() -> None:
    batches = ["micro_batch_size=2", "gradient_accumulation_steps=2"]
    changes: list[dict[str, Any]] = [{"overrides": batches}, {"profiles": ["packed"]}, {"mirror": True}]
    for change in changes:
        known, _ = work.lengths_of(compose(Request(PUBLISHED, **change)))
        assert known and known.tokens == 4198051, change


def test_where_no_row_is_left_a_plan_says_so(own: Path) -> None:
    planned = plan.of_request(Request(str(own), overrides=["sequence_len=8"]), gpus.find("T4"))
    assert any("sequence_len" in note for note in planned["notes"])


def test_rows_that_would_be_counted_in_part_are_not(own: Path, sample: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.parquet").touch()
    both = [{"path": str(sample / "train.jsonl"), "type": "alpaca"}, {"path": "tatsu-lab/alpaca", "type": "alpaca"}]
    for change, key in (
        *((f"datasets.0.{part}", "datasets.0") for part in ("split=train[50:]", "shards=4", "weight=0.5")),
        (f"datasets.0.path={tmp_path / 'rows.parquet'}", "datasets.0"),
        (f"datasets={orjson.dumps(both).decode()}", "datasets.1"),
    ):
        composed = compose(Request(str(own), overrides=[change]))
        known, reason = work.lengths_of(composed)
        assert known is None and key in reason
        with pytest.raises(UserError, match=f"--data: .*{key}"):
            work.lengths_of(composed, counted=True)


def test_steps_of_packed_rows_are_of_full_sequences(own: Path) -> None:
    request = Request(str(own), overrides=["max_steps=3", "sample_packing=true"])
    config = yamlfiles.read_yaml(own)
    step = config["micro_batch_size"] * config["gradient_accumulation_steps"] * config["sequence_len"]
    assert plan.of_request(request)["work"]["tokens"] == 3 * step


def test_what_tokenizes_rows_is_in_the_name_of_what_is_kept(
    own: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def key(**change: Any) -> Path:
        config = yamlfiles.read_yaml(own) | {"base_model": str(model), "tokenizer_config": str(other)} | change
        (tmp_path / "changed.yaml").write_text(yamlfiles.write_yaml(config))
        return work._cached(compose(Request(str(tmp_path / "changed.yaml"))))

    model, other, written = tmp_path / "model", tmp_path / "other", tmp_path / "written.jinja"
    shutil.copytree(tiny, model)
    other.mkdir()
    keys = [key(), key(learning_rate=0.1)]
    assert keys[0] == keys[1]
    for file, content in (
        (model / "chat_template.jinja", "{{ bos_token }}"),
        (other / "merges.txt", "a b"),
        (written, "{{ eos_token }}"),
        (written, "{{ eos_token }} "),
    ):
        file.write_text(content)
        keys.append(key(chat_template_jinja=str(written)))
    monkeypatch.setattr(planner, "packages", lambda: {"transformers": "6"})
    keys.append(key(chat_template_jinja=str(written)))
    assert len(set(keys)) == len(keys) - 1


@pytest.mark.long
def test_hours_are_near_those_of_published_runs() -> None:
    """PEFT's run of a rank of 32 trained for 585.2 s on an L40S; with every row as a full one it would be 1,880 s."""
    planned = plan.of_request(Request("peft-metamathqa/lora-rank32"), gpus.find("L40S"))
    assert planned["work"]["hours"] * 3600 == pytest.approx(585.2, rel=0.2)
