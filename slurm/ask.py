"""Slurm's commands on a login node: what they say, and whether a job's wishes can be met."""

import os
import pwd
import shutil
import subprocess

from slurm.cluster import Cluster

OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "DEADLINE", "OUT_OF_MEMORY", "BOOT_FAIL")
SOON = 60
"""Seconds that a command of Slurm may take."""


def ask(*command: str) -> str:
    """What a command of Slurm says; OSError where it fails or does not answer."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SOON, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        raise OSError(f"{command[0]} did not answer within {SOON} s: is slurmctld there?") from None
    if done.returncode:
        raise OSError(f"{' '.join(command[:2])} failed: {' '.join(done.stderr.split()) or f'status {done.returncode}'}")
    return done.stdout.strip()


def job_state(job: int) -> str | None:
    """PENDING, RUNNING and so on, of an array that of a task which is not over; None where nothing of the job waits or runs any more, or
    there is no Slurm here."""
    if shutil.which("squeue") is None:
        return None
    try:
        said = ask("squeue", "--noheader", f"--jobs={job}", "--states=all", "--format=%T")
    except OSError:
        return None  # long gone
    return next((state for state in said.split() if state not in OVER), None)


def check_wishes(cluster: Cluster) -> None:
    """ValueError naming a partition that Slurm does not have, or an account that is not this user's, as far as Slurm tells."""
    if cluster.partitions() and shutil.which("sinfo"):
        known = set(ask("sinfo", "--noheader", "--format=%R").split())
        for partition in sorted(cluster.partitions() - known):
            raise ValueError(f"partition {partition!r} is not one of this Slurm's: {', '.join(sorted(known)) or 'it has none'}")
    if cluster.account is not None and shutil.which("sacctmgr"):
        user = pwd.getpwuid(os.getuid()).pw_name
        try:
            said = ask("sacctmgr", "--noheader", "--parsable2", "show", "associations", f"user={user}", "format=account")
        except OSError:
            return  # no accounting here, which is nobody's mistake: sbatch has the last word
        accounts = set(said.split())
        if accounts and cluster.account not in accounts:
            raise ValueError(f"account {cluster.account!r} is not one of yours ({user}): {', '.join(sorted(accounts))}")
