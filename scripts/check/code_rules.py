"""Rules about what somebody else's config can do: run code, write files, send data, and pass on a file's text.

The user accepts an error by passing the finding's name to --force. The rules read the config as written, with values
that break the schema: Axolotl would convert some of them, such as `trust_remote_code: 1`.
"""

import re
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

from ..base.files import read_bytes
from ..base.secrets import without_secrets
from ..base.yamlfiles import Config
from ..config import consent, datafiles, models
from ..config.finding import Case, Finding, Problems, rule, rule_findings
from ..config.merging import flatten, last_key
from ..config.models import ModelFiles
from . import schema

READ_IT = "read the code; to run it, pass the name in brackets to --force"
SWITCHES = ("trust_remote_code", "allow_all_kernels", "use_kernels")
"""Keys at any depth that allow code from a repository. `use_kernels` also sets allow_all_kernels (loaders/model.py)."""
_PLUGINS = "context_parallel|cut_cross_entropy|densemixer|diffusion|expert_parallel|fla_sm120_shim|grokfast|liger"
_PLUGINS += "|mixlora|mora|spectrum|swanlab"  # nemo_gym clones a repository, lm_eval runs task files, kernels the hub's
# kernels-community belongs to the hub's maintainers, but anybody can propose a commit there, which has a hash
_ATTENTION = r"(paged\|)?\w+|kernels-community/[\w.-]+(@v\d{1,3})?(:\w+)?"
_CLASS = "[A-Z][A-Za-z0-9]*"  # of transformers; a dotted name would be imported
_PATTERNS = {
    "plugins": rf"axolotl\.integrations\.({_PLUGINS})[.:][\w.:]+|qlora_recipes\.plugin\.RunPlugin",
    "adapter_config.auto_mapping.base_model_class": _CLASS,
    "adapter_config.auto_mapping.parent_library": r"transformers\.models\.[\w.]+",
    "adapter_config.megatron_core": r"megatron\.core",
    "adapter_config.peft_type": "LORA|IA3",
    "attn_implementation": _ATTENTION,
    "cls_model_config": _CLASS,
    "processor_type": _CLASS,
    "tokenizer_type": _CLASS,
    "type_of_model": _CLASS,
    "torch_compile_backend": "inductor|eager|aot_eager|cudagraphs",
    "datasets.ds_type": "|".join(datafiles.FORMATS),
    "overrides_of_model_config.attn_implementation": _ATTENTION,
    "overrides_of_model_config._attn_implementation": _ATTENTION,
    "overrides_of_model_kwargs.attn_implementation": _ATTENTION,
    "overrides_of_model_kwargs.use_safetensors": "True",
}
"""Keys whose values are harmless if they match a pattern."""
_PLAIN = """
    adapter added_tokens_overrides.* batch_flattening bench_split bf16 chat_template chat_template_kwargs.*
    default_system_message device eot_tokens excess_length_strategy experts_implementation fix_untrained_tokens
    fp32_norm_classes image_resize_algorithm image_size large_head_attention model_quantization_config model_revision
    nf4_backend processor_kwargs.use_fast relora_prune_method revision_of_model ring_attn_func role_boundaries.*
    role_boundaries.end role_boundaries.role role_boundaries.start sample_packing_mp_start_method
    special_tokens.additional_special_tokens special_tokens.bos_token special_tokens.eos_token
    special_tokens.pad_token special_tokens.unk_token tf32 tokens

    accelerator_config.* activation_offloading dpo_loss_type dpo_loss_weights dynamic_checkpoint.check_interval
    dynamic_checkpoint.enabled eval_strategy evaluation_strategy flex_attn_compile_kwargs.dynamic
    flex_attn_compile_kwargs.mode gradient_checkpointing gradient_checkpointing_kwargs.* learning_rate
    lisa_layers_attribute lr_groups.lr lr_groups.modules lr_groups.name lr_scheduler lr_scheduler_kwargs.*
    metric_for_best_model optim_args optim_args.* optim_target_modules optimizer pose_split_on_token_ids
    qgalore_proj_type rl save_strategy selective_checkpointing selective_checkpointing.offload
    selective_checkpointing.recompute_layer_types selective_checkpointing.save
    selective_checkpointing.save_matmul_min_k selective_checkpointing.save_modules
    selective_checkpointing.save_sliding_window torch_compile torch_compile_mode torch_compile_options.*
    unfrozen_parameters

    bnb_config_kwargs.blocksize bnb_config_kwargs.bnb_4bit_compute_dtype bnb_config_kwargs.bnb_4bit_quant_storage
    bnb_config_kwargs.bnb_4bit_quant_type bnb_config_kwargs.bnb_4bit_use_double_quant
    bnb_config_kwargs.llm_int8_enable_fp32_cpu_offload bnb_config_kwargs.llm_int8_has_fp16_weight
    bnb_config_kwargs.llm_int8_skip_modules bnb_config_kwargs.llm_int8_threshold bnb_config_kwargs.load_in_4bit
    bnb_config_kwargs.load_in_8bit lora_alpha_pattern.* lora_modules_to_save lora_rank_pattern.* lora_target_modules
    lora_target_parameters merge_method mora.* peft.* peft_init_lora_weights peft_layer_replication
    peft_layers_pattern peft_layers_to_transform peft_trainable_token_indices* qat.* quantization.*

    context_parallel.* device_map device_map.* expert_parallel_backend fp8_config.* fsdp_config.*
    fsdp_config.fsdp_mixed_precision_policy fsdp_config.fsdp_transformer_layer_cls_to_wrap
    fsdp_config.mixed_precision_policy fsdp_config.transformer_layer_cls_to_wrap fsdp_final_state_dict_type
    gpu_memory_limit max_memory.* resources_per_worker.CPU resources_per_worker.GPU

    comet_api_key comet_experiment_config.* comet_experiment_key comet_mode comet_project_name
    cut_cross_entropy_c_grad_chunk_size diffusion.* diffusion.mask_token_str diffusion_lm.*
    diffusion_lm.mask_token_str gradio_title hub_revision hub_strategy liger_kernel_impl mlflow_experiment_name
    mlflow_run_name ray_run_name swanlab_api_key swanlab_description swanlab_experiment_name swanlab_lark_secret
    swanlab_mode swanlab_project trackio_project_name trackio_run_name wandb_log_model wandb_mode wandb_name
    wandb_project wandb_run_id wandb_watch

    datasets.chat_template datasets.conversation datasets.drop_system_message datasets.field datasets.field_chosen
    datasets.field_human datasets.field_messages datasets.field_model datasets.field_rejected datasets.field_thinking
    datasets.field_tools datasets.input_format datasets.logprobs_field datasets.message_field_content
    datasets.message_field_role datasets.message_field_training datasets.message_field_training_detail
    datasets.message_property_mappings.* datasets.max_completion_length datasets.name datasets.preprocess_shards
    datasets.revision datasets.roles.* datasets.roles_to_train datasets.shards* datasets.skip datasets.split
    datasets.split_thinking datasets.step_separator datasets.temperature datasets.template_thinking_key
    datasets.text_column datasets.train_on_* datasets.trust_remote_code datasets.weight datasets.type.chosen_format
    datasets.type.completion_format datasets.type.field_chosen datasets.type.field_completion
    datasets.type.field_input datasets.type.field_instruction datasets.type.field_label datasets.type.field_output
    datasets.type.field_prompt datasets.type.field_rejected datasets.type.field_system datasets.type.format
    datasets.type.no_input_format datasets.type.prompt_format datasets.type.rejected_format
    datasets.type.system_format datasets.type.system_prompt

    ebft.* trl.async_* trl.beta trl.chat_template_kwargs.* trl.entropy_* trl.epsilon* trl.generation_batch_size
    trl.generation_kwargs.max_tokens trl.generation_kwargs.temperature trl.generation_kwargs.top_k
    trl.generation_kwargs.top_p trl.importance_sampling_level trl.log_* trl.loss_type trl.mask_*
    trl.max_completion_length trl.min_p trl.multi_objective_aggregation trl.num_* trl.off_* trl.prefetch_* trl.ref_*
    trl.repetition_penalty trl.replay_* trl.reroll_* trl.reward_num_workers trl.reward_weights trl.scale_rewards
    trl.skip_* trl.streaming_* trl.sync_* trl.temperature trl.top_* trl.use_* trl.vllm_*
    trl.vllm_guided_decoding_regex

    overrides_of_model_config.attention_dropout overrides_of_model_config.bos_token_id
    overrides_of_model_config.eos_token_id overrides_of_model_config.max_position_embeddings
    overrides_of_model_config.num_* overrides_of_model_config.output_router_logits
    overrides_of_model_config.pad_token_id overrides_of_model_config.rope_*
    overrides_of_model_config.router_aux_loss_coef overrides_of_model_config.sliding_window
    overrides_of_model_config.tie_word_embeddings overrides_of_model_config.use_cache
    overrides_of_model_config.vocab_size rope_scaling rope_scaling.* overrides_of_model_kwargs.device_map
    overrides_of_model_kwargs.dtype overrides_of_model_kwargs.low_cpu_mem_usage overrides_of_model_kwargs.max_memory.*
    overrides_of_model_kwargs.torch_dtype overrides_of_model_kwargs.use_cache

    adapter_config.alora_invocation_tokens* adapter_config.alpha_pattern.* adapter_config.bias
    adapter_config.ensure_weight_tying adapter_config.eva_config.* adapter_config.exclude_modules
    adapter_config.fan_in_fan_out adapter_config.inference_mode adapter_config.init_lora_weights
    adapter_config.layer_replication* adapter_config.layers_* adapter_config.loftq_config.* adapter_config.lora_alpha
    adapter_config.lora_bias adapter_config.lora_dropout adapter_config.modules_to_save adapter_config.peft_version
    adapter_config.qalora_group_size adapter_config.r adapter_config.rank_pattern.* adapter_config.revision
    adapter_config.target_modules adapter_config.target_parameters adapter_config.task_type
    adapter_config.trainable_token_indices* adapter_config.use_*

    deepspeed.activation_checkpointing.* deepspeed.aio.* deepspeed.bf16.* deepspeed.bfloat16.*
    deepspeed.communication_data_type deepspeed.fp16.* deepspeed.gradient_* deepspeed.optimizer.*
    deepspeed.prescale_gradients deepspeed.scheduler.* deepspeed.steps_per_print deepspeed.train_*
    deepspeed.wall_clock_breakdown deepspeed.zero_*
"""
"""Keys whose values are only names, paths of data, and settings of installed code.

A * at the end stands for any characters."""
_NUMBERS = {"boolean", "integer", "number", "null"}
_ALIASES = {"model_config": "overrides_of_model_config", "model_kwargs": "overrides_of_model_kwargs"}
_ALIASES |= {"model_type": "type_of_model", "test_datasets": "datasets", "pretraining_dataset": "datasets"}


