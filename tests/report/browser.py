"""A real browser for the report: Debian's chromium-headless-shell, unpacked into a folder of its own and driven by playwright.

Nothing is installed. It needs apt's package lists (`apt-get update`) and playwright (`pip install -e '.[slow]'`).
"""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

PACKAGES = ("chromium-headless-shell", "fonts-dejavu-core")


def unpack(folder: Path) -> Path:
    """Fetches the packages and what they depend on, and unpacks them; the browser's executable. Skips, with the reason, where it cannot."""
    for tool in ("apt-get", "dpkg"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is missing: Debian's chromium cannot be unpacked here")
    (folder / "debs" / "partial").mkdir(parents=True)
    options = ["-o", f"Dir::Cache::archives={folder / 'debs'}", "-o", "Debug::NoLocking=true", "--no-install-recommends"]
    command = ["apt-get", "install", "-q", "-y", "--download-only", *options, *PACKAGES]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL)
    if done.returncode:
        pytest.skip(f"apt-get has no {' '.join(PACKAGES)} (are the lists there? `apt-get update`): {done.stderr.strip()[-200:]}")
    for package in sorted((folder / "debs").glob("*.deb")):
        subprocess.run(["dpkg", "-x", str(package), str(folder / "root")], check=True, timeout=120)
    return folder / "root" / "usr" / "lib" / "chromium" / "chromium-headless-shell"


@contextmanager
def browser(executable: Path) -> Iterator[Any]:
    """The browser, running; playwright's Browser."""
    from playwright.sync_api import sync_playwright  # not among the default tests' packages

    root = executable.parents[3]
    libraries = sorted({str(file.parent) for file in root.rglob("*.so*")})
    environment = {**os.environ, "LD_LIBRARY_PATH": ":".join(libraries), "HOME": str(root)}
    with sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=str(executable), args=["--no-sandbox"], env=environment)
        yield opened
        opened.close()
