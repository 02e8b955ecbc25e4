"""A real SLURM on this machine: a controller and two nodes, each with a fake GPU."""

import os
import platform
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

CONFIG = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
AuthInfo=cred_expire=5
KillWait=10
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=0
GresTypes=gpu
NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{second}] CPUs={cores} Gres=gpu:1
PartitionName=main Nodes=ALL Default=YES State=UP
"""


class Cluster:
    def ask(self, *command: str) -> str:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    def wait_until_empty(self, seconds: float = 400) -> None:
        deadline = time.monotonic() + seconds
        while jobs := self.ask("squeue", "--noheader"):
            assert time.monotonic() < deadline, jobs
            time.sleep(0.5)


def _free_ports() -> tuple[int, int, int]:
    """A free port, and two free ones in a row."""
    while True:
        with socket.socket() as one, socket.socket() as two, socket.socket() as three:
            one.bind(("", 0))
            two.bind(("", 0))
            with suppress(OSError, OverflowError):
                three.bind(("", two.getsockname()[1] + 1))
                return one.getsockname()[1], two.getsockname()[1], two.getsockname()[1] + 1


@contextmanager
def running(folder: Path) -> Iterator[Cluster]:
    """Start it, and stop it and all its jobs in the end; only root can."""
    if os.geteuid() != 0:
        pytest.skip("starting SLURM takes root")
    if subprocess.run(["munge", "-n"], capture_output=True).returncode:
        subprocess.run(["install", "-d", "-o", "munge", "-g", "munge", "-m", "755", "/run/munge"], check=True)
        subprocess.run(["runuser", "-u", "munge", "--", "munged"], check=True)
    controller, first, second = _free_ports()
    (folder / "state").mkdir()
    for node in ("n1", "n2"):
        (folder / node).mkdir()
        (folder / f"gpu-{node}").touch()
    file = folder / "slurm.conf"
    host, cores = platform.node(), os.cpu_count()
    content = CONFIG.format(folder=folder, host=host, controller=controller, first=first, second=second, cores=cores)
    file.write_text(content)
    devices = (f"NodeName={node} Name=gpu File={folder}/gpu-{node}\n" for node in ("n1", "n2"))
    (folder / "gres.conf").write_text("AutoDetect=off\n" + "".join(devices))
    os.environ["SLURM_CONF"] = str(file)
    cluster = Cluster()
    try:
        for command in (["slurmctld"], ["slurmd", "-N", "n1"], ["slurmd", "-N", "n2"]):
            subprocess.run(command, check=True)
        deadline = time.monotonic() + 60
        while cluster.ask("sinfo", "--noheader", "--format=%T", "--states=idle") != "idle":
            assert time.monotonic() < deadline, (folder / "slurmctld.log").read_text()
            time.sleep(0.2)
        yield cluster
    finally:
        subprocess.run(["scancel", "--full", "--user=root"])
        with suppress(AssertionError):
            cluster.wait_until_empty(30)
        subprocess.run(["scontrol", "shutdown"])
        del os.environ["SLURM_CONF"]
