import sysconfig
from pathlib import Path

import pytest

from data.corpus import Document, find_files, find_sources, standard_library


def test_a_folder_is_read_sorted_without_hidden_names_and_links(tmp_path: Path) -> None:
    for name in ("b/z.txt", "a.txt", "b/a.md", ".hidden", ".git/config", "b.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "link.txt").symlink_to(tmp_path / "a.txt")
    (tmp_path / "linked").symlink_to(tmp_path / "b")

    found = [file.relative_to(tmp_path).as_posix() for file in find_files([tmp_path])]
    assert found == ["a.txt", "b.txt", "b/a.md", "b/z.txt"]
    assert [file.name for file in find_files([tmp_path], suffixes=[".md"])] == ["a.md"]
    named = [tmp_path / "link.txt", tmp_path / "b", tmp_path / "a.txt"]  # in the order given; a file named itself may be a link
    assert [file.name for file in find_files(named)] == ["link.txt", "a.md", "z.txt", "a.txt"]


def test_a_glob_stands_for_what_it_matches(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "deep/er/c.jsonl", ".hidden.jsonl", "d.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    assert [file.name for file in find_files([f"{tmp_path}/*.jsonl"])] == ["a.jsonl", "b.jsonl"]
    assert [file.name for file in find_files([f"{tmp_path}/**/*.jsonl"])] == ["a.jsonl", "b.jsonl", "c.jsonl"]
    (tmp_path / "[odd]*.txt").write_text("a name is taken as it is, if there is such a file")
    assert [file.name for file in find_files([tmp_path / "[odd]*.txt"])] == ["[odd]*.txt"]
    with pytest.raises(ValueError, match=r"\*.parquet: matches nothing"):
        find_files([f"{tmp_path}/*.parquet"])


def test_the_kind_follows_the_name(tmp_path: Path) -> None:
    names = {
        "a.txt": ("text", None),
        "b.JSONL": ("lines", None),
        "c.ndjson": ("lines", None),
        "d.jsonl.gz": ("lines", "gzip"),
        "e.md.zst": ("text", "zstd"),
        "f.parquet": ("parquet", None),
        "g": ("text", None),
    }
    for name in names:
        (tmp_path / name).write_bytes(b"12345")
    found = find_sources([tmp_path])
    assert {source.path.name: (source.kind, source.codec) for source in found} == names
    assert {(source.size, source.given) for source in found} == {(5, str(tmp_path))}
    (tmp_path / "x.parquet.gz").write_bytes(b"")
    with pytest.raises(ValueError, match="packed once more"):
        find_sources([tmp_path])


def test_missing_and_empty_inputs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file or directory"):
        find_files([tmp_path / "nothing"])
    with pytest.raises(ValueError, match="holds no file ending in .py"):
        find_files([tmp_path], suffixes=[".py"])
    with pytest.raises(ValueError, match="no input"):
        find_files([])


def test_the_standard_library_is_its_own_sources_only(tmp_path: Path) -> None:
    for name in ("z.py", "a/b.py", "a/b.txt", "site-packages/c.py", "dist-packages/d.py", "a/__pycache__/e.py", "test/f.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("pass")
    assert [document.source for document in standard_library(tmp_path)] == ["a/b.py", "test/f.py", "z.py"]
    assert [document.source for document in standard_library(tmp_path, without=["test"])] == ["a/b.py", "z.py"]

    here = {document.source: document for document in standard_library(without=["test", "idlelib", "lib2to3"])}
    argparse = here["argparse.py"]
    assert isinstance(argparse, Document)
    assert argparse.text.encode() == Path(sysconfig.get_path("stdlib"), "argparse.py").read_bytes()
    assert "json/decoder.py" in here
    assert not any("site-packages" in source for source in here)