@rule
def foreign_code(case: Case) -> Problems:
    """A value that Axolotl hands to transformers, datasets, kernels, PEFT, DeepSpeed or torch, and that is on no list.

    Axolotl imports modules that a config names, and hands other keys on unread. A key is therefore harmless only if it
    is listed here, or takes only numbers and switches. A plugin or prompt strategy is imported even to validate a
    config or to tokenize rows. PEFT imports and unpickles what an adapter_config.json names.
    """
    written = _with_deepspeed(case.written)
    if isinstance(adapter := written.get("lora_model_dir"), str):
        written["adapter_config"] = ModelFiles.find(adapter, None, case.ask_hub).json("adapter_config.json")
    for key, value in leaves(written):
        if not _is_harmless(key, value):
            shown = without_secrets(value, key)
            yield "error", key, f"may run foreign code: {shown} is not on the list of what is harmless", READ_IT


def _with_deepspeed(config: Config) -> Config:
    """Config with the content of its DeepSpeed file."""
    deepspeed = config.get("deepspeed")
    if not isinstance(deepspeed, str):
        return dict(config)
    name = deepspeed if Path(deepspeed).is_file() else None  # a finding if not JSON: DeepSpeed reads more than JSON
    return config | {"deepspeed": ModelFiles([], lambda file: read_bytes(Path(file))).json(deepspeed) or name}


