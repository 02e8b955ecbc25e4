"""Drivers, torch's builds and cards, as their own programs and files describe them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from broken import FACTS, H100, T4, on_bus, program

from qlora_recipes.configs.gpus import Gpu
from qlora_recipes.doctor import gpu
from qlora_recipes.doctor.gpu import Driver
from qlora_recipes.doctor.line import Line

TORCH = FACTS["torch"]
BNB = FACTS["bitsandbytes"] | {"for_cuda": True, "device": "cuda"}


@pytest.fixture(autouse=True)
def no_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu, "_by_library", lambda: ([], "NVMLError_LibraryNotFound"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))


def test_the_driver_of_a_container_without_its_library_is_the_kernels(tmp_path: Path) -> None:
    on_bus(tmp_path)
    kernel = tmp_path / "proc" / "driver" / "nvidia"
    kernel.mkdir(parents=True)
    for text, version in {
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.14  Thu Feb 22 01:44:30 UTC 2024": "550.54.14",
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build": "580.65.06",
    }.items():
        (kernel / "version").write_text(f"{text}\nGCC version: 12.3.0\n")
        found = gpu.driver(tmp_path)
        assert (found.version, found.cards, found.on_bus) == (version, [], 1)
    line = gpu.driver_line(found, TORCH, "Docker")
    assert line.state == "wrong" and "no GPU is to be seen" in line.found and "--gpus all" in line.remedy
    alone = gpu.driver_line(found, TORCH)  # its library is missing: no restart brings it
    assert (alone.state, alone.command) == ("wrong", "") and "install the whole driver" in alone.remedy
    in_a_job = gpu.driver_line(found, TORCH, job=True)
    assert (in_a_job.state, in_a_job.remedy) == ("note", "ask for a GPU: --gres=gpu:1")


def test_a_job_of_slurms_without_a_gpu_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("JOB_ID", "JOB_GPUS", "STEP_GPUS", "GPUS_ON_NODE"):
        monkeypatch.delenv(f"SLURM_{name}", raising=False)
    assert not gpu.given_no_gpu()
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert gpu.given_no_gpu()
    monkeypatch.setenv("SLURM_JOB_GPUS", "3")
    assert not gpu.given_no_gpu()


def test_nvidia_smi_names_the_cards_or_says_why_not(tmp_path: Path) -> None:
    smi = tmp_path / "bin" / "nvidia-smi"
    program(smi, "echo 580.65.06, Tesla T4, 15360, 7.5; echo 580.65.06, Tesla T4, 15360, 7.5")
    found = gpu.driver(tmp_path)
    assert found.cards == [T4, T4] and found.number == 580
    assert gpu.driver_line(found, TORCH) == Line("driver", "ok", "580.65.06; CUDA 13.0 needs 580 or newer")
    program(smi, "echo Failed to initialize NVML: Driver/library version mismatch; exit 18")
    found = gpu.driver(tmp_path)
    assert (found.cards, found.problem) == ([], "Failed to initialize NVML: Driver/library version mismatch")
    assert gpu.driver_line(replace(found, version="580.65.06"), TORCH).command == "sudo reboot"
    program(smi, "echo 470.1, Tesla T4, [N/A], [N/A]")
    assert gpu.driver(tmp_path).cards == []


@pytest.mark.parametrize(
    ("driver", "cuda", "state", "command"),
    [
        ("580.65.06", "13.0", "ok", ""),
        ("575.57.08", "13.0", "wrong", "CUDA=12.6"),
        ("525.60.13", "13.0", "wrong", "CUDA=12.6"),
        ("470.256.02", "13.0", "wrong", ""),  # CUDA 12 takes a newer one too
        ("550.54.14", "12.6", "ok", ""),
        ("470.256.02", "12.6", "wrong", ""),
        ("550.54.14", None, "ok", ""),  # torch's line is about that
    ],
)
def test_a_driver_is_judged_by_the_cuda_that_torch_is_built_for(
    driver: str, cuda: str | None, state: str, command: str
) -> None:
    line = gpu.driver_line(Driver(driver, [T4]), TORCH | {"cuda": cuda})
    assert line.state == state and command in line.command and bool(line.command) == bool(command)


def test_the_older_build_of_torch_is_offered_only_where_it_runs_on_the_card() -> None:
    blackwell = T4 | {"name": "NVIDIA GeForce RTX 5090", "compute_capability": "12.0"}
    line = gpu.driver_line(Driver("575.57.08", [blackwell]), TORCH)
    assert (line.state, line.command) == ("wrong", "") and "newer driver" in line.remedy
    built = ["sm_50", "sm_75", "sm_90"]
    of_126 = TORCH | {"cuda": "12.6", "arch": built}
    line = gpu.torch_line(Driver("575.57.08", [blackwell]), of_126, None)
    assert "not for NVIDIA GeForce RTX 5090 (sm_120)" in line.found and "CUDA=12.6" not in line.command
    assert "build for CUDA 13, which needs a driver of 580" in line.remedy and line.command.endswith("make setup")
    kepler, volta = T4 | {"compute_capability": "3.5"}, T4 | {"compute_capability": "7.0"}
    assert gpu.torch_line(Driver("580.65.06", [volta]), TORCH, None).command.endswith("make setup CUDA=12.6")
    for cards, facts in (([kepler], TORCH), ([kepler], of_126), ([volta, blackwell], TORCH)):
        assert gpu.torch_line(Driver("580.65.06", cards), facts, None).command == ""


def test_a_gpu_of_another_maker_wants_no_driver_of_nvidias(tmp_path: Path) -> None:
    on_bus(tmp_path, "0x1002")
    assert gpu.driver_line(gpu.driver(tmp_path), TORCH).state == "note"


@pytest.mark.parametrize(
    ("capability", "built", "runs"),
    [
        ((7, 5), ["sm_75", "sm_80"], True),
        ((7, 0), ["sm_75", "sm_80"], False),
        ((8, 9), ["sm_75", "sm_80", "sm_86"], True),
        ((8, 0), ["sm_86"], False),
        ((9, 0), ["sm_80"], False),
        ((9, 0), ["sm_80", "sm_90a"], True),
        ((12, 1), ["sm_90", "sm_120"], True),
        ((12, 0), ["sm_90", "compute_90"], True),
        ((12, 0), [], True),
    ],
)
def test_torchs_code_runs_on_its_own_generation(capability: tuple[int, int], built: list[str], runs: bool) -> None:
    assert gpu._is_built_for(Gpu("", capability), built) == runs


@pytest.mark.parametrize(
    ("facts", "card", "hidden", "state", "found"),
    [
        ({"error": "ImportError: libcudart.so.13"}, T4, None, "wrong", "cannot be imported: ImportError: libcudart"),
        (TORCH | {"cuda": None}, T4, None, "wrong", "without CUDA: it cannot use the GPU"),
        (TORCH | {"gpus": 1}, T4, None, "ok", "sees 1 GPU"),
        (TORCH, T4, "", "note", "CUDA_VISIBLE_DEVICES= hides"),
        (TORCH, T4, "-1", "note", "CUDA_VISIBLE_DEVICES=-1 hides"),
        (TORCH | {"says": "RuntimeError: No CUDA GPUs are available"}, T4, "7", "note", "CUDA_VISIBLE_DEVICES=7 hides"),
        (TORCH | {"says": "Error 802: system not yet initialized"}, T4, "0", "wrong", "sees no GPU: Error 802: system"),
        (TORCH | {"says": "RuntimeError: unknown"}, T4, None, "wrong", "sees no GPU: RuntimeError: unknown"),
        (
            TORCH | {"gpus": 1},
            T4 | {"compute_capability": "7.0"},
            None,
            "wrong",
            "not for Tesla T4 (sm_70)",
        ),
    ],
)
def test_torch_is_judged_by_the_cards_that_are_there(
    facts: dict[str, Any], card: dict[str, Any], hidden: str | None, state: str, found: str
) -> None:
    line = gpu.torch_line(Driver("580.65.06", [card]), facts, hidden)
    assert line.state == state and found in line.found
    assert state == "ok" or line.remedy


def test_cards_of_a_kind_are_one_line_with_what_they_lack() -> None:
    two, one = gpu.cards_lines(Driver("580.65.06", [T4, T4, H100]))
    assert two.state == "note" and two.found.startswith(
        "2 x Tesla T4, 15 GiB, sm_75; emulates bf16, slowly; has no tf32"
    )
    assert "bf16: set fp16: true and bf16: false" in two.remedy and "attn_implementation: set sdpa" in two.remedy
    assert one == Line("GPU", "ok", "NVIDIA H100 80GB HBM3, 79.6 GiB, sm_90; has bf16, tf32 and FlashAttention 2")


@pytest.mark.parametrize(
    ("facts", "asked_for", "state", "found", "command"),
    [
        (BNB, None, "ok", "its library for CUDA; computes as it should (NF4 off by 0", ""),
        (BNB | {"for_cuda": False}, None, "wrong", "for CPUs, but torch sees a GPU", "rm -r"),
        (BNB | {"nf4_off": 0.3}, None, "wrong", "computes something else than NF4: NF4 off by 0.3", "rm -r"),
        (BNB | {"product_off_1": float("inf")}, None, "wrong", "products by inf", "rm -r"),
        ({"error": "OSError: no"}, None, "wrong", "cannot be used: OSError: no", "rm -r"),
        ({"version": "1", "no_library": "No binary"}, "999", "wrong", "BNB_CUDA_VERSION=999: No binary", "unset BNB"),
    ],
)
def test_bitsandbytes_is_judged_by_what_it_computes(
    facts: dict[str, Any], asked_for: str | None, state: str, found: str, command: str
) -> None:
    line = gpu.bitsandbytes_line(Driver("580.65.06", [T4]), facts, asked_for)
    assert line.state == state and found in line.found and command in line.command
