"""The list of a checkpoint's files with their checksums: what makes damage visible before anything is read.

`manifest.json` holds size and xxh3-128 of every file, and the SHA-256 of its own body. Nothing in a checkpoint is parsed or
unpickled before its checksum holds.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import xxhash

from data.commit import sync

NAME = "manifest.json"
FORMAT = 1


def checksum(path: Path) -> str:
    """xxh3-128 of a file's bytes, in hexadecimal."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def write_manifest(folder: Path) -> None:
    """Checksums every file under `folder`, writes the manifest, and forces files and folders to the disk."""
    files = {str(p.relative_to(folder)): p for p in sorted(folder.rglob("*")) if p.is_file()}
    entries = {name: {"bytes": path.stat().st_size, "xxh3_128": checksum(path)} for name, path in files.items()}
    body: dict[str, Any] = {"format": FORMAT, "files": entries}
    manifest = {**body, "sha256": _body_digest(body)}
    (folder / NAME).write_text(json.dumps(manifest, indent=1))
    for path in [*files.values(), folder / NAME, *(p for p in folder.rglob("*") if p.is_dir()), folder]:
        sync(path)


def damage(folder: Path) -> str | None:
    """None when every file is there, unchanged, and no other; else what is wrong, naming the file."""
    try:
        manifest = json.loads((folder / NAME).read_text())
        body = {key: manifest[key] for key in ("format", "files")}
        if manifest["sha256"] != _body_digest(body):
            return f"{NAME} was changed"
        if manifest["format"] != FORMAT:
            return f"{NAME} has format {manifest['format']}; this version reads {FORMAT}"
        entries = {name: (entry["bytes"], entry["xxh3_128"]) for name, entry in manifest["files"].items()}
    except FileNotFoundError:
        return f"{NAME} is missing"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{NAME} cannot be read"
    found = {str(p.relative_to(folder)) for p in folder.rglob("*") if not p.is_dir()} - {NAME}
    for name in sorted(found ^ entries.keys()):
        return f"{name} is missing" if name in entries else f"{name} does not belong there"
    for name, (size, digest) in entries.items():
        path = folder / name
        if path.is_symlink() or not path.is_file():
            return f"{name} is not a plain file"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, not {size}"
        if checksum(path) != digest:
            return f"{name} was changed: its checksum does not hold"
    return None


def _body_digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
