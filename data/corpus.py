"""Which files a corpus is, in one fixed order, and what kind each is."""

import glob
import os
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Kind = Literal["text", "lines", "parquet", "dataset"]
Codec = Literal["gzip", "zstd"]

LINES_SUFFIXES = (".jsonl", ".ndjson")
CODECS: dict[str, Codec] = {".gz": "gzip", ".zst": "zstd"}
DATASET_MARKS = ("state.json", "dataset_info.json")
"""What Hugging Face `datasets`' save_to_disk leaves in a folder."""

STANDARD_LIBRARY_LEAVES_OUT = ("site-packages", "dist-packages", "__pycache__")


@dataclass(frozen=True, kw_only=True)
class Document:
    """One text held in memory. `source` names it; `size` is its bytes as UTF-8."""

    source: str
    text: str
    size: int


@dataclass(frozen=True, kw_only=True)
class Undecodable:
    """A file that is not UTF-8 text: reported instead of a Document, never passed over in silence."""

    source: str
    size: int


@dataclass(frozen=True, kw_only=True)
class Source:
    """One input file (or one saved dataset's folder). `given` is the argument it stands behind; `size` its bytes on disk."""

    given: str
    path: Path
    kind: Kind
    codec: Codec | None
    size: int


def find_sources(inputs: Iterable[str | Path]) -> list[Source]:
    """What stands behind `inputs`, in the order given (see `find_files`); the kind follows the name.

    `.jsonl` and `.ndjson` hold a JSON object a line, `.parquet` is Parquet, a folder written by `datasets`' save_to_disk is a dataset,
    any other file is one document; `.gz` and `.zst` after a name of text or lines say how it is packed.
    """
    found = []
    for given in _existing(inputs):
        if _is_dataset(given):
            size = sum(file.stat().st_size for file in given.glob("*.arrow"))
            found.append(Source(given=str(given), path=given, kind="dataset", codec=None, size=size))
            continue
        for path in find_files([given]):
            codec = CODECS.get(path.suffix.lower())
            suffix = (Path(path.stem) if codec else path).suffix.lower()
            kind: Kind = "lines" if suffix in LINES_SUFFIXES else "parquet" if suffix == ".parquet" else "text"
            if codec and kind == "parquet":
                raise ValueError(f"{path}: Parquet packed once more; unpack it (Parquet compresses its columns itself)")
            found.append(Source(given=str(given), path=path, kind=kind, codec=codec, size=path.stat().st_size))
    return found


def find_files(inputs: Iterable[str | Path], *, suffixes: Sequence[str] | None = None) -> list[Path]:
    """The files behind `inputs`, in the order given; a folder stands for every file below it, a glob for what it matches, sorted by path.

    Inside a folder, hidden names and symbolic links are not followed, and with `suffixes` (such as `[".py", ".md"]`) only those
    files are taken. A file that is named itself is always taken. Raises ValueError for an input that does not exist or holds no file.
    """
    files: list[Path] = []
    for path in _existing(inputs):
        if path.is_dir():
            found = _walk(path, leave_out=(), suffixes=suffixes)
            if not found:
                wanted = f" ending in {', '.join(suffixes)}" if suffixes else ""
                raise ValueError(f"{path}: the directory holds no file{wanted}; hidden files and symbolic links are not followed")
            files += found
        else:
            files.append(path)
    return files


def standard_library(root: Path | None = None, *, without: Sequence[str] = ()) -> Iterator[Document | Undecodable]:
    """The `*.py` files of the running Python's standard library (or of `root`), sorted; sources are relative to it.

    Installed packages and caches are left out, as are folders named in `without`. `test/` is included where present (Debian has none).
    """
    home = root or Path(sysconfig.get_path("stdlib"))
    for file in _walk(home, leave_out=(*STANDARD_LIBRARY_LEAVES_OUT, *without), suffixes=[".py"]):
        content, source = file.read_bytes(), file.relative_to(home).as_posix()
        try:
            yield Document(source=source, text=content.decode(), size=len(content))
        except UnicodeDecodeError:
            yield Undecodable(source=source, size=len(content))


def _existing(inputs: Iterable[str | Path]) -> Iterator[Path]:
    """Each input that exists, and what each glob (`**` included) matches."""
    empty = True
    for given in inputs:
        empty = False
        path = Path(given)
        if path.exists():
            yield path
            continue
        magic = glob.has_magic(str(given))
        matches = sorted(glob.glob(str(given), recursive=True)) if magic else []  # noqa: PTH207 # which leaves hidden names out
        if not matches:
            what = "matches nothing" if magic else "no such file or directory"
            raise ValueError(f"{given}: {what}; inputs are text, .jsonl and .parquet files, saved datasets, directories and globs of them")
        yield from map(Path, matches)
    if empty:
        raise ValueError("no input was given: name at least one text, .jsonl or .parquet file, saved dataset or directory")


def _is_dataset(path: Path) -> bool:
    if (path / "dataset_dict.json").is_file():
        splits = sorted(entry.name for entry in path.iterdir() if entry.is_dir())
        raise ValueError(
            f"{path}: a saved dataset of several splits; name those you want: {', '.join(f'{path}/{name}' for name in splits)}"
        )
    return all((path / mark).is_file() for mark in DATASET_MARKS)


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
