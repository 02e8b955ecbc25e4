"""Fixtures and helpers of all tests: a separate cache, no network, a tiny random Llama, and a fake Axolotl."""

import functools
import importlib.metadata
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import venv
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import orjson
import plain_environment  # noqa: F401 (first, because libraries read the environment when imported)
import pytest
from cluster import Cluster, running
from hypothesis import HealthCheck, settings
from jsonschema import Draft202012Validator

from qlora_recipes.base import yamlfiles

os.environ |= {"AXOLOTL_DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
os.environ["AXOLOTL_DATASET_NUM_PROC"] = "0"  # else it maps a few rows in processes that import torch
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # see terminal.prepare_environment
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:  # each worker gets its share of the processors
    os.environ["OMP_NUM_THREADS"] = str(max((os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]), 1))

from qlora_recipes import cli
from qlora_recipes.base import hub, paths, terminal
from qlora_recipes.base.files import read_json
from qlora_recipes.config import substitution
from qlora_recipes.config.gpus import CPU_RANKS
from qlora_recipes.config.merging import Override, parse_override
from qlora_recipes.data import studies
from qlora_recipes.data.prepare import default_sample, rehearsal_data
from qlora_recipes.run import launch
from qlora_recipes.run.backends import slurm_cluster
from qlora_recipes.run.rundir import RunDir
from qlora_recipes.training import validation

terminal.show_messages()  # for tests that call functions instead of commands
importlib.metadata.packages_distributions = functools.cache(importlib.metadata.packages_distributions)  # see base.hub
# A busy machine is slow at times; that is no fault of the code under test.
settings.register_profile("here", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("here")

SUPPORT = Path(__file__).parent / "support"
SHARED = SUPPORT.parents[2] / "shared" / "data"
SAMPLE = paths.RECIPES / "haider2024" / "sample"
"""Raw files of the first study's sample."""
RECIPE = Path(sys.executable).with_name("recipe")

SMALL = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 4096,
}
"""The architecture of a small Llama, for plans."""


@dataclass(frozen=True)
class Recipe:
    """Runs the command in an empty folder, in this process, because a new one imports for seconds."""

    run: Callable[..., "subprocess.CompletedProcess[str]"]

    def __call__(self, *words: str | Path) -> "subprocess.CompletedProcess[str]":
        return self.run(*words)

    def ok(self, *words: str | Path, code: int = 0) -> "subprocess.CompletedProcess[str]":
        done = self.run(*words)
        assert done.returncode == code, done.stderr
        return done

    def fails(self, *words: str | Path) -> "subprocess.CompletedProcess[str]":
        return self.ok(*words, code=2)

    def json(self, *words: str | Path, code: int = 0) -> Any:
        """JSON output of a command; checks that it agrees with the command's schema in docs/json/."""
        printed = orjson.loads(self.ok(*words, "--json", code=code).stdout)
        if "--columns" not in words:
            validator_of(" ".join(map(str, words))).validate(printed)
        return printed


@functools.cache
def validators() -> dict[str, Draft202012Validator]:
    """Validators of the schemas in docs/json/, by command."""
    files = (SUPPORT.parents[1] / "docs" / "json").glob("*.schema.json")
    return {file.name.split(".")[0].replace("-", " "): Draft202012Validator(read_json(file)) for file in files}


def validator_of(words: str) -> Draft202012Validator:
    """Validator of a command's output."""
    words = re.sub(r"^--runs \S+ ", "", words)
    return next(validator for command, validator in validators().items() if words.startswith(command))


LONGEST = (
    "deep_dive",
    *("verify", "memory", "parallelism", "own_study", "own_tasks", "eval_loss", "stages", "benchmarks", "sky_task"),
    *("slurm", "evaluation_rows", "sweep", "run", "report", "tokens", "work", "vllm", "bertscore", "authors_tokens"),
    *("predict", "reproduce", "plan", "plugin", "gguf_files", "model_facts", "published_log", "hf", "fake_step"),
    *("validation", "rewards"),
)


PROGRAMS = {
    "browser": ("chromium",),
    "compose": ("docker-compose",),
    "disk": ("mount", "umount"),
    "slurm": ("slurmctld", "slurmd", "sbatch", "munged"),
}
"""Programs that a fixture needs, and that `make setup` does not install."""


