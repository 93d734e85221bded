"""A real Slurm of a few nodes on this machine: slurmctld, a slurmd for each node, and munge, on the loopback, without root or systemd.

Where they are not installed, Debian's packages are unpacked (14 MB) into a folder of their own. Everything is under one short folder;
`stop` ends what was started and the processes of its jobs, known by the cluster's name in their environment.
"""

import json
import os
import pwd
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

PACKAGES = ("munge", "libmunge2", "libhwloc15", "liblua5.1-0", "slurm-client", "slurm-wlm-basic-plugins", "slurmctld", "slurmd")
OVER = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "DEADLINE", "OUT_OF_MEMORY", "BOOT_FAIL"}


def unpack(folder: Path) -> Path:
    """Fetches and unpacks the packages, once; the folder. Skips, with the reason, where that is not possible."""
    if (folder / "complete").exists():
        return folder
    for tool in ("apt-get", "dpkg"):
        if shutil.which(tool) is None:
            pytest.skip(f"no Slurm can be unpacked here: {tool} is missing")
    addresses = {info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)}
    if not all(str(address).startswith("127.") for address in addresses):
        pytest.skip(f"the host's name resolves to {addresses}: srun would not listen on the loopback alone")
    (folder / "debs").mkdir(parents=True)
    user = ["-o", "APT::Sandbox::User=root"] if os.geteuid() == 0 else []
    command = ["apt-get", *user, "-q", "download", *PACKAGES]
    done = subprocess.run(command, cwd=folder / "debs", capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL)
    if done.returncode:
        update = subprocess.run(["apt-get", "update"], capture_output=True, timeout=120, stdin=subprocess.DEVNULL)
        done = subprocess.run(command, cwd=folder / "debs", capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL)
        if done.returncode:
            pytest.skip(f"apt-get has no Slurm (update: {update.returncode}): {done.stderr.strip()[-200:]}")
    for package in sorted((folder / "debs").glob("*.deb")):
        subprocess.run(["dpkg", "-x", str(package), str(folder)], check=True, timeout=60)
    programs = folder / "bin"
    programs.mkdir()
    for name in ("slurmctld", "slurmd", "slurmstepd"):
        (programs / name).symlink_to(folder / "usr/sbin" / f"{name}-wlm")
    (folder / "complete").touch()
    return folder


