"""Token files of Megatron's own tool become a dataset: what they lack, the sidecar and the tokenizer, is put beside them."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.commit import staged, sync
from data.dataset import TokenDataset, check_ids
from data.format import FileRecord, Sidecar, checksum_of, file_of, length_histogram, parse_index
from data.tokenizer import Tokenizer


def adopt(prefix: str | Path, tokenizer: Tokenizer) -> Sidecar:
    """Reads PREFIX.bin and .idx throughout and writes PREFIX.json and the tokenizer beside them; neither is changed.

    Documents without a sequence (empty texts) are counted and are no documents of ours. End-of-document ids inside documents, which the
    usual tools make of special tokens written in the text, are counted and kept: boundaries are the index's. Raises ValueError when there
    is a sidecar already, an id is not in the tokenizer's vocabulary, or a document does not end with the end-of-document id.
    """
    prefix = Path(prefix)
    index, binary, side = (file_of(prefix, suffix) for suffix in (".idx", ".bin", ".json"))
    for path in (index, binary):
        if not path.is_file():
            raise ValueError(f"{path}: no such file; adopted are Megatron's PREFIX.bin and PREFIX.idx")
    if side.exists():
        raise ValueError(f"{side}: is there already, so the files need no adoption; remove it to adopt them anew")
    dtype, lengths = parse_index(index.read_bytes(), index)
    if int(lengths.sum()) * dtype.itemsize != binary.stat().st_size:
        raise ValueError(f"{binary}: {binary.stat().st_size} bytes, expected {int(lengths.sum()) * dtype.itemsize} by {index}: truncated")
    kept = lengths[lengths > 0]
    if not len(kept):
        raise ValueError(f"{index}: no document holds a token")
    stream = np.asarray(np.memmap(binary, dtype=dtype, mode="r"))
    with staged(prefix) as folder:
        copy = folder / f"tokenizer{tokenizer.suffix}"
        copy.write_bytes(tokenizer.content)
        sidecar = _sidecar(prefix, kept, len(lengths) - len(kept), stream, tokenizer, checksum_of(copy))
        check_ids(TokenDataset(prefix, sidecar, kept, stream))
        (folder / "side").write_text(sidecar.dump())
        for path in (copy, folder / "side"):
            sync(path)
        copy.rename(file_of(prefix, tokenizer.suffix))
        (folder / "side").rename(side)
        sync(prefix.parent)
    return sidecar


def _sidecar(
    prefix: Path, lengths: NDArray[np.int64], empty: int, stream: NDArray[Any], tokenizer: Tokenizer, copied: FileRecord
) -> Sidecar:
    blocks = TokenDataset(prefix, None, lengths, stream).blocks()  # type: ignore[arg-type] # blocks need no sidecar
    largest, ends = -1, 0
    for block in blocks:
        largest, ends = max(largest, int(block.max())), ends + int(np.count_nonzero(block == tokenizer.eod))
    if ends < len(lengths):
        raise ValueError(
            f"{prefix}.bin: end-of-document id {tokenizer.eod} ({tokenizer.eod_token}) occurs {ends} times in {len(lengths)} documents; "
            "name the right end-of-document token, or prepare the texts again (Megatron's tool ends documents with --append-eod)"
        )
    longest = int(lengths.argmax())
    return Sidecar(
        tool="adopted",
        source="",
        tokenizer_sha256=tokenizer.sha256,
        vocabulary=tokenizer.vocabulary,
        eod=tokenizer.eod,
        eod_token=tokenizer.eod_token,
        dtype=stream.dtype.name,
        documents=len(lengths),
        tokens=len(stream),
        largest_token=largest,
        empty=empty,
        duplicates=0,
        skipped=(),
        longest_document=f"document {longest}",
        longest_tokens=int(lengths[longest]),
        length_histogram=length_histogram(lengths),
        files={**{suffix: checksum_of(file_of(prefix, suffix)) for suffix in (".bin", ".idx")}, tokenizer.suffix: copied},
        inner_ends=ends - len(lengths),
    )
