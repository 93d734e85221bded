"""Documents: text files, folders of them and JSONL, read in one fixed order."""

import json
import os
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

JSONL_SUFFIX = ".jsonl"
STANDARD_LIBRARY_LEAVES_OUT = ("site-packages", "dist-packages", "__pycache__")


@dataclass(frozen=True, kw_only=True)
class Document:
    """One text. `source` is the file's path, with `:line` for JSONL; `size` the bytes it took there."""

    source: str
    text: str
    size: int


@dataclass(frozen=True, kw_only=True)
class Undecodable:
    """A file that is not UTF-8 text: reported instead of a Document, never passed over in silence."""

    source: str
    size: int


def find_files(inputs: Iterable[str | Path], *, suffixes: Sequence[str] | None = None) -> list[Path]:
    """The files behind `inputs`, in the order given; a folder stands for every file below it, sorted by path.

    Inside a folder, hidden names and symbolic links are not followed, and with `suffixes` (such as `[".py", ".md"]`) only those
    files are taken. A file that is named itself is always taken. Raises ValueError for an input that does not exist or holds no file.
    """
    files: list[Path] = []
    for given in inputs:
        path = Path(given)
        if path.is_dir():
            found = _walk(path, leave_out=(), suffixes=suffixes)
            if not found:
                wanted = f" ending in {', '.join(suffixes)}" if suffixes else ""
                raise ValueError(f"{path}: the directory holds no file{wanted}; hidden files and symbolic links are not followed")
            files += found
        elif path.is_file():
            files.append(path)
        else:
            raise ValueError(f"{path}: no such file or directory; inputs are text files, .jsonl files and directories")
    if not files:
        raise ValueError("no input was given: name at least one text file, .jsonl file or directory")
    return files


def read_documents(files: Iterable[Path], *, key: str = "text") -> Iterator[Document | Undecodable]:
    """Every document of `files` in order: a `.jsonl` file gives one per line (its `key`), any other file is one document.

    Text is taken byte for byte (no newline translation). A file that is not UTF-8 gives an Undecodable. A JSONL line that is not UTF-8,
    not a JSON object, or lacks a string under `key` raises ValueError with file and line number; blank lines hold no document.
    """
    for file in files:
        if file.suffix.lower() == JSONL_SUFFIX:
            yield from _lines(file, key)
        else:
            yield _whole(file, file.as_posix())


def standard_library(root: Path | None = None, *, without: Sequence[str] = ()) -> Iterator[Document | Undecodable]:
    """The `*.py` files of the running Python's standard library (or of `root`), sorted; sources are relative to it.

    Installed packages and caches are left out, as are folders named in `without`. `test/` is included where present (Debian has none).
    """
    home = root or Path(sysconfig.get_path("stdlib"))
    for file in _walk(home, leave_out=(*STANDARD_LIBRARY_LEAVES_OUT, *without), suffixes=[".py"]):
        yield _whole(file, file.relative_to(home).as_posix())


def _walk(root: Path, *, leave_out: Sequence[str], suffixes: Sequence[str] | None) -> list[Path]:
    found = []
    for folder, subfolders, names in os.walk(root):  # does not descend into symbolic links
        subfolders[:] = [name for name in subfolders if not name.startswith(".") and name not in leave_out]
        for name in names:
            path = Path(folder, name)
            wanted = not name.startswith(".") and (suffixes is None or path.suffix in suffixes)
            if wanted and not path.is_symlink() and path.is_file():
                found.append(path)
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def _whole(file: Path, source: str) -> Document | Undecodable:
    content = file.read_bytes()
    try:
        return Document(source=source, text=content.decode(), size=len(content))
    except UnicodeDecodeError:
        return Undecodable(source=source, size=len(content))


def _lines(file: Path, key: str) -> Iterator[Document]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                source = f"{file.as_posix()}:{number}"
                yield Document(source=source, text=_text_of(line, key, source), size=len(line))


def _text_of(line: bytes, key: str, source: str) -> str:
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"{source}: not UTF-8 at byte {error.start} of the line; convert the file to UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{source}: malformed JSON ({error.msg} at column {error.colno}); each line must be one JSON object") from None
    if not isinstance(record, dict):
        raise ValueError(f"{source}: a JSON {type(record).__name__}; each line must be one JSON object")
    if key not in record:
        raise ValueError(f"{source}: no key {key!r}; the line has {', '.join(map(repr, record)) or 'no keys'}: choose another key")
    text = record[key]
    if not isinstance(text, str):
        raise ValueError(f"{source}: {key!r} is a {type(text).__name__}, not a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON may escape half of a surrogate pair, which is no character
        raise ValueError(f"{source}: {key!r} has a lone surrogate at character {error.start}, which is not text") from None
    return text
