"""Stand-ins for Slurm's commands, to run a job's script anywhere and see what it asks of them.

STUB_NODES are the job's nodes, STUB_BAD those whose ranks are not heard well; training runs STUB_TRAIN in a shell; a job that is requeued
is killed, as by Slurm. Every call is a line of `calls`, words parted by a tab.
"""

import os
import subprocess
from pathlib import Path

CALL = 'line=$(printf "%s\\t" "${0##*/}" "$@" | tr "\\n" "~"); printf "%s\\n" "$line" >> "$STUB/calls"\n'
"""In one write: pairs of nodes talk at the same time."""
PROGRAMS = {
    "srun": """
words=$*
if [[ $words == *" doctor --node "* ]]; then
  dir=${words##* --node }; dir=${dir%% *}
  for node in $STUB_NODES; do echo same > "$dir/$node.versions"; touch "$dir/$node.good"; done
elif [[ $words == *" --collectives "* ]]; then
  [[ $words =~ --nodelist=([^ ]*) ]]
  for bad in $STUB_BAD; do [[ ,${BASH_REMATCH[1]}, == *,$bad,* ]] && exit 1; done
  exit 0
elif [[ $words == *" train "* ]]; then
  eval "$STUB_TRAIN"
fi
""",
    "scontrol": """
if [[ $1 == show ]]; then printf '%s\\n' $STUB_NODES; fi
if [[ $1 == requeue ]]; then kill -KILL $PPID; fi
""",
    "sbatch": "echo 99\n",
    "squeue": "",
    "module": "",
    "apptainer": "",
}


def stubs(folder: Path) -> Path:
    """A folder for PATH."""
    place = folder / "stubs"
    place.mkdir()
    for name, text in PROGRAMS.items():
        (place / name).write_text(f"#!/bin/bash\n{CALL}{text}")
        (place / name).chmod(0o755)
    return place


def execute(script: str, place: Path, *, trace: bool = False, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs the text of a script as Slurm would, in the folder of the stubs, with a job's variables."""
    known = {"STUB": str(place), "STUB_NODES": "n1 n2", "STUB_BAD": "", "STUB_TRAIN": "true", "HOME": str(place)}
    known |= {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "nodes", "SLURM_JOB_NUM_NODES": "2", "SLURM_ARRAY_TASK_ID": "1"}
    known |= {"PATH": f"{place}:{os.environ['PATH']}", **environment}
    (place / "script").write_text(script)
    command = ["bash", *(["-x"] if trace else []), str(place / "script")]
    return subprocess.run(command, cwd=place, env=known, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)


def calls(place: Path) -> list[list[str]]:
    """Every call of a stub so far, as its words."""
    return [line.split("\t")[:-1] for line in (place / "calls").read_text().splitlines()]
