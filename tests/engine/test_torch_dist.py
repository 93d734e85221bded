"""Our reading and writing of torch_dist folders against torch's and megatron-core's own."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from minimax_train.engine.session import Session
from minimax_train.engine.torch_dist import BACKENDS, Chunk, Reader, Stored, read_index, write_chunk, write_index


def test_backends_are_megatrons() -> None:
    from megatron.core.dist_checkpointing.core import CheckpointingConfig

    assert asdict(CheckpointingConfig("torch_dist")) == BACKENDS


def test_megatron_reads_what_is_written(tmp_path: Path, alone: Session) -> None:
    """Any boxes that fill a tensor, in any files; the same bytes whenever it is written."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import ShardedTensor

    x = torch.arange(4 * 6 * 5, dtype=torch.float32).view(4, 6, 5)
    v = torch.arange(7).bfloat16()
    boxes = [((0, 0, 0), (3, 2, 5)), ((0, 2, 0), (4, 4, 3)), ((0, 2, 3), (4, 4, 2)), ((3, 0, 0), (1, 2, 5))]
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        chunks = []
        for number, (low, size) in enumerate(boxes):
            name = f"__{number % 2}_0.distcp"
            with (tmp_path / folder / name).open("ab") as file:
                start = file.tell()
                write_chunk(file, x[tuple(slice(a, a + n) for a, n in zip(low, size, strict=True))].clone().contiguous())
                chunks.append(Chunk(offset=low, shape=size, file="".join(name), start=start, length=file.tell() - start))
        with (tmp_path / folder / "v.distcp").open("wb") as file:
            write_chunk(file, v)
            whole = Chunk(offset=(0,), shape=(7,), file="v.distcp", start=0, length=file.tell())
        stored = {
            "x": Stored(shape=(4, 6, 5), dtype=torch.float32, chunks=tuple(chunks)),
            "v": Stored(shape=(7,), dtype=torch.bfloat16, chunks=(whole,)),
        }
        write_index(tmp_path / folder, stored)
    contents = [{p.name: p.read_bytes() for p in (tmp_path / folder).iterdir()} for folder in ("one", "two")]
    assert contents[0] == contents[1]
    assert read_index(tmp_path / "one") == stored
    wanted = {name: ShardedTensor.from_rank_offsets(name, torch.zeros_like(tensor)) for name, tensor in (("x", x), ("v", v))}
    loaded = dist_checkpointing.load(wanted, str(tmp_path / "one"))
    assert torch.equal(loaded["x"], x) and torch.equal(loaded["v"], v)
    with Reader(tmp_path / "one") as reader:
        for expert in range(4):
            for first in range(6):
                for end in range(first + 1, 7):
                    assert torch.equal(reader.rows("x", stored["x"], (expert,), first, end), x[expert, first:end])
        assert torch.equal(reader.rows("v", stored["v"], (), 2, 6), v[2:6, None])
        short = Stored(shape=(4, 6, 5), dtype=torch.float32, chunks=tuple(chunks[:2]))
        with pytest.raises(ValueError, match="holds only 9 of the 15 numbers of x, rows 3 to 5"):
            reader.rows("x", short, (1,), 3, 6)


def test_the_index_is_torchs(tmp_path: Path, alone: Session) -> None:
    """Of a checkpoint that megatron-core wrote: every tensor, box and place that torch's reader finds, and no pickle is trusted for it."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import ShardedTensor
    from torch.distributed.checkpoint import FileSystemReader

    tensors = {"a": torch.randn(6, 4), "b": torch.randn(5).bfloat16(), "c": torch.randn(2, 3, 4)}
    (tmp_path / "c").mkdir()
    state = {name: ShardedTensor.from_rank_offsets(name, tensor) for name, tensor in tensors.items()}
    dist_checkpointing.save(state, str(tmp_path / "c"), ("torch_dist", 1))
    ours, theirs = read_index(tmp_path / "c"), FileSystemReader(str(tmp_path / "c")).read_metadata()
    assert json.loads((tmp_path / "c" / "metadata.json").read_text()) == BACKENDS
    assert ours.keys() == theirs.state_dict_metadata.keys() == tensors.keys()
    places = {(place.fqn, tuple(place.offset)): info for place, info in theirs.storage_data.items()}
    with Reader(tmp_path / "c") as reader:
        for name, tensor in tensors.items():
            stored, expected = ours[name], theirs.state_dict_metadata[name]
            assert (stored.shape, stored.dtype) == (tuple(expected.size), expected.properties.dtype)
            assert [(c.offset, c.shape) for c in stored.chunks] == [(tuple(c.offsets), tuple(c.sizes)) for c in expected.chunks]
            for chunk in stored.chunks:
                info = places[name, chunk.offset]
                assert (chunk.file, chunk.start, chunk.length) == (info.relative_path, info.offset, info.length)
            if tensor.dim() == 2:
                assert torch.equal(reader.rows(name, stored, (), 1, 5), tensor[1:5])
