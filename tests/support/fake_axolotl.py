"""A fake command `axolotl`: it trains nothing, and leaves in milliseconds what a training leaves.

Files are written in the order in which Axolotl, transformers and this project's plugin write them, piece by piece, so
that a killed process leaves half of one. What it learns is a chain of hashes with a link for each step. Checkpoints
hold the link, as in a real one spread over the optimizer, the scheduler and the random state, and as in real life a
missing one is replaced by a new one in silence. So a resumed run ends with the adapter of an undisturbed one only if it
began at a valid checkpoint, with the step after it.

Environment variables:
    FAKE_STEP: seconds that a step takes.
    FAKE_HOLD: after how many steps of this launch to wait, within a step, for a signal
    FAKE_GO: or for this file.
    FAKE_NO_MEMORY: after how many steps of this launch to fail as where a GPU's memory does not suffice.
"""

import argparse
import hashlib
import math
import os
import random
import resource
import shutil
import signal
import sys
import time
import zipfile
from array import array
from io import BytesIO
from pathlib import Path
from typing import Any

import orjson
from filelock import FileLock

from qlora_recipes.base import yamlfiles
from qlora_recipes.base.files import append_line
from qlora_recipes.training import checkpoints

ADAPTER = "adapter_model.safetensors"
STATES = ("optimizer.pt", "scheduler.pt", "rng_state.pth")
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
STEP = float(os.environ.get("FAKE_STEP", "0.001"))
HOLD = int(os.environ.get("FAKE_HOLD", sys.maxsize))
NO_MEMORY = int(os.environ.get("FAKE_NO_MEMORY", sys.maxsize))
GO = Path(os.environ.get("FAKE_GO", os.devnull + "/none"))


def write(file: Path, content: bytes) -> None:
    with file.open("wb") as stream:
        quarter = math.ceil(len(content) / 4)
        for begin in range(0, len(content), quarter):
            stream.write(content[begin : begin + quarter])
            stream.flush()
            time.sleep(STEP / 8)