@pytest.fixture(scope="session")
def programs() -> Callable[[str], None]:
    """Skips a test if a program is missing that a fixture needs."""

    def require(fixture: str) -> None:
        missing = [program for program in PROGRAMS[fixture] if not shutil.which(program)]
        if missing:
            pytest.skip(f"not on this machine: {', '.join(missing)}; .ci/run installs it")

    return require


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what needs programs. Begin with the files that take minutes, so that no process has one at the end."""
    for item in items:
        if not PROGRAMS.keys().isdisjoint(getattr(item, "fixturenames", ())):
            item.add_marker("program")
    ranks = {f"test_{name}": rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path.stem, len(ranks)))


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Cache folder of the test session, and an empty home; xdist's processes share the cache, because converting the
    small model takes half a minute."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cache"
    folder.mkdir(exist_ok=True)
    os.environ |= {"XDG_CACHE_HOME": str(folder), "XDG_DATA_HOME": str(tmp_path_factory.mktemp("kept"))}
    os.environ["HOME"] = str(tmp_path_factory.mktemp("home"))
    return folder


ASK_CHILD = validation._ask_child


@pytest.fixture
def validates_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Axolotl's validation in this process, which imports Axolotl once, rather than in a process for each command."""

    def ask(configs: list[yamlfiles.Config], gpu: Any) -> list[list[dict[str, Any]]]:
        with hub.importing_axolotl():
            import axolotl.utils.config  # noqa: F401 (here, because torch's messages on import are silenced here only)

            return [[asdict(finding) for finding in validation.findings(config, gpu)] for config in configs]

    monkeypatch.setattr(validation, "_ask_child", ask)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, which is the working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], validates_here: None
) -> Recipe:
    def run(*arguments: str | Path) -> "subprocess.CompletedProcess[str]":
        words = [*map(str, arguments)]
        terminal.say_once.cache_clear()
        slurm_cluster.forget_queue()
        capsys.readouterr()
        with monkeypatch.context() as patch:
            patch.chdir(tmp_path)
            for variable in (paths.RUNS, terminal.QUIET):  # which the command sets
                patch.setenv(variable, "")
            code = cli.main(words)
        said = capsys.readouterr()
        return subprocess.CompletedProcess(words, code, said.out, said.err)

    return Recipe(run)


def path_of(plugins: str) -> dict[str, str]:
    """The environment of a process that can import the Axolotl plugins in a test's file."""
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(SUPPORT), str(SUPPORT.parent), str(Path(plugins).parent)])}


def train_runs(folder: Path, configs: dict[str, yamlfiles.Config], plugins: str = __file__) -> dict[str, RunDir]:
    """Train configs in run folders of their names, see `train_many`; their prepared rows are in `folder`."""
    runs = {name: RunDir(folder / name) for name in configs}
    for name, run in runs.items():
        run.path.mkdir()
        here = {"output_dir": str(run.output), "dataset_prepared_path": str(folder / "prepared")}
        run.config_file.write_text(yamlfiles.write_yaml(configs[name] | here))
    train_many(*(run.config_file for run in runs.values()), plugins=plugins)
    return runs


def train_many(*configs: Path, plugins: str = __file__, ranks: int = 1) -> None:
    """Train configs one after the other in one process, because importing Axolotl takes most of a tiny run.

    With several ranks, each rank is such a process; engines other than DDP take only one config.
    """
    command, environment = [sys.executable], path_of(plugins)
    if ranks > 1:
        command = [str(RECIPE.with_name("torchrun")), f"--nproc-per-node={ranks}", "--standalone"]
        environment |= {CPU_RANKS: "1"}
    command += [str(SUPPORT / "train_many.py"), *map(str, configs)]
    done = subprocess.run(command, cwd=SUPPORT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def start(place: Path, *arguments: str | Path, command: Path = RECIPE, **env: str) -> "subprocess.Popen[str]":
    """Start the command in a folder, with environment variables added."""
    words = [str(command), *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}

    def with_signals() -> None:  # which nohup and a shell's background have all these tests ignore
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    return subprocess.Popen(words, cwd=place, env=os.environ | env, text=True, preexec_fn=with_signals, **pipes)


def finish(process: "subprocess.Popen[str]", code: int = 0, seconds: float = 600) -> str:
    """Output of a started command, or its messages if it has no output."""
    out, err = process.communicate(timeout=seconds)
    assert process.returncode == code, err
    return out.strip() or err


def wait_until(holds: Callable[[], object], process: "subprocess.Popen[Any] | None" = None) -> None:
    """Wait until something holds, while a process goes on."""
    deadline = time.monotonic() + 300
    while not holds():
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture(scope="session")
def fake_axolotl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The command `recipe` in an environment with a fake Axolotl, which trains nothing, see fake_axolotl.py.

    The command starts the `axolotl` beside its Python. All packages are this environment's.
    """
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "all.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    # it writes no model that could be compared
    module = "sys.modules['qlora_recipes.evaluate.merge_check']"
    unchecked = f"{module} = types.SimpleNamespace(require_equal=lambda *_: None)"
    entry = f"import sys, types\nfrom qlora_recipes.cli import main\n{unchecked}\nsys.exit(main())\n"
    for name, source in (("axolotl", (SUPPORT / "fake_axolotl.py").read_text()), ("recipe", entry)):
        (folder / "bin" / name).write_text(f"#!{folder / 'bin' / 'python'}\n{source}")
        (folder / "bin" / name).chmod(0o755)
    return folder / "bin" / "recipe"


@pytest.fixture
def with_fake_axolotl(recipe: Recipe, fake_axolotl: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """Runs the command in this process, as `recipe` does, with the fake Axolotl."""
    monkeypatch.setattr(launch, "AXOLOTL", fake_axolotl.with_name("axolotl"))
    return recipe


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory, programs: Callable[[str], None]) -> Iterator[Cluster]:
    programs("slurm")
    with running(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def sample(cache: Path) -> Path:
    return default_sample()


@pytest.fixture
def runs(place: Path) -> Path:
    import small_study

    small_study.write(place)
    return Path("runs")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """A random Llama of two layers, with the small tokenizer of models with random weights."""
    import random_models

    folder = tmp_path_factory.mktemp("tiny-llama")
    random_models.save_tiny_llama(folder)
    return folder


@pytest.fixture(scope="session")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """A folder with a Llama's SentencePiece tokenizer, Mistral's, and the small model's config."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    package = find_spec("mistral_common")
    assert package and package.origin
    shutil.copy(Path(package.origin).with_name("data") / "tokenizer.model.v1", folder / "tokenizer.model")
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": False}  # as Llama 2's
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | tokens))
    config = json.loads((substitution.model_folder() / "config.json").read_text()) | {"vocab_size": 32000}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(params=["sentencepiece", "bpe"])
