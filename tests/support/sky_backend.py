"""SkyPilot's SLURM backend on this machine: an SSH server, a home of its own, and in it SkyPilot's API server.

What runs there writes to the user's own home, so its files are others within a mount namespace of its own.
There, too, node names can be looked up, and SkyPilot finds the internet, which it asks for at two addresses before it
looks at a job, and from which it would install uv, here.
"""

import http.server
import os
import pwd
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import cluster
import pytest
import sky_home

from qlora_recipes.places import sky_client

_SSHD = """
Port {port}
ListenAddress 127.0.0.1
HostKey {home}/.ssh/host
AuthorizedKeysFile {home}/.ssh/authorized_keys
StrictModes no
UsePAM no
PidFile {folder}/sshd.pid
SetEnv {env}
"""
_HOST = """
Host tests
  HostName 127.0.0.1
  Port {port}
  User root
  IdentityFile {home}/.ssh/id
  IdentitiesOnly yes
"""
_SETTINGS = """
jobs: {{controller: {{consolidation_mode: true}}}}
slurm: {{cluster_configs: {{tests: {{tmpdir: {folder}}}}}}}
"""
_CURL = """#!/bin/bash
[[ "$*" = *uv/install.sh ]] && exec echo 'mkdir -p "$UV_INSTALL_DIR"; ln -sf {uv} "$UV_INSTALL_DIR/uv"'
exec {curl} "$@"
"""
_WRITTEN = (".ssh", ".sky", ".bashrc", ".sky_ssh_rc")  # of the user's home, by SkyPilot on a node
_KEPT = ("PATH", "SLURM_CONF", "SSL_CERT_FILE", "UV_DEFAULT_INDEX", "UV_INDEX_URL", "UV_FIND_LINKS")


@dataclass
class Backend:
    """What tests need of it.

    Attributes:
        slurm: the queue behind it.
        env: what commands that are to find it have in their environment.
    """

    slurm: cluster.Cluster
    env: dict[str, str]


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@contextmanager
def _other_files(over: dict[Path, Path]) -> Iterator[None]:
    """Files or folders in the places of others, for this thread and what it starts."""
    own, folder = Path("/proc/thread-self/ns/mnt"), Path.cwd()
    with own.open() as former:
        os.unshare(os.CLONE_NEWNS)
        try:
            subprocess.run(["mount", "--make-rprivate", "/"], check=True)
            for place, file in over.items():
                subprocess.run(["mount", "--bind", file, place], check=True)
            yield
        finally:
            os.setns(former.fileno(), os.CLONE_NEWNS)
            os.chdir(folder)


@contextmanager
def _internet() -> Iterator[str]:
    """A server that answers as those do that SkyPilot looks for."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler)
    server.RequestHandlerClass.log_message = lambda *_: None  # type: ignore[method-assign]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def _home(folder: Path, port: int) -> Path:
    """A home with keys, SkyPilot's settings, and what a login shell and installers need."""
    home, tools = folder / "home", folder / "tools"
    for path in (home / ".ssh", home / ".slurm", home / ".sky", tools):
        path.mkdir(parents=True)
    (home / ".ssh").chmod(0o700)
    for key in ("id", "host"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", home / ".ssh" / key], check=True)
    shutil.copy(home / ".ssh" / "id.pub", home / ".ssh" / "authorized_keys")
    (home / ".slurm" / "config").write_text(_HOST.format(port=port, home=home))
    (home / ".sky" / "config.yaml").write_text(_SETTINGS.format(folder=folder))
    (tools / "curl").write_text(_CURL.format(uv=shutil.which("uv"), curl=shutil.which("curl")))
    (tools / "curl").chmod(0o755)
    path = os.pathsep.join((str(tools), str(_older_python().parent), os.environ["PATH"]))
    (home / ".profile").write_text(f"export PATH='{path}'\n")
    for name in (".bashrc", ".sky_ssh_rc"):
        (home / name).touch()
    return home


def _older_python() -> Path:
    """The Python that SkyPilot wants on a node; skips where there is none."""
    of_pyenv = Path(os.environ.get("PYENV_ROOT", "/none")).glob("versions/3.10*/bin")
    for folder in (*map(Path, os.get_exec_path()), *of_pyenv):
        file = folder / "python3.10"
        if file.is_file() and not subprocess.run([file, "-c", ""], capture_output=True).returncode:  # not only a shim
            return file
    pytest.skip("no Python 3.10 on this machine")


def _require() -> Path:
    """The file of SkyPilot's that has the addresses of the internet; skips where the backend cannot be run."""
    if os.geteuid() != 0:
        pytest.skip("SkyPilot's SLURM backend takes root here")
    if missing := [name for name in ("sshd", "rsync", "uv", "curl", "mount") if not shutil.which(name)]:
        pytest.skip(f"no {', '.join(missing)} on this machine (Debian: openssh-server rsync curl; uv by pip)")
    sky_home.require()
    (file,) = sky_client.ENVIRONMENT.glob("lib/python*/site-packages/sky/backends/backend_utils.py")
    return file


@contextmanager
def running(folder: Path) -> Iterator[Backend]:
    """Start it, and stop it with all that it started in the end; skips where that cannot be done."""
    utils = _require()
    port, root = _free_port(), Path(pwd.getpwuid(0).pw_dir)
    home = _home(folder, port)
    with ExitStack() as stack:
        for place in _WRITTEN:
            is_file = (home / place).is_file()
            make, remove = (Path.touch, Path.unlink) if is_file else (Path.mkdir, Path.rmdir)
            if not (root / place).exists():
                make(root / place)
                stack.callback(remove, root / place)
        address = stack.enter_context(_internet())
        (folder / "utils.py").write_text(
            utils.read_text().replace("_TEST_IP_LIST = [", f"_TEST_IP_LIST = ['{address}'] or [", 1)
        )
        (folder / "hosts").write_text("127.0.0.1 n1 n2\n" + Path("/etc/hosts").read_text())
        others = {utils: folder / "utils.py", Path("/etc/hosts"): folder / "hosts"}
        others |= {root / name: home / name for name in _WRITTEN}
        try:
            stack.enter_context(_other_files(others))
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no mounts of one's own here: {error}")
        (folder / "slurm").mkdir()
        slurm = stack.enter_context(cluster.running(folder / "slurm"))
        kept = {name: os.environ[name] for name in _KEPT if name in os.environ} | {"HOME": str(home)}
        setting = " ".join(f"{name}={value}" for name, value in kept.items())
        (folder / "sshd_config").write_text(_SSHD.format(port=port, home=home, folder=folder, env=setting))
        Path("/run/sshd").mkdir(exist_ok=True)
        subprocess.run([str(shutil.which("sshd")), "-f", folder / "sshd_config", "-E", folder / "sshd.log"], check=True)
        env = {"HOME": str(home), "SKYPILOT_API_SERVER_LOCAL_PORT": str(_free_port())}
        env |= {"SKYPILOT_DISABLE_USAGE_COLLECTION": "1"}
        try:
            yield Backend(slurm, env)
        finally:
            sky = sky_client.ENVIRONMENT / "bin" / "sky"
            subprocess.run([sky, "api", "stop"], env=os.environ | env, capture_output=True)
            subprocess.run(["kill", (folder / "sshd.pid").read_text().strip()])
