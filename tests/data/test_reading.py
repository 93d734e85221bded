"""Every input format gives the same documents, whatever the sizes of slices, blocks and lines; what is bad is named by its place."""

import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from data import long_line, reading, slices
from data.corpus import find_sources
from data.long_line import BadText, _whole, read_string
from data.place import Place, names_of
from data.reading import Bad, Batch, LongText, read
from data.slices import cut

TEXTS = [
    "",
    "one\nline",
    "zwei ü 文書 😀",
    'quotes " and \\ and \\" \\\\',
    "\u2028\x00\t",
    "x" * 300,
    "é" * 90 + '"' * 90 + "\\" * 91,
    "end",
]


def documents(path: Path | str, *, key: str = "text") -> tuple[list[str], list[str]]:
    """Texts and names of what a corpus holds. Bad documents are named too, with what is wrong."""
    texts, names = [], []
    room = Path(str(path) + ".room") if not str(path).endswith("*") else Path(path).parent.with_suffix(".room")
    room.mkdir(exist_ok=True)
    for piece in cut(find_sources([path]), key=key, room=room):
        for record in read(piece, key):
            if isinstance(record, Batch):
                texts += record.texts
                names += names_of(record.places)
            elif isinstance(record, LongText):
                try:
                    texts.append("".join(record.pieces))
                    names.append(record.place.name())
                except BadText as error:
                    names.append(f"{record.place.name()}: {error}")
            else:
                names.append(f"{record.place.name()}: {record.why}")
        for file in piece.unpacked:
            file.unlink()
    assert list(room.iterdir()) == []
    return texts, names


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Makes slices, blocks and the longest line some `size` bytes."""

    def make(size: int) -> None:
        for module, names in ((slices, ("SLICE", "BLOCK")), (reading, ("BATCH", "BLOCK")), (long_line, ("BLOCK",))):
            for name in names:
                monkeypatch.setattr(module, name, size)
        monkeypatch.setattr(reading, "LONG", 2 * size)
        monkeypatch.setattr(long_line, "SHORT", max(size, 16))  # keys are never longer

    return make


def write_lines(path: Path, rows: list[dict[str, Any]], *, end: str = "\n", escape: bool = False) -> None:
    path.write_bytes("".join(json.dumps(row, ensure_ascii=escape) + end for row in rows).encode())


@pytest.mark.parametrize("size", [1, 7, 64, 1000, 1 << 20])
@pytest.mark.parametrize("escape", [False, True])
@pytest.mark.parametrize("codec", ["", ".gz", ".zst"])
def test_lines_whatever_the_sizes(tmp_path: Path, small: Callable[[int], None], size: int, escape: bool, codec: str) -> None:
    rows = [{"id": number, "text": text, "more": ["text", {"text": text}]} for number, text in enumerate(TEXTS)]
    file = tmp_path / "d.jsonl"
    write_lines(file, rows, end="\r\n\n", escape=escape)
    content = file.read_bytes()[:-3]  # no line feed at the end
    if codec:
        file = Path(f"{file}{codec}")
        with pa.CompressedOutputStream(pa.OSFile(str(file), "wb"), {".gz": "gzip", ".zst": "zstd"}[codec]) as packed:
            packed.write(content)
    else:
        file.write_bytes(content)
    small(size)
    assert documents(file) == (TEXTS, [f"{file}:{2 * number + 1}" for number in range(len(TEXTS))])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(texts=st.lists(st.text(), max_size=8), size=st.integers(1, 80), blank=st.booleans(), escape=st.booleans())
@example(texts=["\x00long 0", "\x00long ", "x" * 99], size=1, blank=False, escape=False)  # what stands for a long string inside
def test_any_lines(tmp_path: Path, small: Callable[[int], None], texts: list[str], size: int, blank: bool, escape: bool) -> None:
    file = tmp_path / "any.jsonl"
    write_lines(file, [{"text": text} for text in texts], end="\n\n" if blank else "\n", escape=escape)
    small(size)
    assert documents(file) == (texts, [f"{file}:{number * (1 + blank) + 1}" for number in range(len(texts))])


@given(text=st.text(alphabet=st.sampled_from('a\\"\n\x00ü文😀/u'), max_size=40), cut_at=st.integers(0, 400), escape=st.booleans())
def test_a_json_string_is_cut_between_characters(text: str, cut_at: int, escape: bool) -> None:
    content = json.dumps(text, ensure_ascii=escape)[1:-1].encode()
    end = _whole(content[:cut_at])
    assert end > cut_at - 13 or end >= len(content) - 12
    parts = [json.loads(b'"' + part + b'"') for part in (content[:end], content[end:])]
    assert "".join(parts) == text
    assert all(not part or not "\ud800" <= part[-1] <= "\udbff" for part in parts)


BAD_LINES = [
    (b'{"text": "a"', "malformed JSON"),
    (b'{"content": "a"}', "no key 'text'; the line has 'content'"),
    (b'["text"]', "a JSON list"),
    (b"7", "a JSON int"),
    (b'{"text": null}', "'text' is a NoneType"),
    (b'{"text": "\xff"}', "not UTF-8 at byte 10"),
    (b'{"text": "\\ud800"}', "lone surrogate"),
    (b"[" * 100_000, "malformed JSON"),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES)
@pytest.mark.parametrize("size", [1, 30, 1 << 20])
def test_a_bad_line_is_named_by_file_and_line(tmp_path: Path, small: Callable[[int], None], line: bytes, message: str, size: int) -> None:
    if size < 30 and len(line) > 1000:
        pytest.skip("a line of brackets is no long string: 100,000 slices of one byte")
    file = tmp_path / "d.jsonl"
    file.write_bytes(b'{"text": "fine"}\n\n' + line + b'\n{"text": "fine too"}\n')
    small(size)
    texts, names = documents(file)
    assert texts == ["fine", "fine too"]
    assert [name.split(": ")[0] for name in names] == [f"{file}:1", f"{file}:3", f"{file}:4"]
    assert "\n" not in names[1]
    if size > 16 or "UTF-8" not in message:  # a long string says so in the words of its own reader
        assert message in names[1] or (size == 1 and "not a JSON string" in names[1]), names[1]


def test_valid_json_that_the_fast_parser_refuses_is_read_all_the_same(tmp_path: Path) -> None:
    file = tmp_path / "d.jsonl"
    file.write_text('{"text": "a", "score": NaN}\n{"text": "b"}\n')
    assert documents(file)[0] == ["a", "b"]


def test_text_files(tmp_path: Path, small: Callable[[int], None]) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    texts = ["\ufeffa\r\nb\r", "", "ü" * 500, "c\n"]
    for number, text in enumerate(texts):
        (folder / f"{number}.txt").write_bytes(text.encode())
    (folder / "4.txt.gz").write_bytes(gzip.compress("packed ü".encode()))
    (folder / "5.txt").write_bytes(b"one\ntwo caf\xe9")
    for size in (1 << 20, 100, 1):
        small(size)
        found, names = documents(folder)
        assert found == [*texts, "packed ü"]
        assert names[:5] == [f"{folder}/{name}" for name in ("0.txt", "1.txt", "2.txt", "3.txt", "4.txt.gz")]
        assert "5.txt" in names[5] and "not UTF-8" in names[5] and ("5.txt:2:" in names[5] or "line 2" in names[5])


@pytest.mark.parametrize("codec", ["gzip", "zstd"])
@pytest.mark.parametrize("damage", ["cut", "other"])
def test_damaged_packed_files_are_refused(tmp_path: Path, codec: str, damage: str) -> None:
    file = tmp_path / f"d.jsonl.{ {'gzip': 'gz', 'zstd': 'zst'}[codec] }"
    with pa.CompressedOutputStream(pa.OSFile(str(file), "wb"), codec) as packed:
        packed.write(b"".join(json.dumps({"text": str(random.random())}).encode() + b"\n" for _ in range(1000)))
    file.write_bytes(file.read_bytes()[:-9] if damage == "cut" else b"this is no packed file at all")
    with pytest.raises(ValueError, match=f"{file}: damaged {codec} file"):
        documents(file)


@pytest.mark.parametrize("rows", [1, 3, 100])
def test_parquet(tmp_path: Path, small: Callable[[int], None], rows: int) -> None:
    file = tmp_path / "d.parquet"
    texts = [*TEXTS, None, *TEXTS]
    table = pa.table({"nested": [{"text": "no"}] * len(texts), "text": pa.array(texts, pa.large_string())})
    parquet.write_table(table, file, row_group_size=rows)
    for size in (1 << 20, 50):
        small(size)
        found, names = documents(file)
        assert found == [*TEXTS, *TEXTS]
        assert names == [f"{file}:{n}" + (": 'text' is a NoneType, not a string" if n == 9 else "") for n in range(1, 18)]
    with pytest.raises(ValueError, match="no column 'body'; it has 'nested', 'text'"):
        documents(file, key="body")
    with pytest.raises(ValueError, match="column 'nested' holds struct"):
        documents(file, key="nested")
    content = file.read_bytes()
    footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    for damaged in (content[:-20], b"text", content[:4] + b"\xff" * (footer - 4) + content[footer:]):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{file}: (not a Parquet|damaged)"):
            documents(file)


def test_saved_datasets(tmp_path: Path, small: Callable[[int], None]) -> None:
    import datasets

    made = datasets.Dataset.from_dict({"text": TEXTS * 3, "n": list(range(24))})
    made.save_to_disk(str(tmp_path / "plain"), num_shards=2)
    shuffled = made.shuffle(seed=1)
    shuffled.save_to_disk(str(tmp_path / "shuffled"))
    for size in (1 << 20, 40):
        small(size)
        assert documents(tmp_path / "plain") == (TEXTS * 3, [f"{tmp_path}/plain:{row}" for row in range(1, 25)])
        assert documents(tmp_path / "shuffled")[0] == shuffled["text"][:]
    with pytest.raises(ValueError, match="no column 'body'"):
        documents(tmp_path / "plain", key="body")
    with pytest.raises(ValueError, match="column 'n' holds int64"):
        documents(tmp_path / "plain", key="n")
    datasets.DatasetDict({"train": made, "test": made}).save_to_disk(str(tmp_path / "splits"))
    with pytest.raises(ValueError, match=f"several splits; name those you want: {tmp_path}/splits/test, {tmp_path}/splits/train"):
        documents(tmp_path / "splits")
    assert len(documents(tmp_path / "splits" / "train")[0]) == 24
    (tmp_path / "plain" / "state.json").write_text("{")
    with pytest.raises(ValueError, match="not a saved dataset"):
        documents(tmp_path / "plain")


def test_a_line_too_long_besides_its_texts_is_refused(
    tmp_path: Path, small: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "d.jsonl"
    write_lines(file, [{"text": "a" * 500, "numbers": list(range(1000))}, {"text": "b"}])
    small(50)
    assert documents(file)[0] == ["a" * 500, "b"]
    monkeypatch.setattr(long_line, "MOST", 200)
    texts, names = documents(file)
    assert texts == ["b"] and names[0].startswith(f"{file}:1: a line with more than")


def test_a_file_cut_short_meanwhile_ends_reading(tmp_path: Path) -> None:
    path = tmp_path / "s"
    path.write_bytes(b"abc")
    assert "".join(read_string(path, (0, 10))) == "abc"


def test_names_count_lines_once(tmp_path: Path) -> None:
    path = tmp_path / "l"
    path.write_text("a\nb\nc\nd\n")
    places = [Place(path=str(path), offset=offset, number=1, unit="line") for offset in (6, 0, 2, 6)]
    assert names_of([*places, Place(path="whole")]) == [f"{path}:4", f"{path}:1", f"{path}:2", f"{path}:4", "whole"]


def test_slices_depend_on_the_input_only(tmp_path: Path, small: Callable[[int], None]) -> None:
    file = tmp_path / "d.jsonl.gz"
    file.write_bytes(gzip.compress(b"".join(json.dumps({"text": text}).encode() + b"\n" for text in TEXTS * 20)))
    small(2000)
    (tmp_path / "room").mkdir()
    pieces = list(cut(find_sources([file]), key="text", room=tmp_path / "room", wanted=lambda number: number != 1))
    assert len(pieces) > 3 and not pieces[1].unpacked and pieces[1].parts[0].file is None
    assert [piece.number for piece in pieces] == list(range(len(pieces)))
    assert sum(piece.size for piece in pieces) == file.stat().st_size
    again = list(cut(find_sources([file]), key="text", room=tmp_path / "room"))
    assert [[(part.lines, part.stop) for part in piece.parts] for piece in pieces] == [
        [(part.lines, part.stop) for part in piece.parts] for piece in again
    ]
    bad = [record for piece in again for record in read(piece, "text") if isinstance(record, Bad)]
    assert not bad
