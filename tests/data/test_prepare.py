import dataclasses
import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers

from data.dataset import TokenDataset, verify
from data.format import Sidecar, file_of, length_histogram
from data.prepare import prepare
from data.progress import Progress
from data.tokenizer import Tokenizer, load_tokenizer

SUFFIXES = (".bin", ".idx", ".tokenizer.json", ".json")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def contents(prefix: Path) -> dict[str, bytes]:
    return {suffix: file_of(prefix, suffix).read_bytes() for suffix in SUFFIXES}


def test_the_sidecar_tells_what_was_done(tmp_path: Path, folder: Path, tokenizer: Tokenizer) -> None:
    (folder / "5-same.txt").write_bytes((folder / "4.txt").read_bytes())
    (folder / "6-empty.txt").write_bytes(b"")
    (folder / "7-latin1.txt").write_bytes(b"un\ncaf\xe9")
    (folder / "8.jsonl").write_text(json.dumps({"text": "x"}) + "\n" + json.dumps({"text": ""}) + "\n")
    prefix = tmp_path / "out" / "set"
    sidecar = prepare([folder], tokenizer, prefix, quiet=True, skip_bad=True)

    texts = [(folder / f"{name}.txt").read_bytes().decode() for name in ("0", "1", "2", "3", "4", "5-same")] + ["x"]
    lengths = [len(ids) + 1 for ids in tokenizer.encode(texts)]
    dataset = TokenDataset.open(prefix)
    assert dataset.lengths.tolist() == lengths
    assert (sidecar.documents, sidecar.tokens, sidecar.empty, sidecar.duplicates) == (7, sum(lengths), 2, 2)
    assert (sidecar.bad, sidecar.skipped) == (1, (f"{folder}/7-latin1.txt:2: not UTF-8; convert the file to UTF-8, or leave it out",))
    assert [(source.given, source.documents, source.tokens) for source in sidecar.sources] == [(str(folder), 7, sum(lengths))]
    assert (sidecar.longest_document, sidecar.longest_tokens) == (f"{folder}/4.txt", max(lengths))
    assert (sidecar.vocabulary, sidecar.eod, sidecar.dtype) == (300, 0, "uint16")
    assert sidecar.tokenizer_sha256 == tokenizer.sha256
    assert file_of(prefix, ".tokenizer.json").read_bytes() == tokenizer.content
    assert sidecar.largest_token == dataset.stream.max()
    assert np.count_nonzero(dataset.stream == tokenizer.eod) == 7  # the literal <|endoftext|> in 2.txt is none of them
    assert sidecar.length_histogram == length_histogram(np.array(lengths))
    assert sum(row[1] for row in sidecar.length_histogram) == 7
    assert sum(row[2] for row in sidecar.length_histogram) == sum(lengths)
    assert Sidecar.load(file_of(prefix, ".json")) == sidecar
    assert names(prefix.parent) == ["set.bin", "set.idx", "set.json", "set.tokenizer.json"]
    verify(prefix)


