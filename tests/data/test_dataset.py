import itertools
import struct
from pathlib import Path

import numpy as np
import pytest

from data.dataset import TokenDataset, check_ids, verify
from data.format import HEAD, FileRecord, Sidecar, checksum_of, file_of, index_parts, parse_index
from data.inspect import draw_lengths, inspect
from data.tokenizer import Tokenizer, train_tokenizer

LENGTHS_AT = HEAD.size
STARTS_AT = HEAD.size + 5 * 4
ENDS_AT = STARTS_AT + 5 * 8
SUFFIXES = (".bin", ".idx", ".tokenizer.json", ".json")


def put(path: Path, offset: int, new: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[offset : offset + len(new)] = new
    path.write_bytes(content)


def believe(prefix: Path, **changes: object) -> None:
    """Rewrites the sidecar so that its checksums hold for the files as they are: what is left to find is the contradiction itself."""
    sidecar = Sidecar.load(file_of(prefix, ".json"))
    files = {suffix: checksum_of(file_of(prefix, suffix)) for suffix in sidecar.files}
    fields = {name: getattr(sidecar, name) for name in sidecar.__dataclass_fields__}
    file_of(prefix, ".json").write_text(Sidecar(**{**fields, "files": files, **changes}).dump())


def test_reading(prefix: Path, folder: Path, tokenizer: Tokenizer) -> None:
    dataset = TokenDataset.open(prefix, checksums=True)
    texts = [(folder / f"{number}.txt").read_bytes().decode() for number in range(5)]
    assert [tokenizer.decode(dataset.tokens(number).tolist()[:-1]) for number in range(5)] == texts
    assert dataset.documents == 5
    assert dataset.token_count == dataset.lengths.sum() == dataset.offsets[-1] == dataset.stream.size
    assert (dataset.vocabulary, dataset.eod) == (300, 0)
    whole = dataset.tokens(4)
    assert whole.dtype == "int64"
    assert dataset.tokens(4, 3, 7).tolist() == whole[3:7].tolist()
    assert dataset.tokens(4, 3, 10**9).tolist() == whole[3:].tolist()
    with pytest.raises(ValueError, match="documents 0 to 4"):
        dataset.tokens(5)
    with pytest.raises(ValueError, match="read-only"):
        dataset.stream[0] = 1


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_missing_or_truncated_file_is_named(prefix: Path, suffix: str) -> None:
    path = file_of(prefix, suffix)
    content = path.read_bytes()
    for cut in (content[:-2], content + b"\0", b""):
        path.write_bytes(cut)
        with pytest.raises(ValueError, match=str(path)):
            TokenDataset.open(prefix)
    path.unlink()
    with pytest.raises(ValueError, match=f"{path}: no such file"):
        TokenDataset.open(prefix)


DAMAGED = {
    "magic": (0, b"X", r"starts with b'XMIDIDX"),
    "version": (9, struct.pack("<Q", 2), "index version 2, expected 1"),
    "dtype code without meaning": (17, b"\x63", r"dtype code 99, expected 8 \(uint16\) or 4 \(int32\)"),
    "dtype code of floats": (17, b"\x07", "dtype code 7"),
    "dtype code of the other width": (17, b"\x04", "sequence 1 starts at byte"),
    "count of sequences": (18, struct.pack("<Q", 4), "expected 130 for 4 sequences and 6 document ends"),
    "both counts": (18, struct.pack("<QQ", 4, 5), "expected 122 for 4 sequences"),
    "length": (LENGTHS_AT + 4, struct.pack("<i", 7), "sequence 2 starts at byte"),
    "zero length": (LENGTHS_AT + 4, struct.pack("<i", 0), "sequence 1 has length 0"),
    "last length": (LENGTHS_AT + 16, struct.pack("<i", 7), r"\(documents, tokens, bytes of .bin\)"),
    "pointer": (STARTS_AT + 8, struct.pack("<q", 2), "sequence 1 starts at byte 2"),
    "document end": (ENDS_AT + 16, struct.pack("<q", 3), "document end 2 is 3"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_wrong_index_says_what_is_wrong(prefix: Path, name: str) -> None:
    """Even when the checksum holds."""
    offset, new, message = DAMAGED[name]
    put(file_of(prefix, ".idx"), offset, new)
    believe(prefix)
    with pytest.raises(ValueError, match=message) as error:
        TokenDataset.open(prefix)
    assert str(file_of(prefix, ".idx")) in str(error.value)
    assert "\n" not in str(error.value)


def test_another_index_that_agrees_with_itself_is_refused_on_opening(prefix: Path) -> None:
    dataset = TokenDataset.open(prefix)
    swapped = dataset.lengths[[1, 0, 2, 3, 4]]
    file_of(prefix, ".idx").write_bytes(b"".join(index_parts(lambda: [swapped], dataset.stream.dtype)))
    with pytest.raises(ValueError, match=f"{file_of(prefix, '.idx')}: xxh3-128"):
        TokenDataset.open(prefix)


@pytest.mark.parametrize("suffix", [".idx", ".json"])
def test_every_flipped_byte_of_index_and_sidecar_is_refused_on_opening(prefix: Path, suffix: str) -> None:
    path = file_of(prefix, suffix)
    content = path.read_bytes()
    for at in range(len(content.rstrip())):
        put(path, at, bytes([content[at] ^ 1]))
        with pytest.raises(ValueError, match=str(prefix)):
            TokenDataset.open(prefix)
        path.write_bytes(content)
    TokenDataset.open(prefix)


@pytest.mark.parametrize("suffix", [".bin", ".tokenizer.json"])
def test_every_flipped_byte_of_the_others_is_refused_on_verifying(prefix: Path, suffix: str) -> None:
    path = file_of(prefix, suffix)
    content = path.read_bytes()
    for at in range(0, len(content), max(1, len(content) // 300)):
        put(path, at, bytes([content[at] ^ 1]))
        with pytest.raises(ValueError, match=f"{path}: xxh3-128"):
            verify(prefix)
        path.write_bytes(content)
    verify(prefix)


def test_verify_reads_the_tokens_themselves(prefix: Path) -> None:
    binary = file_of(prefix, ".bin")
    content = binary.read_bytes()
    dataset = TokenDataset.open(prefix)
    end = 2 * int(dataset.offsets[1])  # bytes up to the end of document 0

    for offset, new, message in (
        (0, struct.pack("<H", 300), "token 300, expected 0 to 299"),
        (0, struct.pack("<H", 0), "occurs 6 times, expected 5"),
        (end - 4, content[end - 2 : end] + content[end - 4 : end - 2], "document 0 ends with"),
    ):
        put(binary, offset, new)
        believe(prefix)
        with pytest.raises(ValueError, match=message):
            verify(prefix)
        binary.write_bytes(content)
    believe(prefix)
    check_ids(TokenDataset.open(prefix))


def test_sidecar_of_another_format_or_dtype_is_refused(prefix: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("data.format.SIDECAR_FORMAT", 3)
        with pytest.raises(ValueError, match="sidecar format 2, expected 3"):
            TokenDataset.open(prefix)
    believe(prefix, dtype="int32")
    with pytest.raises(ValueError, match="says uint16, .* says int32"):
        TokenDataset.open(prefix)
    for text in ("[]", "{}", '{"format": 1}', "\0"):
        file_of(prefix, ".json").write_text(text)
        with pytest.raises(ValueError, match="not a dataset sidecar"):
            TokenDataset.open(prefix)


def test_the_fingerprint_follows_tokens_boundaries_and_tokenizer(prefix: Path) -> None:
    sidecar = Sidecar.load(file_of(prefix, ".json"))
    seen = {sidecar.fingerprint}
    fields = {name: getattr(sidecar, name) for name in sidecar.__dataclass_fields__}
    for suffix in (".bin", ".idx"):
        seen.add(Sidecar(**{**fields, "files": {**sidecar.files, suffix: FileRecord(bytes=1, xxh3_128="0")}}).fingerprint)
    seen.add(Sidecar(**{**fields, "tokenizer_sha256": "0"}).fingerprint)
    seen.add(Sidecar(**{**fields, "eod": 7}).fingerprint)
    assert len(seen) == 5
    assert Sidecar(**{**fields, "tool": "another"}).fingerprint == sidecar.fingerprint


def test_inspect_is_a_page_of_text(prefix: Path, folder: Path) -> None:
    text = inspect(prefix, samples=5)
    parts = ("documents   5 ", "vocabulary  300 ", "left out    0 bad", "length below", "def attend(q, k, v)", "The literal <|endoftext|>")
    for part in parts:
        assert part in text
    for below, documents, tokens in TokenDataset.open(prefix).sidecar.length_histogram:
        assert f"{below:>14,} {documents:>12,} {tokens:>16,}" in text
    assert f"5 documents, {TokenDataset.open(prefix).token_count:,} tokens: {folder}" in text


def test_the_picture_is_a_picture(prefix: Path, tmp_path: Path) -> None:
    draw_lengths(prefix, tmp_path / "new" / "lengths.png")
    content = (tmp_path / "new" / "lengths.png").read_bytes()
    assert content.startswith(b"\x89PNG") and len(content) > 5_000


def test_another_tokenizer_is_refused(prefix: Path, tokenizer: Tokenizer) -> None:
    verify(prefix, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="made with another tokenizer"):
        verify(prefix, tokenizer=train_tokenizer(["others"], vocabulary=290))


def test_long_documents_are_several_sequences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An index says lengths in 31 bits; Megatron's reader finds the same documents."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    monkeypatch.setattr("data.format.LONGEST_SEQUENCE", 10)
    lengths = np.array([3, 10, 11, 35, 1, 20])
    halves = [lengths[:2], lengths[2:3], np.zeros(0, np.int64), lengths[3:]]
    path = tmp_path / "long.idx"
    path.write_bytes(b"".join(index_parts(lambda: halves, np.dtype(np.uint16))))
    dtype, read = parse_index(path.read_bytes(), path)
    assert (dtype, read.tolist()) == (np.uint16, lengths.tolist())
    np.arange(80, dtype=np.uint16).tofile(tmp_path / "long.bin")
    theirs = IndexedDataset(str(tmp_path / "long"))
    assert theirs.sequence_lengths.tolist() == [3, 10, 10, 1, 10, 10, 10, 5, 1, 10, 10]
    ends = theirs.document_indices.tolist()
    parts = [np.concatenate([theirs[sequence] for sequence in range(*pair)]) for pair in itertools.pairwise(ends)]
    assert [part.tolist() for part in parts] == [part.tolist() for part in np.split(np.arange(80), np.cumsum(lengths)[:-1])]
