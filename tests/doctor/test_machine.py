"""Memory with its limits, caches, SLURM and containers."""

from pathlib import Path

import pytest
from broken import program
from huggingface_hub import constants

from qlora_recipes.base import paths
from qlora_recipes.doctor import machine
from qlora_recipes.doctor.machine import Folder


def test_a_folder_that_is_not_there_yet_is_judged_by_its_parent_and_not_made(tmp_path: Path) -> None:
    line = machine.folder_line(Folder("runs", tmp_path / "a" / "b", 0, "elsewhere"))
    assert line.state == "ok" and str(tmp_path) in line.found and list(tmp_path.iterdir()) == []


def test_a_link_to_nothing_and_a_file_are_no_folders(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "drive" / "runs")
    (tmp_path / "file").touch()
    for name, found in {"link": "link is a link to what is not there", "file": "file is no folder"}.items():
        for path in (tmp_path / name, tmp_path / name / "below"):
            line = machine.folder_line(Folder("runs", path, 0, "work elsewhere", "cd elsewhere"))
            assert line.state == "wrong" and line.found.endswith(found) and "or work elsewhere" in line.remedy
    (tmp_path / "drive" / "runs").mkdir(parents=True)
    assert machine.folder_line(Folder("runs", tmp_path / "link", 0, "elsewhere")).state == "ok"


def test_another_cache_takes_no_token_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / ".cache" / "huggingface"))
    monkeypatch.setattr(machine, "folder_line", lambda folder: folder)
    monkeypatch.delenv("HF_HOME", raising=False)
    commands = {folder.name: folder.command for folder in machine.folder_lines()}
    assert commands["hub's cache"] == "export HF_HUB_CACHE=/path/with/room"
    assert commands["cache"] == 'export XDG_CACHE_HOME=/path/with/room HF_HOME="$HOME"/.cache/huggingface'
    monkeypatch.setenv("HF_HOME", "/elsewhere")
    assert machine.folder_lines()[1].command == "export XDG_CACHE_HOME=/path/with/room"


def test_a_folder_that_is_nearly_full_is_wrong_and_one_without_room_for_a_model_a_note(tmp_path: Path) -> None:
    line = machine.folder_line(Folder("hub's cache", tmp_path, 1e9, "elsewhere", "export HF_HOME=x"))
    assert (line.state, line.command) == ("wrong", "export HF_HOME=x") and "less than the 1e+09 GB" in line.found
    assert machine.folder_line(Folder("hub's cache", tmp_path, 0, "elsewhere", wants=(1e9, "few"))).state == "note"


@pytest.mark.parametrize(("limit", "state"), [("max", "ok"), (str(2 << 30), "wrong")])
def test_the_limit_of_a_container_on_memory_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, state: str
) -> None:
    monkeypatch.setattr(machine, "REHEARSAL", 2.5 if state == "wrong" else 0.0)
    group = tmp_path / "sys" / "fs" / "cgroup"
    group.mkdir(parents=True)
    (group / "memory.max").write_text(f"{limit}\n")
    line = machine.memory(tmp_path)
    assert line.state == state and ("limited to 2.0 GiB" in line.found) == (state == "wrong")


JOB = "system.slice/slurmstepd.scope/job_7/step_0"


@pytest.mark.parametrize(
    ("groups", "group", "limit", "used", "stat"),
    [
        (f"0::/{JOB}/user", JOB, "memory.max", "memory.current", "inactive_file {0}\nactive_file 0\n"),
        (
            f"0::/\n4:cpu,memory:/{JOB}/user",
            f"memory/{JOB}",
            "memory.limit_in_bytes",
            "memory.usage_in_bytes",
            "inactive_file 1\ntotal_active_file {0}\n",
        ),
    ],
)
def test_of_the_memory_of_a_job_what_is_used_is_not_free_and_cached_files_are(
    groups: str, group: str, limit: str, used: str, stat: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "REHEARSAL", 1.6)
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "self" / "cgroup").write_text(f"{groups}\n")
    folder = tmp_path / "sys" / "fs" / "cgroup" / group
    folder.mkdir(parents=True)
    (folder / limit).write_text(f"{2 << 30}\n")
    (folder / used).write_text(f"{1 << 30}\n")
    line = machine.memory(tmp_path)
    assert line.state == "wrong" and "limited to 2.0 GiB here, 1.0 of these free" in line.found
    (folder / "memory.stat").write_text(stat.format(7 << 27))
    line = machine.memory(tmp_path)
    assert line.state == "ok" and "limited to 2.0 GiB here, 1.9 of these free" in line.found


def test_caches_have_their_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (paths.cache() / "model").mkdir(parents=True)
    (paths.cache() / "model" / "weights").write_bytes(bytes(30_000_000))
    (paths.cache() / "link").symlink_to(tmp_path)
    assert f"this project's 0.03 GB ({paths.cache()})" in machine.caches().found


def test_slurm_is_asked_and_its_settings_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert machine.slurm().found.startswith("none on this machine")
    program(tmp_path / "sbatch", "exit 1")
    program(tmp_path / "sinfo", "echo first try >&2; echo 'sinfo: error: no controller' >&2; exit 1")
    line = machine.slurm()
    assert line.state == "note" and line.found == "is installed, and does not answer: no controller"
    program(tmp_path / "sinfo", "echo gpu; echo gpu; echo cpu")
    assert "partitions: gpu, cpu; " in machine.slurm().found
    (tmp_path / "qlora-recipes").mkdir()
    (tmp_path / "qlora-recipes" / "slurm.yaml").write_text("nodes: 3\n")
    line = machine.slurm()
    assert line.state == "wrong" and line.found.startswith("answers; its settings are wrong: ")
    assert "nodes cannot be set" in line.found
    monkeypatch.setattr(machine, "PATIENCE", 0.2)
    program(tmp_path / "sinfo", "exec /bin/sleep 2")
    assert "no answer within 0.2 s" in machine.slurm().found


def test_docker_passes_a_gpu_on_with_nvidias_toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(machine, "container", lambda: None)
    program(tmp_path / "docker", "")
    assert machine.containers(0).state == "ok" and machine.containers(1).state == "note"
    assert "install-guide" in machine.containers(1).remedy and "nvidia-ctk runtime" in machine.containers(1).command
    program(tmp_path / "nvidia-ctk", "")
    assert machine.containers(1).state == "ok"


def test_a_container_is_known_by_its_marks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("APPTAINER_CONTAINER", "SINGULARITY_CONTAINER", "KUBERNETES_SERVICE_HOST"):
        monkeypatch.delenv(name, raising=False)
    assert machine.container(tmp_path) is None
    (tmp_path / ".dockerenv").touch()
    assert machine.container(tmp_path) == "Docker"
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    assert machine.container(tmp_path) == "Kubernetes"
    monkeypatch.setenv("APPTAINER_CONTAINER", "image.sif")
    assert machine.container(tmp_path) == "Apptainer"
    assert machine.containers(0).found == "inside an Apptainer container"
