"""vLLM as an engine: with a fake server, and, where `make vllm` has installed it, with the real one."""

import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest
import random_models
from a_server import serving
from conftest import SUPPORT
from run_folders import a_tiny_run, configure

from qlora_recipes.base.errors import UserError, WorkFailed
from qlora_recipes.evaluate import evaluate, vllm
from qlora_recipes.evaluate.evaluate import EvaluationRequest, resolve
from qlora_recipes.evaluate.scores_file import SCORES, Evaluation, read_predictions
from qlora_recipes.evaluate.settings import EvaluationSettings
from qlora_recipes.run.rundir import RunDir

FAKE_VLLM = f"""#!{sys.executable}
import json, os, sys
from pathlib import Path
sys.path.insert(0, {str(SUPPORT)!r})
from a_server import AServer, completed
words = sys.argv[3:]
given = dict(zip(words, words[1:]))
environment = {{name: value for name, value in os.environ.items() if name.startswith(("VLLM", "OMP", "CUDA"))}}
Path(__file__).with_name("given.json").write_text(json.dumps([given, environment, os.getpid()]))
print("INFO this is vLLM", flush=True)
if Path(__file__).with_name("broken").exists():
    print("RuntimeError: no kernel for this processor", flush=True)
    sys.exit(3)
def reply(body):
    Path(__file__).with_name(f"{{len(body['prompt'])}}.tokens").touch()
    return completed("", token_ids=body["prompt"][: body["max_tokens"]])
server = AServer(reply, int(given["--port"]))
server.models = 200, {{"data": [{{"id": given["--served-model-name"]}}]}}
server.serve_forever(0.02)
"""


@pytest.fixture
def run(run: RunDir, tiny: Path) -> RunDir:
    an_adapter(tiny, run.output)
    return run


@pytest.fixture
def fake_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of an environment with a Python that serves as vLLM does, and knows nothing."""
    from qlora_recipes.evaluate import vllm

    folder = tmp_path / "vllm"
    (folder / "bin").mkdir(parents=True)
    (folder / ".requirements-vllm-cpu.lock").touch()
    (folder / "bin" / "python").write_text(FAKE_VLLM)
    (folder / "bin" / "python").chmod(0o755)
    monkeypatch.setattr(vllm, "ENVIRONMENT", folder)
    return folder


def an_adapter(model: Path, output: Path) -> None:
    """An adapter with random weights, as a training leaves it."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    lora = LoraConfig(r=12, lora_alpha=24, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(model), lora).save_pretrained(output)


def evaluated(run: RunDir, limit: int = 5, **more: Any) -> Evaluation:
    request = EvaluationRequest(max_new_tokens=8, metrics=["bertscore:none"], limit=limit, **more)
    return evaluate.evaluate_run(run, request)


def test_vllm_is_started_with_the_runs_model_and_ends_with_the_evaluation(run, fake_vllm):
    settings = evaluated(run, engine="vllm").settings
    assert settings.engine == "vllm"
    assert settings.agreement and settings.agreement.rows == 5  # but the fake server only repeats prompts
    words, environment, process = json.loads((fake_vllm / "bin" / "given.json").read_text())
    assert not psutil.pid_exists(process)
    expected = {"--host": "127.0.0.1", "--tokenizer": str(run.output), "--dtype": "float32"}
    expected |= {"--generation-config": "vllm"}
    assert words | expected == words
    assert words["--lora-modules"] == f"adapter={run.output}"
    assert (Path(words["--model"]) / "model.safetensors").is_file()
    assert int(words["--max-model-len"]) == 8 + max(int(file.stem) for file in (fake_vllm / "bin").glob("*.tokens"))
    assert len(environment["VLLM_API_KEY"]) == 32 and environment["VLLM_NO_USAGE_STATS"] == "1"
    assert environment["VLLM_API_KEY"] not in "".join(words)
    log = (run.path / "vllm.log").read_text()
    assert log.startswith("INFO this is vLLM")
    assert not list(run.path.rglob("*.part.*"))
    evaluated(run, engine="vllm", adapter="none")
    assert "--lora-modules" not in json.loads((fake_vllm / "bin" / "given.json").read_text())[0]


def test_on_a_gpu_the_adapter_is_served_as_lora(run, fake_vllm, monkeypatch):
    import torch

    from qlora_recipes.evaluate import vllm
    from qlora_recipes.evaluate.prompter import Prompter

    (fake_vllm / ".requirements-vllm-cpu.lock").rename(fake_vllm / ".requirements-vllm.lock")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (8 << 30, 16 << 30))
    plan = resolve(run, EvaluationRequest())
    words = vllm._command(Prompter(plan.settings, run.config, run.output), "m", 512, 8000)
    options = dict(pairwise(words))
    expected = {"--max-lora-rank": "16", "--lora-modules": f"adapter={run.output}", "--gpu-memory-utilization": "0.475"}
    assert options | expected == options and "--enable-lora" in words