class Slurm:
    """A running cluster of nodes n1, n2, ...; `environment` makes Slurm's commands talk to it."""

    def __init__(self, root: Path, packages: Path, nodes: int) -> None:
        self.root, self.name, self.nodes = root, f"test{secrets.token_hex(4)}", [f"n{i + 1}" for i in range(nodes)]
        self._packages, self._daemons = packages, dict[str, subprocess.Popen[bytes]]()
        plugins = next(packages.glob("usr/lib/**/auth_munge.so")).parent
        self.environment = {
            **os.environ,
            "PATH": f"{packages / 'bin'}:{packages / 'usr/sbin'}:{packages / 'usr/bin'}:{os.environ['PATH']}",
            "LD_LIBRARY_PATH": f"{plugins.parent}:{plugins}",
            "SLURM_CONF": str(root / "slurm.conf"),
        }
        for part in ("run", "log", "state", "spool"):
            (root / part).mkdir(parents=True)
        (root / "munge.key").write_bytes(secrets.token_bytes(128))
        (root / "munge.key").chmod(0o400)
        (root / "slurm.conf").write_text(self._settings(plugins))

    def _settings(self, plugins: Path) -> str:
        root, host, user = self.root, socket.gethostname().split(".")[0], pwd.getpwuid(os.geteuid()).pw_name
        control, *ports = _free_ports(1 + len(self.nodes))
        lines = f"""
ClusterName={self.name}
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={control}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={root}/run/munge.sock,cred_expire=5
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
PluginDir={plugins}
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/run/slurmctld.pid
SlurmdPidFile={root}/run/%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SwitchType=switch/none
MpiDefault=none
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,sched_min_interval=10000,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
KillWait=3
MinJobAge=3600
MessageTimeout=30
SlurmctldTimeout=30
SlurmdTimeout=10
InactiveLimit=0
PartitionName=batch Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
        nodes = [
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=4 RealMemory=8000 State=UNKNOWN\n"
            for node, port in zip(self.nodes, ports, strict=True)
        ]
        return lines.strip() + "\n" + "".join(nodes)

    def start(self) -> None:
        """Returns when every node is idle."""
        root = self.root
        self._spawn(
            "munged",
            *("--foreground", "--force", f"--socket={root}/run/munge.sock", f"--key-file={root}/munge.key"),
            *(f"--pid-file={root}/run/munged.pid", f"--log-file={root}/log/munged.log", f"--seed-file={root}/run/seed"),
        )
        self.until((root / "run/munge.sock").exists, "munge")
        self._spawn("slurmctld", "-D", "-f", f"{root}/slurm.conf")
        for node in self.nodes:
            self.start_node(node)
        self.until(lambda: self.run("sinfo", "-h", "-N", "-o", "%t", check=False).split() == ["idle"] * len(self.nodes), "all nodes idle")

    def start_node(self, node: str) -> None:
        self._spawn("slurmd", "-D", "-d", f"{self._packages}/bin/slurmstepd", "-N", node, "-f", f"{self.root}/slurm.conf", key=node)

    def kill_node(self, node: str) -> None:
        """As a machine that loses power: its daemon, and everything its jobs run there."""
        self._daemons[node].kill()
        for process in psutil.process_iter():
            if _variable(process, "SLURMD_NODENAME") == node and _variable(process, "SLURM_CLUSTER_NAME") == self.name:
                _signal(process, signal.SIGKILL)

    def _spawn(self, program: str, *arguments: str, key: str | None = None) -> None:
        with (self.root / "log" / f"{key or program}.out").open("ab") as out:
            path = shutil.which(program, path=self.environment["PATH"])
            assert path is not None
            self._daemons[key or program] = subprocess.Popen(
                [path, *arguments], stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=self.environment, start_new_session=True
            )

    def stop(self) -> list[str]:
        """Ends everything; the command lines of what was still there afterwards and had to be killed."""
        if (jobs := self.run("squeue", "-h", "-o", "%A", check=False).split()) != []:
            self.run("scancel", *jobs, check=False)
            self.until(lambda: not self.run("squeue", "-h", "-o", "%A", check=False), "no job", limit=15, fail=False)
        for daemon in reversed(self._daemons.values()):
            daemon.terminate()
        for daemon in self._daemons.values():
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
        left = [process for process in psutil.process_iter() if _variable(process, "SLURM_CLUSTER_NAME") == self.name]
        said = [" ".join(process.cmdline()) for process in left if process.is_running()]
        for process in left:
            _signal(process, signal.SIGKILL)
        return said

    def run(self, *command: str, check: bool = True) -> str:
        """One of Slurm's commands, as a user of the cluster."""
        path = shutil.which(command[0], path=self.environment["PATH"])
        assert path is not None
        done = subprocess.run(
            [path, *command[1:]], env=self.environment, capture_output=True, text=True, timeout=30, stdin=subprocess.DEVNULL
        )
        assert not check or done.returncode == 0, f"{command}: status {done.returncode}: {done.stderr}"
        return done.stdout.strip()

    def job(self, number: int) -> dict[str, str]:
        """What `scontrol show job` says."""
        return dict(re.findall(r"(\w+)=(\S*)", self.run("scontrol", "show", "job", str(number), "-o")))

    def ended(self, number: int, limit: float = 120) -> str:
        """The state in which the job ended."""
        self.until(lambda: self._state(number) in OVER, f"job {number} over", limit=limit)
        return self.job(number)["JobState"]

    def _state(self, number: int) -> str:
        """Asked again and again on a busy machine: once without an answer is not the end."""
        found = re.search(r"JobState=(\S+)", self.run("scontrol", "show", "job", str(number), "-o", check=False))
        return found[1] if found else ""

    def until(self, true: Callable[[], object], what: str, limit: float = 60, *, fail: bool = True) -> None:
        end = time.monotonic() + limit
        while not true():
            if time.monotonic() > end:
                assert not fail, f"waited {limit} s for {what}: {self.run('squeue', check=False)}"
                return
            time.sleep(0.25)


def machine(folder: Path, **changes: object) -> Path:
    """A cluster's file: two nodes with a rank each, all on this machine."""
    fields: dict[str, object] = {
        "nodes": 2,
        "ranks_per_node": 1,
        "time_limit": "10",
        "signal_seconds": 60,
        "free_gib": 0,
        "collectives": False,
        "python": sys.executable,
        "environment": {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "MASTER_ADDR": "127.0.0.1"},
    }
    path = folder / "cluster.yaml"
    path.write_text(json.dumps({**fields, **changes}))
    return path


def _variable(process: psutil.Process, name: str) -> str | None:
    try:
        return process.environ().get(name) if process.status() != psutil.STATUS_ZOMBIE else None
    except psutil.Error:
        return None


def _signal(process: psutil.Process, number: int) -> None:
    with suppress(psutil.Error):
        process.send_signal(number)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()
