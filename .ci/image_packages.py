"""For the Dockerfile: writes what pip is to install into the container, and under which pins.

requirements.txt: the project's dependencies but for torch, which is the container's. constraints.txt: constraints-gpu.txt, but where the
container's own constraint file pins a package that pin wins; and torch and Triton as they are installed here.
"""

import argparse
import re
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

OF_CONTAINER = ("torch", "triton", "pytorch-triton")


def name_of(line: str) -> str | None:
    """The normalised name of the package in a line of requirements or pins; None for comments and options."""
    match = re.match(r"[A-Za-z0-9][A-Za-z0-9._-]*", line)
    return re.sub(r"[-_.]+", "-", match.group()).lower() if match else None


def requirements(pyproject: str) -> list[str]:
    """The dependencies of a pyproject.toml's text that pip may install."""
    return [line for line in tomllib.loads(pyproject)["project"]["dependencies"] if name_of(line) not in OF_CONTAINER]


def constraints(ours: str, theirs: str, installed: dict[str, str]) -> list[str]:
    """Our pins where the container has none, and `installed` as it is."""
    pinned = {name_of(line) for line in theirs.splitlines()} | set(installed)
    kept = [line for line in ours.splitlines() if name_of(line) and name_of(line) not in pinned]
    return [*kept, *(f"{name}=={number}" for name, number in installed.items())]


def installed_versions() -> dict[str, str]:
    """Of what must stay as it is."""
    found = {}
    for name in OF_CONTAINER:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--container", type=Path, required=True, help="the container's constraint file")
    parser.add_argument("--to", type=Path, required=True, help="folder for requirements.txt and constraints.txt")
    a = parser.parse_args()
    home = Path(__file__).parents[1]
    theirs = a.container.read_text() if a.container.exists() else ""
    pins = constraints((home / "constraints-gpu.txt").read_text(), theirs, installed_versions())
    (a.to / "requirements.txt").write_text("\n".join(requirements((home / "pyproject.toml").read_text())) + "\n")
    (a.to / "constraints.txt").write_text("\n".join(pins) + "\n")


if __name__ == "__main__":
    main()