def test_a_vllm_that_does_not_start_says_why(run, fake_vllm):
    (fake_vllm / "bin" / "broken").touch()
    with pytest.raises(WorkFailed, match=r"RuntimeError: no kernel .*\n.* 3; .*vllm\.log"):
        evaluated(run, engine="vllm")
    assert not (run.path / SCORES).exists()


@pytest.mark.parametrize("models", [{"data": [{"id": "other"}]}, []], ids=str)
def test_a_server_that_took_the_port_is_not_asked(run, fake_vllm, monkeypatch, models):
    with serving(lambda body: None) as server:
        server.models = 200, models
        monkeypatch.setattr(vllm, "_free_port", lambda: server.server_port)
        with pytest.raises(WorkFailed, match=r"(?s)Address already in use.*vLLM has ended with code 1"):
            evaluated(run, engine="vllm")
    assert server.requests == []


def test_the_served_weights_are_those_that_the_reference_computes_with(run):
    import torch
    from bitsandbytes.functional import dequantize_4bit
    from safetensors.torch import load_file

    from qlora_recipes.evaluate.prompter import Prompter
    from qlora_recipes.evaluate.transformers_engine import base_model, weights_folder

    plan = resolve(run, EvaluationRequest(adapter="none"))
    prompter = Prompter(plan.settings, run.config, run.output)
    folder = weights_folder(prompter)
    assert weights_folder(prompter) == folder
    served = load_file(folder / "model.safetensors")
    model = base_model(prompter, torch.float32, prompter.quantization)
    for name, weight in model.named_parameters():
        quantized = getattr(weight, "quant_state", None)
        expected = dequantize_4bit(weight.data, quantized) if quantized else weight
        assert torch.equal(served[name], expected), name
    assert sum(hasattr(weight, "quant_state") for weight in model.parameters()) == 14
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    half = plan.settings.model_copy(update={"dtype": "bfloat16"})
    assert weights_folder(Prompter(half, run.config, run.output)) != folder


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        pytest.param({"use_dora": True}, "whose adapter_config.json has use_dora", id="DoRA"),
        pytest.param({"lora_bias": True}, "whose adapter_config.json has lora_bias", id="LoRA with biases"),
        pytest.param({"peft_type": "IA3"}, "which is not a LoRA adapter", id="not LoRA"),
        pytest.param({"bias": "all"}, "which has biases", id="biases"),
        pytest.param({"init_lora_weights": "pissa"}, "which changes the base model's weights", id="base weights"),
        pytest.param({"r": 513}, "of rank 513", id="rank"),
    ],
)
def test_an_adapter_that_vllm_cannot_serve_is_refused_at_once(run, fake_vllm, change, reason):
    file = run.output / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError) as error:
        evaluated(run, engine="vllm")
    adapter = run.output.resolve()
    assert str(error.value) == f"--engine vllm: cannot serve {adapter}, {reason}; leave --engine out"
    assert not (fake_vllm / "bin" / "given.json").exists()


def test_an_environment_that_is_not_there_or_another_one_is_told(fake_vllm, monkeypatch):
    from qlora_recipes.evaluate import vllm

    settings = EvaluationSettings.model_construct(adapter_sha256=None)
    vllm.require(settings, on_gpu=False)
    with pytest.raises(UserError, match=r"`make vllm VLLM_LOCK=requirements-vllm\.lock`"):
        vllm.require(settings, on_gpu=True)
    (fake_vllm / ".requirements-vllm-cpu.lock").rename(fake_vllm / ".requirements-vllm.lock")
    vllm.require(settings, on_gpu=True)
    with pytest.raises(UserError, match=r"`make vllm VLLM_LOCK=requirements-vllm-cpu\.lock`"):
        vllm.require(settings, on_gpu=False)


@pytest.fixture
def servable(tmp_path: Path, tiny_profile: Path, sample: Path) -> RunDir:
    """A run, in fp32, of a random model with heads as wide as vLLM has them, whose next token is not a matter of
    rounding."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder, tokenizer = tmp_path / "model", random_models.tokenizer()
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.2, max_position_embeddings=2048, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    run = a_tiny_run(tmp_path, folder, tiny_profile, sample)
    configure(run, base_model=str(folder))
    an_adapter(folder, run.output)
    return run


@pytest.mark.long
def test_vllm_answers_as_the_reference(servable, monkeypatch):
    from qlora_recipes.evaluate import vllm

    if not vllm.ENVIRONMENT.is_dir():
        pytest.skip("`make vllm` installs what this needs")
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)  # whose kernel rounds to bf16
    settings = evaluated(servable, 24, engine="vllm").settings
    assert settings.agreement and settings.agreement.equal >= 21
    assert len({row["prediction"] for row in read_predictions(servable.path)}) > 12
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(servable.path) in " ".join(p.info["cmdline"] or ())]
