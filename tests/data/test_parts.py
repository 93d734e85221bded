"""A dataset prepared in parts, as the tasks of a job array do: byte for byte what one call writes."""

import fcntl
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from data.dataset import verify
from data.format import file_of
from data.parts import Share, folder_of, share_of
from data.prepare import prepare, prepare_part
from data.tokenizer import Tokenizer
from minimax_train.cli import main

OPTIONS: dict[str, Any] = {"quiet": True, "encoder": "reference"}


def contents(prefix: Path) -> dict[str, bytes]:
    return {suffix: file_of(prefix, suffix).read_bytes() for suffix in (".bin", ".idx", ".tokenizer.json", ".json")}


@pytest.fixture
def inputs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Texts, packed lines and a table: many slices, of every kind."""
    monkeypatch.setattr("data.slices.SLICE", 60)
    monkeypatch.setattr("data.prepare.WORTH_IT", 0)
    rows = [{"text": f"number {number} of the rows"} for number in range(9)]
    with pa.CompressedOutputStream(pa.OSFile(str(folder / "more.jsonl.zst"), "wb"), "zstd") as file:
        file.write(b"".join(json.dumps(row).encode() + b"\n" for row in rows))
    parquet.write_table(pa.Table.from_pylist(rows), folder.parent / "table.parquet", row_group_size=2)
    return [folder, folder.parent / "table.parquet"]


@pytest.mark.parametrize("count", [1, 3, 60])
def test_byte_for_byte(inputs: list[Path], tokenizer: Tokenizer, tmp_path: Path, count: int) -> None:
    """In any order, with any number of workers, also where there are more parts than slices; nothing else stays."""
    prepare(inputs, tokenizer, tmp_path / "one" / "all", **OPTIONS)
    prefix = tmp_path / "many" / "all"
    numbers = [n for n in range(count, 0, -1) if n <= 4 or n == count]  # the others' slices are encoded at the end
    made = [prepare_part(inputs, tokenizer, prefix, Share(number=n, count=count), workers=1 + n % 2, **OPTIONS) for n in numbers]
    assert {facts.number % count for part in made for facts in part} <= {n - 1 for n in numbers}
    assert not file_of(prefix, ".json").exists()
    prepare(inputs, tokenizer, prefix, parts=count, **OPTIONS)
    assert contents(prefix) == contents(tmp_path / "one" / "all")
    assert not [path for path in prefix.parent.iterdir() if path.name.startswith(".")]
    verify(prefix, tokenizer=tokenizer)


def test_nothing_is_encoded_twice(inputs: list[Path], tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part called again keeps what it has, and so does the last call."""
    prefix = tmp_path / "all"
    shares = [Share(number=1, count=2), Share(number=2, count=2)]
    before = [prepare_part(inputs, tokenizer, prefix, share, **OPTIONS) for share in shares]

    def again(*_: Any, **__: Any) -> None:
        raise AssertionError("encoded again")

    monkeypatch.setattr("data.prepare.write_shard", again)
    assert [prepare_part(inputs, tokenizer, prefix, share, **OPTIONS) for share in shares] == before
    prepare(inputs, tokenizer, prefix, parts=2, **OPTIONS)


def test_a_damaged_or_missing_part(inputs: list[Path], tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What a part lacks, or holds damaged, is encoded by the last call, which says so."""
    prepare(inputs, tokenizer, tmp_path / "one", **OPTIONS)
    share = Share(number=2, count=3)
    prepare_part(inputs, tokenizer, tmp_path / "many", share, **OPTIONS)
    damaged = next(folder_of(tmp_path / "many", share).glob("*.ids"))
    damaged.write_bytes(bytes(reversed(damaged.read_bytes())))
    prepare(inputs, tokenizer, tmp_path / "many", parts=3, **{**OPTIONS, "quiet": False})
    assert contents(tmp_path / "many") == contents(tmp_path / "one")
    assert "part-1-of-3: no such part" in capsys.readouterr().err


def test_a_part_of_other_work(inputs: list[Path], tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Made from other inputs: not taken over."""
    prepare_part(inputs[1:], tokenizer, tmp_path / "many", Share(number=1, count=2), **OPTIONS)
    prepare(inputs, tokenizer, tmp_path / "many", parts=2, **OPTIONS)
    prepare(inputs, tokenizer, tmp_path / "one", **OPTIONS)
    assert contents(tmp_path / "many") == contents(tmp_path / "one")


def test_refused(inputs: list[Path], tokenizer: Tokenizer, tmp_path: Path) -> None:
    """While a process is at a part; where the dataset stands; parts that are none."""
    prefix, share = tmp_path / "all", Share(number=1, count=2)
    prepare_part(inputs, tokenizer, prefix, share, **OPTIONS)
    with (folder_of(prefix, share) / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another process is preparing"):
            prepare_part(inputs, tokenizer, prefix, share, **OPTIONS)
        with pytest.raises(ValueError, match="another process is preparing this part"):
            prepare(inputs, tokenizer, prefix, parts=2, **OPTIONS)
    prepare(inputs, tokenizer, prefix, parts=2, **OPTIONS)
    with pytest.raises(ValueError, match="stands there already"):
        prepare_part(inputs, tokenizer, prefix, share, **OPTIONS)
    assert prepare_part(inputs, tokenizer, prefix, share, overwrite=True, **OPTIONS)
    for text in ("0/2", "3/2", "1", "1/2/3", "-1/2", "1/20000", "a/b", "1/2\n", "²/3"):
        with pytest.raises(ValueError, match="1 <= K <= N"):
            share_of(text)


def test_on_the_command_line(inputs: list[Path], tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tokenizer.json").write_bytes(tokenizer.content)
    words = ["data", "prepare", *map(str, inputs), "--tokenizer", str(tmp_path / "tokenizer.json"), "--encoder", "reference"]
    one, many = (["--to", str(tmp_path / name / "all")] for name in ("one", "many"))
    assert main([*words, *one]) == main([*words, *many, "--part", "1/2"]) == main([*words, *many, "--part", "2/2"]) == 0
    assert "part 2/2" in capsys.readouterr().out
    assert main([*words, *many, "--parts", "2"]) == 0
    assert contents(tmp_path / "one" / "all") == contents(tmp_path / "many" / "all")
    for wrong in (["--part", "3/2"], ["--parts", "0"], ["--parts", "2", "--part", "1/2"]):
        assert main([*words, "--to", str(tmp_path / "other"), *wrong]) == 2