class Training:
    """One launch of a training; `link` is what was learnt."""

    def __init__(self, cfg: yamlfiles.Config):
        self.cfg, self.output = cfg, Path(str(cfg["output_dir"]))
        self.step, self.stop = 0, False
        content = orjson.dumps({key: cfg[key] for key in sorted(cfg.keys() - {"output_dir", "dataset_prepared_path"})})
        self.link = hashlib.sha256(content).hexdigest()
        rows = self._rows() // (cfg["micro_batch_size"] * cfg["gradient_accumulation_steps"])
        self.max_steps = cfg.get("max_steps") or rows * math.ceil(cfg["num_epochs"])

    def _rows(self) -> int:
        (data,) = self.cfg["datasets"]
        split = str(data.get("split", "train"))
        if "[:" in split:
            return int(split.partition("[:")[2].rstrip("]"))
        return len(Path(data["path"]).read_bytes().splitlines())

    def _due(self, what: str, per_epoch: str) -> bool:
        steps = self.cfg.get(what)
        if not steps and (times := self.cfg.get(per_epoch)):
            steps = math.ceil(self.max_steps / (times * self.cfg["num_epochs"]))
        if steps and steps < 1:  # a share of all steps
            steps = math.ceil(self.max_steps * steps)
        return bool(steps) and self.step % int(steps) == 0

    def run(self) -> None:
        """Train to the end, or until SIGTERM asks for it, and save the adapter."""
        signal.signal(signal.SIGTERM, self._asked)
        signal.signal(signal.SIGINT, self._interrupted)
        self.output.mkdir(parents=True, exist_ok=True)
        self._save_tokenizer()
        self._record(trainable_parameters=1000 * self.cfg["lora_r"])
        if not self.step and self.cfg.get("test_datasets"):
            self._evaluate()
        else:
            note_phase(self.cfg, "training")
        first = self.step
        while self.step < self.max_steps and not self.stop:
            started = time.perf_counter()
            time.sleep(STEP)
            if self.step - first >= HOLD:
                self._hold()
            if self.step - first >= NO_MEMORY:
                sys.exit("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.")
            self.step += 1
            self.link = hashlib.sha256(f"{self.link} {self.step}".encode()).hexdigest()
            tokens, seconds = 100, time.perf_counter() - started
            measured = {"step_seconds": seconds, "tokens": tokens, "tokens_per_second": tokens / seconds}
            self._record(loss=self._number(), grad_norm=1.0, learning_rate=1e-4, **measured)
            if self._due("eval_steps", "evals_per_epoch"):
                self._evaluate()
            if self.stop or self._due("save_steps", "saves_per_epoch"):
                note_phase(self.cfg, "saving a checkpoint")
                self._save()
                note_phase(self.cfg, "training")
        self._record(ended="complete" if self.step >= self.max_steps else "signal")
        note_phase(self.cfg, "saving the model")
        self.save_adapter(self.output)

    def _save_tokenizer(self) -> None:
        """Save the base model's, with the padding token that Axolotl falls back to."""
        model = Path(self.cfg["base_model"])
        write(self.output / "tokenizer.json", (model / "tokenizer.json").read_bytes())
        config = orjson.loads((model / "tokenizer_config.json").read_bytes())
        write(self.output / "tokenizer_config.json", orjson.dumps({"pad_token": config["eos_token"]} | config))

    def _asked(self, *_: Any) -> None:
        self.stop = True

    def _interrupted(self, *_: Any) -> None:
        """Do as Axolotl: save the adapter as it is, and end as if all were done."""
        self.save_adapter(self.output)
        sys.exit(0)

    def _hold(self) -> None:
        for _ in range(60_000):
            if self.stop or GO.exists():
                return
            time.sleep(0.01)
        sys.exit("held, and no signal came")

    def _number(self) -> float:
        return int(self.link[:8], 16) / 2**32

    def _record(self, **what: Any) -> None:
        usage = {"rss_peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, "cpu_percent": 1.0}
        epoch = self.cfg["num_epochs"] * self.step / self.max_steps
        when = {"time": time.time(), "step": self.step, "max_steps": self.max_steps, "epoch": epoch}
        append_line(self.output.parent / "metrics.jsonl", orjson.dumps(when | what | usage))

    def _evaluate(self) -> None:
        if self.cfg.get("test_datasets"):
            note_phase(self.cfg, "evaluating" if self.step else "first evaluation")
            keys = ("test_datasets", "train_on_inputs", "sequence_len")
            scored = hashlib.sha256(orjson.dumps([self.cfg.get(key) for key in keys])).hexdigest()
            self._record(
                eval_loss=1 + self._number(),
                eval_loss_per_token=1 + self._number(),
                eval_tokens={"count": 100, "sha256": scored},
            )
            note_phase(self.cfg, "training")

    def _save(self) -> None:
        folder = self.output / f"checkpoint-{self.step}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        self.save_adapter(folder)
        for name in STATES:
            stream = BytesIO()
            with zipfile.ZipFile(stream, "w") as archive:
                archive.writestr("link", self.link)
            write(folder / name, stream.getvalue())
        write(folder / "trainer_state.json", orjson.dumps({"global_step": self.step}))
        if limit := self.cfg.get("save_total_limit"):
            # by age, as transformers does: a damaged checkpoint of a later step has to go before what is saved now
            for old in sorted(self.output.glob("checkpoint-*"), key=lambda folder: folder.stat().st_mtime)[:-limit]:
                shutil.rmtree(old)
        checkpoints.write_manifest(folder)

    def resume(self, folder: Path) -> None:
        """Go on from a checkpoint; a file of it that cannot be read ends the process, one that is missing does not."""
        self.step = orjson.loads((folder / "trainer_state.json").read_bytes())["global_step"]
        files = [folder / name for name in STATES]
        links = [zipfile.ZipFile(file).read("link").decode() if file.is_file() else "new" for file in files]
        self.link = links[0] if len(set(links)) == 1 else hashlib.sha256(str(links).encode()).hexdigest()
        if len(set(links)) == 1 and (folder / ADAPTER).read_bytes() != self._adapter():
            raise ValueError(f"{folder / ADAPTER} is not what was learnt by then")

    def save_adapter(self, folder: Path) -> None:
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": self.cfg["base_model"],
            "r": self.cfg["lora_r"],
            "lora_alpha": self.cfg["lora_alpha"],
            "target_modules": self._targets(),
            "inference_mode": True,
        }
        write(folder / "adapter_config.json", orjson.dumps(config))
        write(folder / ADAPTER, self._adapter())

    def _targets(self) -> list[str]:
        return [*LINEAR] if self.cfg.get("lora_target_linear") else list(self.cfg["lora_target_modules"])

    def _adapter(self) -> bytes:
        """A safetensors file: the length of a header, the header, numbers."""
        of = orjson.loads(Path(self.cfg["base_model"], "config.json").read_bytes())
        hidden, rank = of["hidden_size"], self.cfg["lora_r"]
        keys = hidden * of["num_key_value_heads"] // of["num_attention_heads"]
        mlp = of["intermediate_size"]
        outputs = dict(zip(LINEAR, (hidden, keys, keys, hidden, mlp, mlp, hidden), strict=True))
        header, end = {}, 0
        for layer in range(of["num_hidden_layers"]):
            for name in self._targets():
                shapes = [rank, mlp if name == "down_proj" else hidden], [outputs[name], rank]
                room = "mlp" if name in LINEAR[4:] else "self_attn"
                for matrix, shape in zip("AB", shapes, strict=True):
                    begin, end = end, end + 4 * math.prod(shape)
                    full = f"base_model.model.model.layers.{layer}.{room}.{name}.lora_{matrix}.weight"
                    header[full] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
        chance = random.Random(self.link)
        numbers = array("f", (chance.gauss(0, 0.02) for _ in range(1009))).tobytes()
        text = orjson.dumps(header)
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text + (numbers * (end // len(numbers) + 1))[:end]


def note_phase(cfg: yamlfiles.Config, phase: str) -> None:
    record = orjson.dumps({"time": time.time(), "phase": phase})
    append_line(Path(str(cfg["output_dir"])).parent / "metrics.jsonl", record)


def prepare(cfg: yamlfiles.Config) -> None:
    """Prepare rows as datasets does; like Axolotl, take a folder that is there for whole."""
    folder = Path(str(cfg["dataset_prepared_path"]))
    folder.mkdir(parents=True, exist_ok=True)
    rows = folder / "fake"
    with FileLock(folder / "datasets_prep.lock"):
        if not rows.is_dir():
            rows.mkdir()
            write(rows / "data-00000-of-00001.arrow", b"rows" * 100)
            write(rows / "dataset_info.json", b"{}")
        if not (rows / "dataset_info.json").is_file():
            sys.exit(f"{rows} is half of what it should be")


def merge(base: Path, output: Path) -> None:
    """Write a merged model, and wait in its middle if there is a file to wait for."""
    (output / "debug.log").touch()
    (output / "merged").mkdir()
    if (base / "config.json").is_file():
        shutil.copy(base / "config.json", output / "merged")
    with (output / "merged" / "model.safetensors").open("wb") as stream:
        stream.write(b"half")
        stream.flush()
        while "FAKE_GO" in os.environ and not GO.exists():
            time.sleep(0.01)
        stream.write(b"other half")


def main() -> None:
    """Do as `axolotl preprocess CONFIG`, `axolotl train CONFIG [--resume-from-checkpoint FOLDER]`, or `axolotl
    merge-lora CONFIG --output-dir FOLDER`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("command", choices=("preprocess", "train", "merge-lora"))
    parser.add_argument("config", type=Path)
    parser.add_argument("--resume-from-checkpoint", type=Path)
    parser.add_argument("--output-dir", type=Path)
    words, _ = parser.parse_known_args()
    cfg = yamlfiles.read_yaml(words.config)
    if words.command == "merge-lora":
        merge(Path(str(cfg["base_model"])), words.output_dir)
        return
    note_phase(cfg, "reading and tokenizing rows")
    prepare(cfg)
    if words.command == "preprocess":
        return
    if cfg.get("lr_scheduler_kwargs"):
        raise TypeError("the scheduler got an unexpected keyword argument")
    note_phase(cfg, "loading the model")
    training = Training(cfg)
    if words.resume_from_checkpoint:
        training.resume(words.resume_from_checkpoint)
    print("Starting trainer...", flush=True)
    training.run()


if __name__ == "__main__":
    main()
