"""The list of a checkpoint's files with their checksums: what makes damage visible before anything is read.

`manifest.json` holds size and xxh3-128 of every file, and the SHA-256 of its own body. Nothing in a checkpoint is parsed or
unpickled before its checksum holds.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

from data.commit import sync

NAME = "manifest.json"
FORMAT = 1


class Damage(ValueError):
    """What is wrong with a manifest, or with the files that it lists."""


class NewerFormat(ValueError):
    """Not damaged: written by a later version of this project. It is never set aside, and nothing goes on from an older one instead."""


def checksum(path: Path) -> str:
    """xxh3-128 of a file's bytes, in hexadecimal."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def write_manifest(folder: Path, known: Mapping[str, tuple[int, str]] | None = None) -> None:
    """Checksums every file under `folder`, writes the manifest, and forces files and folders to the disk.

    `known`: files on the disk already, whose size and checksum were found as they were written.
    """
    known = known or {}
    (folder / NAME).unlink(missing_ok=True)  # of an attempt that was killed
    files = {str(p.relative_to(folder)): p for p in sorted(folder.rglob("*")) if p.is_file()}
    entries = {}
    if gone := known.keys() - files.keys():
        raise OSError(f"{folder} lacks {', '.join(sorted(gone))}, which were written to it")
    for name, path in files.items():
        size, digest = known[name] if name in known else (path.stat().st_size, checksum(path))
        if path.stat().st_size != size:
            raise OSError(f"{path} has {path.stat().st_size} bytes, not the {size} that were written")
        entries[name] = {"bytes": size, "xxh3_128": digest}
    body: dict[str, Any] = {"format": FORMAT, "files": entries}
    manifest = {**body, "sha256": _body_digest(body)}
    (folder / NAME).write_text(json.dumps(manifest, indent=1))
    new = [path for name, path in files.items() if name not in known]
    for path in [*new, folder / NAME, *(p for p in folder.rglob("*") if p.is_dir()), folder]:
        sync(path)


def damage(folder: Path, *, contents: bool = True) -> str | None:
    """None when every file is there, unchanged, and no other; else what is wrong, naming the file. NewerFormat where this version cannot
    tell. Without `contents` only names and sizes are looked at, which takes no time whatever the checkpoint's size."""
    try:
        entries = listed(folder)
    except Damage as error:
        return str(error)
    return next((wrong for name, entry in entries.items() if (wrong := damage_of(folder, name, entry, contents=contents))), None)


def listed(folder: Path) -> dict[str, tuple[int, str]]:
    """Size and checksum of every file, as the manifest says. Damage, naming the file, where the manifest does not hold, a file is
    missing, or one does not belong there; no other file is read."""
    if (folder / NAME).exists() and not (folder / NAME).is_file():
        raise Damage(f"{NAME} is not a plain file")
    try:
        manifest = json.loads((folder / NAME).read_text())
    except FileNotFoundError:
        raise Damage(f"{NAME} is missing") from None
    except (ValueError, RecursionError):  # of json, of its encoding, of a number with thousands of digits
        raise Damage(f"{NAME} cannot be read") from None
    try:
        body = {key: manifest[key] for key in ("format", "files")}
        if manifest["sha256"] != _body_digest(body):
            raise Damage(f"{NAME} was changed")
        if manifest["format"] != FORMAT:
            raise NewerFormat(
                f"{folder} has format {manifest['format']}; this version reads {FORMAT}: use the version that wrote it, or move it away"
            )
        entries = {name: (entry["bytes"], entry["xxh3_128"]) for name, entry in manifest["files"].items()}
        if not all(type(size) is int and isinstance(digest, str) for size, digest in entries.values()):
            raise TypeError
    except (RecursionError, KeyError, TypeError, AttributeError):
        raise Damage(f"{NAME} cannot be read") from None
    found = {str(p.relative_to(folder)) for p in folder.rglob("*") if not p.is_dir()} - {NAME}
    for name in sorted(found ^ entries.keys()):
        raise Damage(f"{name} is missing" if name in entries else f"{name} does not belong there")
    return entries


def damage_of(folder: Path, name: str, entry: tuple[int, str], *, contents: bool = True) -> str | None:
    """What is wrong with one listed file, or None."""
    path, (size, digest) = folder / name, entry
    if path.is_symlink() or not path.is_file():
        return f"{name} is not a plain file"
    try:
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, not {size}"
        if contents and checksum(path) != digest:
            return f"{name} was changed: its checksum does not hold"
    except OSError as error:
        return f"{name} cannot be read: {error.strerror}"
    return None


def _body_digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