def test_batches_do_not_show(tmp_path: Path, folder: Path, tokenizer: Tokenizer, prefix: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("data.reading.BATCH", "data.slices.SLICE", "data.encoder.ReferenceEncoder.batch"):
        monkeypatch.setattr(name, 1)
    prepare([folder], tokenizer, tmp_path / "small", quiet=True)
    assert contents(tmp_path / "small") == contents(prefix)


def test_histogram_bounds() -> None:
    assert length_histogram(np.array([1, 2, 3, 4, 1023, 1024])) == (
        (2, 1, 1),
        (4, 2, 5),
        (8, 1, 4),
        *((1 << e, 0, 0) for e in range(4, 10)),
        (1024, 1, 1023),
        (2048, 1, 1024),
    )


def test_the_same_work_is_not_done_twice_and_other_work_is_not_overwritten(
    folder: Path, tokenizer: Tokenizer, prefix: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    before = contents(prefix)
    with monkeypatch.context() as patch:
        patch.setattr(Tokenizer, "encode", lambda *_: pytest.fail("encoded again"))
        assert prepare([folder], tokenizer, prefix) == Sidecar.load(file_of(prefix, ".json"))
    assert "already prepared" in capfd.readouterr().err

    with pytest.raises(ValueError, match="another tokenizer"):
        prepare([folder], dataclasses.replace(tokenizer, eod=5), prefix, quiet=True)
    (folder / "3.txt").write_text("y")
    with pytest.raises(ValueError, match="from other texts"):
        prepare([folder], tokenizer, prefix, quiet=True)
    assert contents(prefix) == before
    prepare([folder], tokenizer, prefix, overwrite=True, quiet=True)
    assert contents(prefix) != before
    verify(prefix)


def test_what_stands_there_damaged_or_without_sidecar_is_refused(folder: Path, tokenizer: Tokenizer, prefix: Path) -> None:
    binary = file_of(prefix, ".bin")
    binary.write_bytes(b"\1" + binary.read_bytes()[1:])
    with pytest.raises(ValueError, match="damaged"):
        prepare([folder], tokenizer, prefix, quiet=True)
    file_of(prefix, ".json").unlink()
    with pytest.raises(ValueError, match=r"five.texts.bin, .* without a sidecar"):
        prepare([folder], tokenizer, prefix, quiet=True)
    prepare([folder], tokenizer, prefix, overwrite=True, quiet=True)
    verify(prefix)


def test_bad_input_leaves_nothing(tmp_path: Path, folder: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (folder / "z.jsonl").write_text('{"text": "a"}\n{"text": \n')
    monkeypatch.setattr("data.slices.SLICE", 1)  # so that text before the bad line is on disk already
    with pytest.raises(ValueError, match=r"z.jsonl:2: malformed JSON"):
        prepare([folder], tokenizer, out / "set", quiet=True)
    assert names(out) == []


def test_input_without_text_and_output_among_inputs_are_refused(tmp_path: Path, folder: Path, tokenizer: Tokenizer) -> None:
    empty = tmp_path / "empty"
    empty.write_bytes(b"")
    with pytest.raises(ValueError, match=r"no text to prepare \(1 empty"):
        prepare([empty], tokenizer, tmp_path / "set", quiet=True)
    with pytest.raises(ValueError, match="inside the input directory"):
        prepare([folder], tokenizer, folder / "set", quiet=True)
    assert not list(tmp_path.glob("*set*"))


def test_an_end_of_document_that_text_can_reach_is_refused(tmp_path: Path, folder: Path, tokenizer: Tokenizer) -> None:
    engine = tokenizers.Tokenizer.from_str(tokenizer.content.decode())
    engine.add_tokens(["softmax"])  # an added token, not marked as special
    (tmp_path / "tokenizer.json").write_text(engine.to_str())
    with pytest.raises(ValueError, match=r"0.txt: its text encodes to the end-of-document id 300 .*'softmax'"):
        prepare([folder], load_tokenizer(tmp_path, eod="softmax"), tmp_path / "out" / "set", quiet=True)
    assert names(tmp_path / "out") == []


@pytest.mark.parametrize("call", ["fsync", "rename"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_an_error_while_committing_leaves_no_dataset(
    folder: Path, tokenizer: Tokenizer, prefix: Path, call: str, overwrite: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when an older dataset was to be replaced: before the sidecar is gone it stays whole, after that nothing stays."""
    target = prefix if overwrite else prefix.with_name("new")
    before = names(prefix.parent)
    real, calls = getattr(os, call), []

    def full(*arguments: Any, **named: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments, **named)

    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match="No space left"):
        prepare([folder], tokenizer, target, overwrite=overwrite, quiet=True)
    monkeypatch.undo()
    assert len(calls) == 3
    assert names(prefix.parent) == ([] if overwrite and call == "rename" else before)
    if not overwrite or call == "fsync":
        verify(prefix)


SCRIPT = """
import resource, sys
from data.prepare import prepare
from data.tokenizer import load_tokenizer
inputs, tokenizer, prefix, limit = sys.argv[1:]
if int(limit):
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
try:
    prepare([inputs], load_tokenizer(tokenizer), prefix, quiet=True)
except OSError as error:
    print(type(error).__name__, error.errno)
    raise SystemExit(1)
"""


@pytest.fixture
def big(tmp_path: Path, tokenizer: Tokenizer) -> list[str]:
    """Arguments of SCRIPT: some 4 MB of text, about two seconds to encode."""
    (tmp_path / "tokenizer.json").write_bytes(tokenizer.content)
    with (tmp_path / "big.jsonl").open("w") as file:
        for number in range(4000):
            file.write(json.dumps({"text": f"document {number} " + "".join(chr(97 + (number * i) % 26) for i in range(1000))}) + "\n")
    (tmp_path / "out").mkdir()
    return [sys.executable, "-c", SCRIPT, str(tmp_path / "big.jsonl"), str(tmp_path), str(tmp_path / "out" / "set")]


@pytest.mark.parametrize("limit", [1_000_000, 20_000])
def test_a_full_disk_leaves_nothing(tmp_path: Path, big: list[str], limit: int) -> None:
    """No file may grow beyond the limit: the operating system itself refuses the write, in .bin (its buffer is 8 KiB or a batch)."""
    result = subprocess.run([*big, str(limit)], capture_output=True, text=True, timeout=200)
    assert (result.returncode, result.stdout.strip()) == (1, f"OSError {errno.EFBIG}"), result.stderr
    assert names(tmp_path / "out") == []


def test_plain_progress_lines_where_there_is_no_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    for quiet in (False, True):
        with Progress("prepare it", 2_000_000, every=0.0, quiet=quiet) as progress:
            progress.passed(500_000)
            progress.advance(1_000_000, 250_000)
    (line,) = capfd.readouterr().err.splitlines()
    assert re.fullmatch(r"prepare it: 1.5 of 2.0 MB, [0-9.]+ MB/s, [0-9,]+ tokens/s", line)
