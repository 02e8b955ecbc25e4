import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from run_folders import a_checkpoint, a_tiny_run
from safetensors.torch import save_file

from qlora_recipes.base import yamlfiles
from qlora_recipes.base.errors import UserError, WorkFailed
from qlora_recipes.base.files import Row, sha256
from qlora_recipes.configs import config, substitution
from qlora_recipes.configs.datafiles import DataFile
from qlora_recipes.data.study import Decoding
from qlora_recipes.results import run_rows
from qlora_recipes.results.run_rows import RunResult
from qlora_recipes.runs.records import FileState, Launch, State
from qlora_recipes.runs.rundir import RunDir
from qlora_recipes.scores import evaluate
from qlora_recipes.scores import reference as references
from qlora_recipes.scores.evaluations import (
    ADAPTER,
    Answer,
    Evaluation,
    EvaluationSettings,
    read_predictions,
    read_scores,
)
from qlora_recipes.scores.prompter import Prompter
from qlora_recipes.scores.reference import Reference, base_model, batches
from qlora_recipes.scores.task import EvaluationRequest, EvaluationTask


@pytest.fixture
def run(tmp_path: Path, tiny: Path, tiny_profile: Path, sample: Path) -> RunDir:
    """A finished run of the tiny Llama as far as an evaluation of its base model needs one."""
    return a_tiny_run(tmp_path, tiny, tiny_profile, sample)


def predictions(run: RunDir) -> list[dict[str, Any]]:
    file = run.path / "evaluations" / "base-model" / "predictions.jsonl"
    return [orjson.loads(line) for line in file.read_bytes().splitlines()]


def evaluated(run: RunDir, **more: Any) -> Evaluation:
    request = EvaluationRequest(adapter="none", max_new_tokens=8, judge="none", **more)
    return evaluate.evaluate(run, request)


def settings_of(cfg: yamlfiles.Config) -> EvaluationSettings:
    """What an evaluation of a config's base model without adapter and rows would depend on."""
    return EvaluationSettings(
        base_model=cfg["base_model"],
        adapter="none",
        adapter_sha256=None,
        data="",
        data_sha256="",
        rows=0,
        decoding=Decoding(max_new_tokens=8),
        batch_size=1,
        quantized=True,
        dtype="float32",
    )


@pytest.mark.parametrize(
    ("formats", "on_gpu", "dtype"),
    [
        ({"fp16": True, "bf16": False}, True, "float16"),  # the study's recipes
        ({"fp16": False, "bf16": True}, False, "bfloat16"),  # their rehearsal
        ({"fp16": True, "bf16": "auto"}, True, "float16"),
        ({}, True, "bfloat16"),
        ({"fp16": False}, False, "float32"),
    ],
)
def test_a_run_is_evaluated_in_the_precision_that_it_was_trained_in(
    run: RunDir, formats: yamlfiles.Config, on_gpu: bool, dtype: str
) -> None:
    cfg = {key: value for key, value in yamlfiles.read_yaml(run.config).items() if key not in ("fp16", "bf16")}
    run.config.write_text(yamlfiles.write_yaml(cfg | formats))
    record = run.read()
    record.provenance["gpus"] = [{"name": "Tesla T4"}] if on_gpu else []
    run.write(record)
    assert EvaluationTask(run, EvaluationRequest(adapter="none")).settings.dtype == dtype


