"""Names of the files of a run."""

from enum import StrEnum

MADE_FROM = "adapter.sha256"
"""File beside weights made from an adapter; it begins with the adapter's hash."""


class RunFile(StrEnum):
    """Names in the folder of a run or of one of its evaluations; docs/files.md describes them.

    {} stands for the part that differs: a node, step, command, hash or number of training steps.
    """

    RECORD = "run.json"
    CONFIG = "config.yaml"
    METRICS = "metrics.jsonl"
    LOG = "train.log"
    NODE_LOG = "node-{}.log"
    JOBS = "jobs.json"  # separate, because a job can write run.json before its id is recorded
    JOB_LOG = "slurm-{}.log"
    COMMAND_LOG = "{}.log"
    OUTPUT = "output"
    ADAPTER = "adapter_model.safetensors"
    ADAPTER_CONFIG = "adapter_config.json"
    CHECKPOINT = "checkpoint-{}"
    MANIFEST = "manifest.json"
    MERGED = "merged"
    GGUF = "gguf"
    PREDICTIONS = "predictions.jsonl"
    PART = "predictions.{}.part.jsonl"
    SCORES = "scores.json"
    ROWS = "evaluation-rows.jsonl"
    SERVER_LOG = "vllm.log"
    EVALUATIONS = "evaluations"
    TENSORBOARD = "tensorboard"
    WANDB = "wandb"
    LOCK = ".lock"
    JOBS_LOCK = ".jobs.lock"
    EVALUATION_LOCK = ".evaluation.lock"
