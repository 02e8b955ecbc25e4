"""Claims of the rules about Axolotl and its stack, checked with the installed packages."""

from typing import Any

import pytest
from conftest import config_with

from qlora_recipes.base import hub, paths
from qlora_recipes.check import check, data_rules, settings_rules
from qlora_recipes.config import gpus, numerics
from qlora_recipes.config.compose import Request
from qlora_recipes.training import validation

V100 = gpus.find_gpu("V100")


# what no rule here repeats, as Axolotl's own validation refuses it before anything is queued
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"load_in_4bit": False}, "load_in_4bit"),
    ({"num_epochs": "two"}, "number"),
    ({"learning_rate": "2e-4x"}, "'2e-4x'"),
    ({"datasets": []}, "1 item"),
    ({"warmup_steps": 1, "warmup_ratio": 0.1}, "warmup_ratio"),
    ({"val_set_size": 0.1}, "test_datasets"),
    ({"eval_strategy": "epoch"}, "evals_per_epoch"),
    ({"chunked_cross_entropy": True, "cut_cross_entropy": True}, "cut_cross_entropy"),
    ({"plugins": ["nowhere.Plugin"]}, "nowhere"),
]


@pytest.mark.parametrize(("change", "says"), REFUSED, ids=str)
def test_what_axolotl_refuses_is_an_error(change, says):
    findings = validation.findings(config_with(change), gpus.find_gpu("A100"))
    assert any(finding.level == "error" and says in finding.problem for finding in findings)


def test_what_axolotl_warns_of_is_a_warning():
    for change in ({"dataset_processes": 4}, {"sample_packing": True, "attn_implementation": "fp8"}):
        assert "warning" in {finding.level for finding in validation.findings(config_with(change), V100)}


def test_attention():
    from axolotl.utils.schemas.enums import ATTN_IMPLS_SUPPORTING_PACKING, LEGACY_ATTN_FLAG_TO_IMPL

    assert ATTN_IMPLS_SUPPORTING_PACKING | {"sdpa", "eager"} == data_rules.KEEP_DOCUMENTS_APART
    assert LEGACY_ATTN_FLAG_TO_IMPL == numerics.OLD_ATTENTION_KEYS


def test_schedulers_that_need_options():
    import torch
    from transformers import SchedulerType, get_scheduler

    def works(kind: SchedulerType, **options: Any) -> bool:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        try:
            get_scheduler(kind, optimizer, num_warmup_steps=1, num_training_steps=9, scheduler_specific_kwargs=options)
        except (TypeError, ValueError):
            return False
        return True

    assert {kind.value for kind in SchedulerType if not works(kind)} == settings_rules._SCHEDULER_NEEDS.keys()
    for kind, options in settings_rules._SCHEDULER_NEEDS.items():
        assert all(works(SchedulerType(kind), **{option: 1}) for option in options)


def test_one_evaluation_in_all_is_dropped(tiny):
    from qlora_recipes.training.tokens import Tokenizer

    change = {"base_model": str(tiny), "revision_of_model": None, "special_tokens": None, "num_epochs": 1}
    once = Tokenizer(config_with(change | {"evals_per_epoch": 1})).cfg
    assert once.eval_steps is None
    assert once.eval_strategy is None
    assert Tokenizer(config_with(change | {"evals_per_epoch": 2})).cfg.eval_steps == 0.5


@pytest.mark.long
def test_all_recipes_and_profiles_over_them_pass_with_axolotl_asked(validates_here, place, monkeypatch, prepared):
    monkeypatch.setenv("HF_TOKEN", "for the test")
    monkeypatch.setattr(hub, "is_offline", lambda: False)
    (place / "data").symlink_to(prepared)
    profiles = [[], *([file.stem] for file in paths.PROFILES.glob("*.yaml") if file.stem != "mirror")]
    reports: dict[str, list[check.Report]] = {}
    for name in paths.recipe_names():
        cards = ["H100"] if config_with({}, name)["bf16"] else ["H100", "T4"]  # a T4 has no bf16
        for profile in profiles:
            if config_with({}, name).get("rl") and profile in (["packed"], ["fsdp2"]):
                continue  # Axolotl refuses both beside DPO
            for gpu in cards:
                data = gpu == "H100" and profile == []
                request = Request(name, profiles=profile)
                report = check.check_request(request, gpus.find_gpu(gpu), data=data)
                if data:
                    check.tokenize_all(report, request)
                reports.setdefault(gpu, []).append(report)
    for gpu, checked in reports.items():
        check.add_validation(checked, gpus.find_gpu(gpu))
        for report in checked:
            problems = [finding for finding in report.findings if finding.level != "note"]
            # never-saved: the rows here are a sample of few
            assert [str(finding) for finding in problems if finding.rule != "never-saved"] == []


def test_peft_splits_weights_anew_as_the_rule_changed_base_says(tiny, tmp_path):
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import LlamaForCausalLM

    tokens = torch.arange(5, 40)[None]
    difference = {}
    for start in ("pissa_niter_16", "pissa"):
        lora = LoraConfig(r=8, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights=start)
        trained = get_peft_model(LlamaForCausalLM.from_pretrained(tiny, dtype=torch.float32), lora)
        trained.save_pretrained(tmp_path / start)
        base = LlamaForCausalLM.from_pretrained(tiny, dtype=torch.float32)
        again = PeftModel.from_pretrained(base, tmp_path / start)
        difference[start] = (trained(tokens).logits - again(tokens).logits).abs().max().item()
    assert difference["pissa_niter_16"] > 0.01 and difference["pissa"] < 1e-4