def test_an_interrupted_evaluation_goes_on_and_gives_the_same(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = evaluated(run, limit=10, batch_size=4)
    expected = predictions(run)
    assert [row["row"] for row in expected] == list(range(10))
    (run.path / "evaluations" / "base-model" / "scores.json").unlink()

    answers, calls = Reference.answers, []

    def interrupted(self: Reference, prompts: list[list[int]], *how: int) -> list[list[int]]:
        calls.append(len(prompts))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return answers(self, prompts, *how)

    monkeypatch.setattr(Reference, "answers", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluated(run, limit=10, batch_size=4)
    with (run.path / "evaluations" / "base-model" / "predictions.part.jsonl").open("ab") as part:
        left = [
            b"\0" * 4096,
            b"{}",
            b"[3]",
            b'{"row": "x"}',
            orjson.dumps(expected[0] | {"row": 99}),
            b'{"row": 1, "prediction": "',
        ]
        part.write(b"\n".join(left))  # what machines without power, and processes that were killed, leave
    again = evaluated(run, limit=10, batch_size=4)
    assert calls[0] == 4 and calls[1] == calls[2]
    assert calls[0] + sum(calls[2:]) == 10  # the first batch was not done twice
    assert predictions(run) == expected
    assert (again.scores, again.settings) == (whole.scores, whole.settings)


def test_a_complete_evaluation_is_not_done_again_but_another_is(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    first = evaluated(run, limit=3)
    other = evaluated(run, limit=4)
    assert (first.scores["rows"], other.scores["rows"]) == (3, 4)
    monkeypatch.setattr("qlora_recipes.scores.reference.Reference.__init__", None)
    with pytest.raises(UserError, match=r"scores\.json: .* 4 .* 2 "):
        evaluated(run, limit=2)
    assert evaluated(run, limit=4) == other
    assert evaluated(run, limit=4, batch_size=2) == other  # the same work, done another way
    (run.path / "evaluations" / "base-model" / "predictions.jsonl").write_bytes(b"")
    with pytest.raises(TypeError):  # predictions that are lost are made anew
        evaluated(run, limit=4)


@pytest.fixture
def reference(run: RunDir) -> Callable[..., Reference]:
    """A maker of references for the run's base model, in fp32."""

    cfg = yamlfiles.read_yaml(run.config)
    return lambda **settings: Reference(Prompter(settings_of(cfg).model_copy(update=settings), cfg, run.output))


def generated(reference: Reference, rows: list[dict[str, Any]]) -> list[Answer]:
    """A prediction for each row."""
    done: dict[int, Answer] = {}
    for answers in reference.generate([example.prompt for example in reference.prompter.examples(rows)], done):
        done |= answers
    return [done[i] for i in range(len(rows))]


def test_batched_predictions_are_those_of_one_row_at_a_time(reference: Callable[..., Reference], sample: Path) -> None:
    rows = [orjson.loads(line) for line in (sample / "test.jsonl").read_bytes().splitlines()]
    single = generated(reference(batch_size=1), rows)
    assert generated(reference(batch_size=16), rows) == single


def test_a_batch_that_does_not_fit_is_done_in_halves(
    reference: Callable[..., Reference], sample: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    rows = [orjson.loads(line) for line in (sample / "test.jsonl").read_bytes().splitlines()][:7]
    small, fits, sizes = reference(batch_size=7), 7, []
    expected = generated(small, rows)
    answers = type(small).answers

    def with_little_memory(self: Reference, prompts: list[list[int]], *how: int) -> list[list[int]]:
        sizes.append(len(prompts))
        if len(prompts) > fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return answers(self, prompts, *how)

    monkeypatch.setattr(type(small), "answers", with_little_memory)
    fits = 2
    assert generated(small, rows) == expected
    assert max(sizes) > fits and sum(size for size in sizes if size <= fits) == len(rows)
    fits = 0
    with pytest.raises(WorkFailed, match=r"row .* \d+ tokens.* GPU"):
        generated(small, rows)


def test_a_small_model_is_given_many_rows_on_a_cpu(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    task = EvaluationTask(run, EvaluationRequest(adapter="none", judge="none"))

    def batched(**decoding: Any) -> tuple[int | None, list[int]]:
        """The tokens that there is room for, and the rows of each batch of 80."""
        settings = task.settings.model_copy(update={"decoding": task.settings.decoding.model_copy(update=decoding)})
        engine = Reference(Prompter(settings, task.cfg, run.output))
        monkeypatch.setattr(engine, "answers", lambda prompts, *_: [[5]] * len(prompts))
        return engine.settings.batch_tokens, [len(answers) for answers in engine.generate([[5] * 99] * 80, ())]

    # keys and values, two layers, two groups of heads of this size
    of_a_token = 2 * 2 * 2 * 16 * getattr(torch, task.settings.dtype).itemsize
    monkeypatch.setattr(references, "SMALL_CACHE", 2**14 * of_a_token)
    assert batched() == (2**14, [64, 16])
    assert batched(num_beams=4) == (2**12, [16] * 5)  # each beam has its own
    assert batched(do_sample=True) == (None, [16] * 5)
    monkeypatch.setattr(references, "SMALL", 0)
    assert batched() == (None, [16] * 5)


@pytest.mark.parametrize(("computes_in", "dequantized"), [({}, True), ({"bnb_4bit_compute_dtype": "float16"}, False)])
def test_weights_are_dequantized_where_their_layers_compute_in_the_models_dtype(
    run: RunDir, computes_in: yamlfiles.Config, dequantized: bool
) -> None:
    from bitsandbytes.nn import Linear4bit

    cfg = yamlfiles.read_yaml(run.config)
    run.config.write_text(yamlfiles.write_yaml(cfg | {"bnb_config_kwargs": cfg["bnb_config_kwargs"] | computes_in}))
    task = EvaluationTask(run, EvaluationRequest(adapter="none", judge="none"))
    model = Reference(Prompter(task.settings, task.cfg, run.output)).model
    assert any(isinstance(layer, Linear4bit) for layer in model.modules()) != dequantized


@given(
    st.lists(st.integers(1, 40_000), min_size=1, max_size=60),
    st.integers(1, 20),
    st.sampled_from([1, 512, 8192, 65536]),
)
def test_batches(lengths: list[int], most: int, tokens: int) -> None:
    made = list(batches(lengths, most, tokens))
    assert sorted(i for _, batch in made for i in batch) == list(range(len(lengths)))
    rooms = [room for room, _ in made]
    assert rooms == sorted(rooms, reverse=True)
    for room, batch in made:
        assert max(lengths[i] for i in batch) <= room
        assert len(batch) <= most
        assert len(batch) * room <= tokens or len(batch) == 1
        assert room <= max(2 * min(lengths[i] for i in batch), 256)


@pytest.fixture
def scored(run: RunDir, sample: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """The same run with an adapter, evaluated on two rows of a file of its own; what it generates is made up."""

    def predicted(task: EvaluationTask, tokenizer: Path, part: Path) -> tuple[list[Row], EvaluationSettings]:
        rows = [{"row": i, "reference": "a b c d", "prediction": "a b"} for i in range(task.settings.rows)]
        return rows, task.settings

    monkeypatch.setattr(evaluate, "predict", predicted)
    a_checkpoint(run.path, 1).joinpath(ADAPTER).rename(adapter := run.output / ADAPTER)
    shutil.copy(sample / "test.jsonl", data := run.path / "test.jsonl")
    cfg = yamlfiles.read_yaml(run.config)
    entry = cfg["test_datasets"][0] | {"path": str(data), "split": "train"}
    run.config.write_text(yamlfiles.write_yaml(cfg | {"test_datasets": [entry]}))
    files = [DataFile(path=str(data), sha256=sha256(data), bytes=0)]
    run.write(run.read().model_copy(update={"test_data": str(data), "adapter": FileState.of(adapter), "data": files}))
    evaluate.evaluate(run, EvaluationRequest(limit=2, judge="none"))
    return run


def again(run: RunDir) -> tuple[str | None, bool, str | None]:
    """What a list says of a run's evaluation and whether it has a score, before and after `evaluate`; the first alone
    where that refuses."""
    row = run_rows.row(RunResult(run, run.read()))
    evaluate.evaluate(run, EvaluationRequest(limit=2, judge="none"))
    return row["evaluation"], row["bleu4"] is not None, run_rows.row(RunResult(run, run.read()))["evaluation"]


def test_times_alone_make_no_evaluation_another(scored: RunDir) -> None:
    before = read_scores(scored.path)
    record = scored.read()
    record.launches = [Launch(command=[], started=(later := "2999-01-01T00:00:00+00:00"), ended=later)]
    scored.write(record)
    assert again(scored) == (None, True, None)
    for file in (scored.output / ADAPTER, scored.path / "test.jsonl", scored.path / "predictions.jsonl"):
        os.utime(file, (1, 1))  # as a copy's
    assert again(scored) == ("stale", False, None)
    after = read_scores(scored.path)
    assert before and after and (after.made, after.scores) == (before.made, before.scores)


def test_edited_predictions_are_not_scored_as_the_adapters(scored: RunDir) -> None:
    file = scored.path / "predictions.jsonl"
    before = file.read_bytes()
    file.write_bytes(before.replace(b'"a b"', b'"a b c d"'))
    row = run_rows.row(RunResult(scored, scored.read()))
    assert (row["evaluation"], row["bleu4"]) == ("edited", None)
    with pytest.raises(UserError):
        again(scored)
    file.write_bytes(before)
    assert again(scored)[2] is None


def test_a_replaced_adapter_is_not_scored_as_the_runs(scored: RunDir) -> None:
    save_file({"other": torch.ones(1)}, scored.output / ADAPTER)
    row = run_rows.row(RunResult(scored, scored.read()))
    assert (row["evaluation"], row["bleu4"]) == ("stale", None)
    with pytest.raises(UserError):
        again(scored)
    named = evaluate.evaluate(scored, EvaluationRequest(adapter=str(scored.output), limit=2, judge="none"))
    assert named.settings.adapter_sha256 == sha256(scored.output / ADAPTER)


def test_rows_that_changed_since_the_run_are_not_evaluated_without_a_word(scored: RunDir) -> None:
    assert "notes" not in evaluation_of(scored).scores
    with (scored.path / "test.jsonl").open("ab") as stream:
        stream.write((scored.path / "test.jsonl").read_bytes().splitlines()[0])
    assert again(scored) == ("stale", False, None)
    assert len(evaluation_of(scored).scores["notes"]) == 1


def evaluation_of(run: RunDir) -> Evaluation:
    made = read_scores(run.path)
    assert made
    return made


def test_other_rows_are_evaluated_beside_the_usual_ones(run: RunDir, sample: Path, tmp_path: Path) -> None:
    usual = evaluated(run, limit=3)
    few = tmp_path / "few.jsonl"
    few.write_bytes(b"".join((sample / "valid.jsonl").read_bytes().splitlines(keepends=True)[:2]))
    other = evaluated(run, data=few)
    assert EvaluationTask(run, EvaluationRequest(adapter="none", data=few)).where.name.startswith("base-model-few-")
    assert (usual.scores["rows"], other.scores["rows"]) == (3, 2)
    assert evaluated(run, limit=3) == usual


def test_where_a_run_has_no_usual_rows_those_that_are_named_are_its_own(run: RunDir, sample: Path) -> None:
    record = run.read()
    record.test_data = None
    run.write(record)
    cfg = yamlfiles.read_yaml(run.config) | {"datasets": [{"path": "x/y", "type": "alpaca"}], "test_datasets": []}
    run.config.write_text(yamlfiles.write_yaml(cfg))
    with pytest.raises(UserError, match=r"test_datasets .*val_set_size.*test\.jsonl"):
        EvaluationTask(run, EvaluationRequest(adapter="none"))
    task = EvaluationTask(run, EvaluationRequest(adapter="none", data=sample / "valid.jsonl"))
    assert task.where == run.path / "evaluations" / "base-model"


def test_an_evaluation_of_rows_that_were_the_usual_ones_is_kept(run: RunDir, sample: Path) -> None:
    before = evaluated(run, limit=3)
    record = run.read()
    record.test_data = str(sample / "valid.jsonl")
    run.write(record)
    evaluated(run, limit=2)
    (kept,) = (run.path / "evaluations" / "base-model" / "evaluations").iterdir()
    assert read_scores(kept) == before
    assert len(read_predictions(kept)) == 3


@pytest.mark.parametrize(
    ("state", "then"),
    [("interrupted", "`recipe resume .*run`"), ("queued", "queued")],
)
def test_a_run_without_an_adapter_is_said_what_to_do_about(run: RunDir, state: State, then: str) -> None:
    run.write(run.read().model_copy(update={"state": state}))
    with pytest.raises(UserError, match=rf"adapter_model\.safetensors.*{then}"):
        EvaluationTask(run, EvaluationRequest())


def test_a_limit_that_leaves_nothing_out_is_none(run: RunDir) -> None:
    assert EvaluationTask(run, EvaluationRequest(adapter="none", limit=26)).settings.limit is None
    assert EvaluationTask(run, EvaluationRequest(adapter="none", limit=25)).settings.limit == 25


def test_a_judge_that_is_not_there_is_told_before_anything_is_generated(run: RunDir) -> None:
    with pytest.raises(WorkFailed, match="some/nowhere"):
        evaluate.evaluate(run, EvaluationRequest(adapter="none", judge="some/nowhere"))
    assert not list(run.path.rglob("predictions*"))


def test_scoring_anew_leaves_no_score_of_another_judge(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    from bert_score import utils as bert_score_utils

    request = EvaluationRequest(adapter="none", max_new_tokens=8, limit=3)
    request.judge = str(substitution.scorer_folder())
    monkeypatch.setitem(bert_score_utils.model2layers, substitution.scorer_folder().name, 6)
    assert evaluate.evaluate(run, request).scores["bertscore"]["model"] == "model"
    without = evaluated(run, limit=3)
    assert "bertscore" not in without.scores and "bertscore_f1" not in without.scores
    assert not any("bertscore_f1" in row for row in predictions(run))


def test_decoding_is_the_studys_and_not_the_models_own(run: RunDir, tiny: Path) -> None:
    from transformers import GenerationConfig

    GenerationConfig(do_sample=True, temperature=5.0, max_new_tokens=3, eos_token_id=[7, 8]).save_pretrained(tiny)
    try:
        cfg = yamlfiles.read_yaml(run.config)
        used = Reference(Prompter(settings_of(cfg), cfg, run.output)).decoding()
    finally:
        (tiny / "generation_config.json").unlink()
    assert (used.do_sample, used.temperature, used.max_new_tokens) == (False, None, 8)
    assert used.eos_token_id == [2, 7, 8]  # the tokenizer's, which the training taught, and the model's


def test_answers_end_at_each_token_that_training_taught_as_an_end(run: RunDir) -> None:
    cfg = yamlfiles.read_yaml(run.config) | {"eot_tokens": ["<s>"]}
    assert Prompter(settings_of(cfg), cfg, run.output).ends == {1, 2}


def test_the_model_is_configured_as_in_training(run: RunDir) -> None:
    def logits(cfg: yamlfiles.Config) -> torch.Tensor:
        run.config.write_text(yamlfiles.write_yaml(cfg))
        task = EvaluationTask(run, EvaluationRequest(adapter="none"))
        with torch.inference_mode():
            computed: torch.Tensor = base_model(Prompter(task.settings, task.cfg, run.output))(tokens).logits
        return computed

    cfg, tokens = yamlfiles.read_yaml(run.config), torch.arange(5, 205)[None]
    stretched = cfg | {"overrides_of_model_config": {"rope_parameters": {"rope_type": "linear", "factor": 4.0,
                                                                         "rope_theta": 10000.0}}}  # fmt: skip
    assert not torch.allclose(logits(stretched), logits(cfg), atol=1e-3)


def test_a_run_in_8_bits_is_evaluated_in_8_bits(run: RunDir) -> None:
    from bitsandbytes.nn import Linear8bitLt

    changes = {"adapter": "lora", "load_in_4bit": None, "bnb_config_kwargs": None, "load_in_8bit": True}
    run.config.write_text(yamlfiles.write_yaml(config.merge(yamlfiles.read_yaml(run.config), changes)))
    task = EvaluationTask(run, EvaluationRequest(adapter="none", judge="none"))
    model = Reference(Prompter(task.settings, task.cfg, run.output)).model
    assert sum(isinstance(layer, Linear8bitLt) for layer in model.modules()) == 14


def renamed(tensors: dict[str, Any]) -> dict[str, Any]:
    """As of a model whose attention is called otherwise."""
    return {name.replace("layers.1.self_attn", "layers.1.attention"): tensor for name, tensor in tensors.items()}


def without_one(tensors: dict[str, Any]) -> dict[str, Any]:
    """Without the last layer's values."""
    return {name: tensor for name, tensor in tensors.items() if "layers.1.self_attn.v_proj" not in name}


def zeroed(tensors: dict[str, Any]) -> dict[str, Any]:
    """As before the training."""
    return {name: tensor * ("lora_A" in name) for name, tensor in tensors.items()}


def test_an_adapter_that_does_not_apply_is_refused(
    reference: Callable[..., Reference], tiny: Path, tmp_path: Path
) -> None:
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny), lora).save_pretrained(tmp_path / "adapter")
    settings = {"adapter": str(tmp_path / "adapter"), "adapter_sha256": "x"}
    reference(**settings)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    trained = load_file(file)
    for damaged in (renamed, without_one, zeroed):
        save_file(damaged(trained), file)
        with pytest.raises(UserError):
            reference(**settings)


def test_sampled_predictions_depend_on_the_seed_and_not_on_the_batches_before(
    reference: Callable[..., Reference],
) -> None:
    sampling = reference(decoding=Decoding(max_new_tokens=8, do_sample=True, seed=1))
    first, second = (sampling.answers([[1, 50, 60]], number) for number in (0, 1))
    assert sampling.answers([[1, 50, 60]], 0) == first != second


def test_a_prompt_longer_than_the_trainings_rows_stays_whole(run: RunDir) -> None:
    cfg = yamlfiles.read_yaml(run.config) | {"sequence_len": 64}
    patch = "+".join(f"line {i}" for i in range(40))
    prompter = Prompter(settings_of(cfg), cfg, run.output)
    (example,) = prompter.examples([{"instruction": "Review.", "input": patch, "output": "Fine."}])
    assert len(example.prompt) > 64
    assert patch in prompter.tokenizer.decode(example.prompt)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", r"x\.jsonl: "),
        ('{"instruction": "a"}\n', r"x\.jsonl:1: .*output"),
        ("[\n", r"x\.jsonl:1: "),
    ],
)
def test_bad_test_data_is_told_before_a_model_is_loaded(run: RunDir, tmp_path: Path, content: str, says: str) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text(content)
    with pytest.raises(UserError, match=says):
        evaluated(run, data=file)
    assert not (run.path / "evaluations").exists()
