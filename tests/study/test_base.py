"""A recipe that begins with the merged run of another one."""

import signal
from pathlib import Path
from typing import Any

import pytest
from conftest import finish, recipe_config, start, typed, wait_until
from run_folders import a_run

from qlora_recipes.base import paths
from qlora_recipes.base.errors import UserError
from qlora_recipes.base.files import sha256, write_json
from qlora_recipes.check import check
from qlora_recipes.config import compose, substitution
from qlora_recipes.config.compose import Composed, Request
from qlora_recipes.config.origin import Base
from qlora_recipes.evaluate.evaluate import EvaluationRequest
from qlora_recipes.run import run
from qlora_recipes.run.backends import TaskResult
from qlora_recipes.run.backends.local import Local
from qlora_recipes.run.rundir import RunDir
from qlora_recipes.study import evaluation, pipeline
from qlora_recipes.training.run_record import FileState

SFT, DPO = "zephyr/sft-qlora", "zephyr/dpo-qlora"
MISTRAL = "mistralai/Mistral-7B-v0.1"
MISSING = "the merged model of zephyr/sft-qlora does not exist yet"


def trained(name: str, merged: bool = True, **more: Any) -> RunDir:
    """A finished run of the base, merged or not."""
    folder = a_run(Path("runs"), SFT, name, 5.0, **more)
    folder.output.mkdir()
    folder.adapter.write_bytes(name.encode())
    record = folder.read()
    record.adapter = FileState.of(folder.adapter)
    folder.write(record)
    if merged:
        (folder.output / "merged").mkdir()
        (folder.output / "merged" / "config.json").write_text("{}")
        (folder.output / "merged" / "adapter.sha256").write_text(sha256(folder.adapter))
    return folder


def findings(composed: Composed, launching: bool = False) -> list[str]:
    report = check.check_config(composed, launching=launching)
    return [
        f"{finding.level}: {finding.text}" for finding in report.findings if finding.rule in ("no-base", "other-base")
    ]


def test_without_a_merged_run_a_recipe_is_checked_with_the_model_of_its_base_and_not_started(place):
    trained("1-not-merged", merged=False)
    trained("2-published", published_adapter="owner/adapter")
    trained("3-rehearsal", rehearsal=True)
    trained("4-stopped", state="interrupted")
    trained("5-trained-on").adapter.write_bytes(b"later")
    stale = RunDir(Path("runs", SFT, "5-trained-on"))
    stale.write(stale.read().model_copy(update={"adapter": FileState.of(stale.adapter)}))
    composed = compose.compose(Request(DPO))
    assert composed.base == Base(SFT, f"runs/{SFT}/5-trained-on")
    assert composed.config["base_model"] == MISTRAL
    assert composed.config["revision_of_model"] == recipe_config(SFT)["revision_of_model"]
    remedy = f"run `recipe publish runs/{SFT}/5-trained-on --merge`"
    assert findings(composed) == [f"note: base_model: {MISSING}; {remedy} [no-base:base_model]"]
    assert findings(composed, launching=True) == [f"error: base_model: {MISSING}; {remedy} [no-base:base_model]"]


def test_the_base_model_is_the_newest_merged_run_and_recorded(place):
    trained("1-old")
    newest = trained("2-new")
    composed = compose.compose(Request(DPO))
    assert composed.base == Base(SFT, f"runs/{SFT}/2-new", sha256(newest.adapter))
    assert composed.config["base_model"] == f"runs/{SFT}/2-new/output/merged"
    assert "revision_of_model" not in composed.config
    assert findings(composed) == []
    record = run.record_of(composed, Request(DPO))
    assert record.base == composed.base
    assert [Path(file.path).name for file in record.named_files] == ["adapter.sha256", "config.json"]
    assert compose.compose(Request(DPO, base=Path("runs", SFT, "1-old"))).base.run == f"runs/{SFT}/1-old"


@pytest.mark.parametrize("merged", [True, False])
def test_another_model_in_the_place_of_the_base_is_refused(place, merged):
    trained("1-run", merged)
    composed = compose.compose(Request(DPO, overrides=typed("base_model=owner/model")))
    assert (
        f"error: base_model: owner/model instead of the merged model of {SFT}, which the header names as base; leave "
        "base_model out, or delete base in the header of a copy [other-base:base_model]"
    ) in findings(composed)


