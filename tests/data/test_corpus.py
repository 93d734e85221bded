import json
import sysconfig
from pathlib import Path

import pytest

from data.corpus import Document, Undecodable, find_files, read_documents, standard_library


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


def test_text_is_taken_byte_for_byte_and_other_encodings_are_reported(tmp_path: Path) -> None:
    (tmp_path / "crlf.txt").write_bytes(b"\xef\xbb\xbfa\r\nb\r")
    (tmp_path / "latin1.txt").write_bytes(b"caf\xe9")
    documents = list(read_documents(find_files([tmp_path])))
    assert documents == [
        Document(source=str(tmp_path / "crlf.txt"), text="\ufeffa\r\nb\r", size=8),
        Undecodable(source=str(tmp_path / "latin1.txt"), size=4),
    ]


def test_jsonl_gives_a_document_per_line(tmp_path: Path) -> None:
    file = tmp_path / "d.jsonl"
    lines = [json.dumps({"body": "one\nline", "text": 3}), "", json.dumps({"body": "zwei ü"}, ensure_ascii=False)]
    file.write_text("\n".join(lines))
    documents = [document for document in read_documents([file], key="body") if isinstance(document, Document)]
    assert [(document.source, document.text) for document in documents] == [(f"{file}:1", "one\nline"), (f"{file}:3", "zwei ü")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a"', "malformed JSON"),
        (b'{"content": "a"}', "no key 'text'; the line has 'content'"),
        (b'["text"]', "a JSON list"),
        (b'{"text": null}', "'text' is a NoneType"),
        (b'{"text": "\xff"}', "not UTF-8 at byte 10"),
        (b'{"text": "\\ud800"}', "lone surrogate"),
    ],
)
def test_a_bad_jsonl_line_is_named_by_file_and_line(tmp_path: Path, line: bytes, message: str) -> None:
    file = tmp_path / "d.jsonl"
    file.write_bytes(b'{"text": "fine"}\n\n' + line + b"\n")
    with pytest.raises(ValueError, match=message) as error:
        list(read_documents([file]))
    assert str(error.value).startswith(f"{file}:3: ")
    assert "\n" not in str(error.value)


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