@rule
def without_consent(case: Case) -> Problems:
    """A path, host or account that the user did not set.

    Axolotl deletes the file of dynamic_checkpoint, and saves any text as chat template beside the adapter (seen). It
    copies trackers' hosts into the variables that their clients read, who send the user's token (seen with MLflow).
    """
    for key, value in leaves(_with_deepspeed(case.written)):
        entry = consent.required(key, value)
        if entry and not any(f"{key}.".startswith(f"{change.key}.") for change in case.changes):
            level = entry.get("level", "error")
            yield level, key, f"a training would {entry['does']} {value}", _REMEDIES[level]


_REMEDIES = {
    "error": "delete the key, or pass the name in brackets to --force",
    "note": "delete the key if this account is not yours",
}


def findings(case: Case) -> Iterator[Finding]:
    """Findings of the rules about code only."""
    return rule_findings(case, "code")


def leaves(content: Any) -> Iterator[tuple[str, Any]]:
    """Dotted keys and values, also of the items of lists."""
    for key, value in flatten(content):
        if isinstance(value, list):
            yield from ((f"{key}.{i}", item) for i, item in enumerate(value))
        else:
            yield key, value


def _is_harmless(key: str, value: Any) -> bool:
    """True if a config's value cannot name or allow code."""
    first, dot, rest = key.partition(".")
    first = _ALIASES.get(first, first)
    if last_key(key) in SWITCHES:
        return value in (None, False)
    keys = schema.load()["properties"]
    if first not in (*keys, "adapter_config"):
        return True  # Axolotl ignores other keys
    if value in (None, {}) and not key.startswith("plugins."):  # Axolotl also takes plugins from a mapping's keys
        return True
    if first == "adapter_config" and isinstance(value, int | float):
        return True  # forks of PEFT write switches of their own
    if key in keys and {kind.get("type") for kind in keys[key].get("anyOf", [keys[key]])} <= _NUMBERS:
        return True
    return bool(consent.entry_of(key)) or is_listed(f"{first}{dot}{rest}", value, _PLAIN, _patterns())