def pipelines(**more: Any) -> list[pipeline.Pipeline]:
    requests = [(TaskResult(name), Request(name, **more)) for name in (SFT, DPO)]
    both = pipeline.pipelines_of(requests, EvaluationRequest(), Local())
    pipeline.link(both)
    return both


def test_a_pipeline_takes_the_run_of_its_base_also_if_another_one_is_newer(place):
    older = trained("1-old")
    trained("2-new")
    sft, dpo = pipelines()
    assert (sft.base, sft.merges, dpo.base, dpo.merges) == (None, True, sft, False)
    with pytest.raises(UserError, match=f"^{SFT}, its base, is not finished; run the same command again then$"):
        dpo.task().claim()
    sft.result.run = older.path
    sft.result.fail("merge", "the merge failed")
    with pytest.raises(UserError, match="its base, is not finished"):
        dpo.task().claim()
    sft.result.errors = []
    (training,) = dpo.task().claim()
    assert training.folder.read().base.run == f"runs/{SFT}/1-old"
    assert training.folder.config["base_model"] == f"runs/{SFT}/1-old/output/merged"


def test_a_trained_base_is_merged_once(place):
    folder = trained("1-run", merged=False)
    sft, _ = pipelines()
    (command,) = sft._merge(folder)
    assert command.words == ["publish", str(folder.path), "--merge"]
    assert sft._merge(trained("2-merged")) == []


def adapter_on(folder: Path, model: str) -> Path:
    folder.mkdir()
    write_json(folder / "adapter_config.json", {"base_model_name_or_path": model})
    return folder


def test_an_adapter_that_names_another_base_than_the_merged_one_is_refused(place):
    merged = trained("1-run", rehearsal=True).output / "merged"
    not_merged = trained("2-run", merged=False).output / "merged"
    for name, model in (("wrong", MISTRAL), ("unmerged", str(not_merged)), ("small", str(substitution.folder()))):
        with pytest.raises(UserError) as raised:
            evaluation.request_for(DPO, adapter_on(place / name, model), [])
        assert str(raised.value) == (
            f"{place / name}/adapter_config.json: base_model_name_or_path: {model}: not a merged model of {SFT}, on "
            f"which {DPO} trains; if the adapter was trained on one, name its folder; run `recipe run {SFT}`, then "
            f"`recipe publish {SFT} --merge`"
        )
    request = evaluation.request_for(DPO, adapter_on(place / "right", str(merged)), [])
    assert (request.rehearse, request.base) == (True, Path("runs", SFT, "1-run"))


def finished(recipe: str) -> list[RunDir]:
    folders = map(RunDir, paths.run_folders(Path("runs", recipe)))
    return [folder for folder in folders if folder.read().state == "finished"]


@pytest.mark.long
def test_a_chain_that_is_killed_twice_ends_with_the_adapter_of_an_undisturbed_one(place, fake_axolotl):
    words = ("reproduce", "zephyr", "--rehearse", "--json")
    first = start(place, *words, command=fake_axolotl, FAKE_GO="go")  # the merge waits for it
    wait_until(lambda: [*Path("runs", SFT).rglob(".merged.part/merged/*.safetensors")], first)
    first.send_signal(signal.SIGKILL)
    first.communicate(timeout=60)
    second = start(place, *words, command=fake_axolotl, FAKE_HOLD="1")  # the training waits for a signal
    wait_until(lambda: [*Path("runs", DPO).rglob("metrics.jsonl")], second)
    second.terminate()
    finish(second, 1)
    finish(start(place, *words, command=fake_axolotl))
    (base,), (run,) = finished(SFT), finished(DPO)
    assert run.read().base == Base.of_run(SFT, base.path)
    adapter, model = run.adapter.read_bytes(), (base.output / "merged" / "model.safetensors").read_bytes()
    assert model == b"halfother half"
    Path("runs").rename("stopped")
    finish(start(place, *words, command=fake_axolotl))
    (base,), (undisturbed,) = finished(SFT), finished(DPO)
    assert undisturbed.config["base_model"] == str(base.output / "merged")
    assert undisturbed.adapter.stat().st_size == len(adapter)