def model(request: pytest.FixtureRequest, sentencepiece: Path) -> Path:
    """A folder with a SentencePiece tokenizer, or one of BPE."""
    return sentencepiece if request.param == "sentencepiece" else substitution.model_folder()


@pytest.fixture(scope="session")
def tiny_profile(tmp_path_factory: pytest.TempPathFactory, tiny: Path, sample: Path) -> Path:
    """A profile that replaces a recipe's model and data by the tiny Llama and the sample."""
    file = tmp_path_factory.mktemp("profile") / "tiny.yaml"
    data = {"type": "alpaca"}
    fragment = {
        "base_model": str(tiny),
        "revision_of_model": None,
        "special_tokens": None,
        "datasets": [{"path": str(sample / "train.jsonl"), "split": "train[:64]"} | data],
        "test_datasets": [{"path": str(sample / "valid.jsonl"), "split": "train[:8]"} | data],
        "warmup_steps": 4,
        "fp16": False,
        "bf16": True,
    }
    # null deletes a key, so it has to be written
    file.write_text(yamlfiles.write_yaml(fragment), encoding="utf-8")
    return file


@pytest.fixture
def run(tmp_path: Path, tiny: Path, tiny_profile: Path, sample: Path) -> RunDir:
    """A finished run of the tiny Llama, with the files that an evaluation of its base model needs."""
    from run_folders import a_tiny_run

    return a_tiny_run(tmp_path, tiny, tiny_profile, sample)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """Folder `data` with the studies' samples, where recipes look for their rows.

    Training rows of all formats except `diff` are repeated with different answers, so that there are enough for warm-up
    and evaluations. Other files of the studies are empty.
    """
    folder = tmp_path_factory.mktemp("prepared")
    for study in studies.load_all():
        for file in study.data.files.keys() - study.data.raw_files:
            (folder / study.data.raw / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / study.data.raw / file).touch()
        for name, form in study.data.formats.items():
            rows = shutil.copytree(rehearsal_data(study, name), folder / form.folder)
            if name != "diff":
                times = {"tulu3": 1100, "loraga": 80}.get(study.data.key, 25)  # steps of 128 rows; 94 of warm-up
                repeat_rows(rows / "train.jsonl", times)
                if "train_pairs" in study.data.splits:
                    repeat_rows(rows / "train_pairs.jsonl", 50)
    return folder / "data"


def repeat_rows(file: Path, times: int) -> None:
    """Repeat the rows of a file, each time with a different number at the end of the answer.

    The answer is the last text, and also `output` if a row has the same texts as segments.
    """
    lines = file.read_text().splitlines()
    with file.open("w") as stream:
        for i in range(times):
            for line in lines:
                numbered = re.sub(r'("\}|"\}\]\})$', rf" ({i})\1", line)
                if '"segments"' in line:
                    numbered = re.sub(r'("output": ?"(?:[^"\\]|\\.)*)', rf"\1 ({i})", numbered, count=1)
                stream.write(numbered + "\n")


def config_with(change: yamlfiles.Config, name: str = "haider2024/code-llama-7b") -> yamlfiles.Config:
    """A built-in recipe with some keys changed; None deletes one."""
    return {key: value for key, value in (recipe_config(name) | change).items() if value is not None}


def typed(*texts: str) -> list[Override]:
    """Overrides as the command line parses them."""
    return [parse_override(text) for text in texts]


def recipe_config(name: str) -> yamlfiles.Config:
    return yamlfiles.read_yaml(paths.find_recipe(name)[1])