def is_listed(key: str, value: Any, plain: str, patterns: Mapping[str, str]) -> bool:
    """True if a key is on a list of plain keys, or its value matches its pattern; positions in lists do not matter."""
    name = re.sub(r"\.\d+(?=\.|$)", "", key)
    if name in patterns:
        return re.fullmatch(patterns[name], str(value)) is not None
    return any(fnmatchcase(name, entry) for entry in plain.split())


@cache
def _patterns() -> Mapping[str, str]:
    """`_PATTERNS`, with the types of data sets that are part of Axolotl."""
    types = []
    for name in ("SFTDataset", "DPODataset", "KTODataset"):
        types += schema.load()["$defs"][name]["properties"]["type"]["anyOf"][0]["enum"]
    one_word = r"\w+"  # a module of Axolotl, or an error of the schema
    return _PATTERNS | {"datasets.type": "|".join([one_word, *map(re.escape, types)])}


@rule
def pickled_weights(case: Case) -> Problems:
    """torch.load unpickles all weights but safetensors; a pickle can contain code.

    By default, recent versions of torch load only weights, but this restriction has had vulnerabilities."""
    for key, revision in (("base_model", models.revision(case.config)), ("lora_model_dir", None)):
        name = case[key]
        files = ModelFiles.find(name, revision, case.ask_hub).pickles() if isinstance(name, str) else []
        if files:
            problem = f"would load {files[0]}, which is not a safetensors file: loading it can run code"
            yield "error", key, problem, "use a safetensors copy; to load it, pass the name in brackets to --force"
