"""What the Dockerfile installs: never another torch, the container's pins before ours, and packages that exist."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

HOME = Path(__file__).parents[1]
PINS = (HOME / "constraints-gpu.txt").read_text()


@pytest.fixture(scope="module")
def packages() -> ModuleType:
    spec = importlib.util.spec_from_file_location("image_packages", HOME / ".ci" / "image_packages.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_container_s_packages_stay(packages: ModuleType) -> None:
    """No pin and no requirement of ours names what the container is taken for; what it pins itself wins over our pin."""
    wanted = packages.requirements((HOME / "pyproject.toml").read_text())
    names = {packages.name_of(line) for line in wanted}
    assert "megatron-core" in names and not names & {"torch", "triton", "apex", "transformer-engine"}
    pinned = {packages.name_of(line) for line in PINS.splitlines()}
    assert not pinned & {"torch", "triton", "numpy", "apex", "transformer-engine"} and not any(
        name.startswith("nvidia") for name in pinned if name
    )
    assert names - {"numpy"} <= pinned  # numpy is the container's too
    theirs = "# theirs\nprotobuf==4.24.4\nRuamel_YAML<0.20\n"
    made = packages.constraints(PINS, theirs, {"torch": "2.11.0a0+nv26.2"})
    assert made[-1] == "torch==2.11.0a0+nv26.2" and f"megatron-core=={PINS.split('megatron-core==')[1].split()[0]}" in made
    assert not any(line.startswith(("protobuf", "ruamel.yaml")) for line in made)


def test_writes_what_pip_takes(tmp_path: Path) -> None:
    """As the Dockerfile calls it; here without a container's file, and with this environment's torch."""
    command = [sys.executable, str(HOME / ".ci" / "image_packages.py"), "--container", str(tmp_path / "none"), "--to", str(tmp_path)]
    subprocess.run(command, check=True, timeout=60)
    assert "torch==" in (tmp_path / "constraints.txt").read_text() and "torch" not in (tmp_path / "requirements.txt").read_text().split()
    assert all(
        part in (HOME / "Dockerfile").read_text() for part in ("/etc/pip/constraint.txt", ".ci/image_packages.py", "--no-deps", "ARG TAG=")
    )


def reachable(pip: list[str]) -> None:
    """Skips, with the reason, where there is no package index."""
    probe = subprocess.run([*pip, "--no-deps", "--ignore-installed", "Jinja2"], capture_output=True, text=True, timeout=120)
    if probe.returncode:
        pytest.skip(f"the package index is not reachable: {probe.stderr.strip()[-200:]}")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_install_step(tmp_path: Path) -> None:
    """As in the Dockerfile, but for `--dry-run`, with this environment's torch and Triton in the place of the container's, and a constraint
    file like its: torch is not installed, the container's pin holds, all else is as pinned here. Asks the package index."""
    here, site = Path(torch.__file__).parents[1], tmp_path / "site"
    site.mkdir()
    for path in (*here.glob("torch"), *here.glob("torch-*.dist-info"), *here.glob("triton"), *here.glob("triton-*.dist-info")):
        (site / path.name).symlink_to(path)
    (tmp_path / "container.txt").write_text("protobuf<7\n")
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True, timeout=120)
    python, environment = str(tmp_path / "venv/bin/python"), {**os.environ, "PYTHONPATH": str(site)}
    command = [python, str(HOME / ".ci/image_packages.py"), "--container", str(tmp_path / "container.txt"), "--to", str(tmp_path)]
    subprocess.run(command, check=True, timeout=60, env=environment)
    pip = [python, "-m", "pip", "install", "--dry-run", "--quiet", "--disable-pip-version-check", "--retries", "1"]
    reachable(pip)
    pip += ["--report", str(tmp_path / "report.json"), "--requirement", str(tmp_path / "requirements.txt")]
    pip += ["--constraint", str(tmp_path / "container.txt"), "--constraint", str(tmp_path / "constraints.txt")]
    done = subprocess.run(pip, capture_output=True, text=True, timeout=500, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    listed = [one["metadata"] for one in json.loads((tmp_path / "report.json").read_text())["install"]]
    made = {one["name"].lower(): one["version"] for one in listed}
    assert not made.keys() & {"torch", "triton"} and made["megatron-core"] == "0.16.1" and int(made["protobuf"].split(".")[0]) < 7
    assert not any(name.startswith("nvidia") for name in made)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_pin_exists(tmp_path: Path) -> None:
    """pip finds every pinned package for Python 3.12 and 3.11 as a wheel, without installing it. Asks the package index."""
    pip = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-deps", "--ignore-installed", "--only-binary=:all:"]
    pip += ["--disable-pip-version-check", "--quiet", "--retries", "1", "--target", str(tmp_path)]
    reachable(pip)
    for python in ("3.12", "3.11"):
        command = [*pip, "--python-version", python, "--requirement", str(HOME / "constraints-gpu.txt")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stderr[-2000:]
