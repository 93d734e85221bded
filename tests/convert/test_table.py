"""The table against the model itself, and the pieces that conversion reads and writes."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minimax_train.convert import pieces as cutting
from minimax_train.convert.pieces import column_parts, matrix, pieces, ranks_of
from minimax_train.convert.shards import plan_shards
from minimax_train.convert.table import Entry, by_part, is_decay_buffer, table, tensor_count
from minimax_train.engine.session import Session
from minimax_train.engine.stage import bare, build_stage
from minimax_train.model.config import text01
from minimax_train.model.parts import cuts_of, whole_shape
from parallel.layout import Layout
from tests.support import little_model


def test_names_shapes_and_cuts_are_the_models(alone: Session) -> None:
    """Every parameter, in fp32 exactly where the model keeps it so, cut along the axis along which tensor-parallel ranks cut it."""
    model = bare(build_stage(little_model(), alone, dtype="bf16", seed=None))
    entries = {entry.name: entry for entry in table(little_model())}
    parameters = dict(model.named_parameters())
    assert entries.keys() == parameters.keys()
    for name, parameter in parameters.items():
        entry, cuts = entries[name], cuts_of(parameter)
        assert entry.shape == whole_shape(parameter)
        assert entry.fp32 == (parameter.dtype == torch.float32), name
        mine = cuts[-1] if cuts else None  # of experts the first cut is the one over experts
        assert (entry.cut, entry.matrices) == ((mine.axis, mine.matrices) if mine else (None, 1)), name


def test_names_in_memory_are_transformers() -> None:
    from transformers import MiniMaxConfig, MiniMaxForCausalLM

    from minimax_train.convert.config import write_config

    config = little_model()
    raw = write_config(config, 1e4, "minimax", "float32", 64)
    theirs = MiniMaxForCausalLM(MiniMaxConfig(**{k: v for k, v in raw.items() if k != "model_type"})).state_dict()
    ours = {part.name: part.shape for entry in table(config, "memory") for part in entry.parts}
    assert [(entry.name, entry.cut, entry.matrices) for entry in table(config)] == [
        (entry.name, entry.cut, entry.matrices) for entry in table(config, "memory")
    ]
    assert ours == {name: tuple(tensor.shape) for name, tensor in theirs.items() if not is_decay_buffer(name)}
    assert len(ours) < len(theirs)


@pytest.mark.parametrize("config", [text01(), little_model(), little_model(num_experts=2, num_layers=8)])
def test_count(config: object) -> None:
    assert tensor_count(config) == len(by_part(table(config)))  # type: ignore[arg-type]


def test_the_releases_tensors() -> None:
    """8,243 tensors, 912,210,767,872 bytes with bf16 weights and fp32 routers, 413 files: the released index, to the byte."""
    parts = [(part, entry.fp32) for entry in table(text01()) for part in entry.parts]
    assert len(parts) == len({part.name for part, _ in parts}) == 8243
    sizes = [math.prod(part.shape) * (4 if fp32 else 2) for part, fp32 in parts]
    assert sum(sizes) == 912_210_767_872
    assert len(plan_shards(sizes)) == 413


@given(st.lists(st.integers(1, 50), min_size=1, max_size=60), st.integers(1, 120))
def test_shards_are_runs_of_nearly_equal_bytes(sizes: list[int], shard_bytes: int) -> None:
    """Every tensor once, in order; no file empty; none more than the largest tensor over what was asked for."""
    runs = plan_shards(sizes, shard_bytes)
    assert [i for run in runs for i in run] == list(range(len(sizes)))
    assert all(len(run) for run in runs)
    if len(runs) < len(sizes):
        assert max(sum(sizes[i] for i in run) for run in runs) <= shard_bytes + max(sizes)


@given(
    st.sampled_from([(1, 1, 1, "disk"), (2, 1, 1, "disk"), (2, 2, 2, "disk"), (1, 4, 4, "memory"), (4, 1, 2, "memory")]),
    st.sampled_from([1, 70, 500, 10**6]),
)
def test_pieces_fill_every_parameter_and_stay_inside_a_ranks_part(layout: tuple[int, int, int, str], most: int) -> None:
    """Piece by piece and column part by column part, a count of 1 everywhere in the whole; and each box lies in one rank's part."""
    tensor, expert, slices, stacking = layout
    degrees = Layout(tensor=tensor, expert=expert, expert_tensor=slices)
    before, cutting.MOST_BYTES = cutting.MOST_BYTES, most
    try:
        for entry in table(little_model(num_layers=4, vocab_size=20), stacking):  # type: ignore[arg-type]
            count = torch.zeros(entry.shape)
            ranks = ranks_of(entry, degrees)
            for part in entry.parts:
                rows = 0
                for piece in pieces(entry, part, 4, ranks):
                    assert piece.first == rows
                    rows = piece.end
                    width = matrix(part.shape)[1] // column_parts(entry, ranks)
                    assert (piece.end - piece.first == 1) or (piece.end - piece.first) * matrix(part.shape)[1] * 4 <= most
                    for number in range(column_parts(entry, ranks)):
                        low, size = list(piece.offset), list(piece.box)
                        if len(entry.shape) > 1:
                            low[-1], size[-1] = number * width, width
                        count[tuple(slice(a, a + n) for a, n in zip(low, size, strict=True))] += 1
                        assert _owners(entry, ranks, low, size) == 1, (entry.name, low, size)
                        assert len(size) < 3 or size[0] == 1  # so of one expert, whatever the expert ranks
                assert rows == matrix(part.shape)[0]
            assert (count == 1).all(), entry.name
    finally:
        cutting.MOST_BYTES = before


def _owners(entry: Entry, ranks: int, low: list[int], size: list[int]) -> int:
    """How many parts of ranks a box touches."""
    if entry.cut is None:
        return 1
    height = entry.shape[entry.cut] // entry.matrices // ranks
    return (low[entry.cut] + size[entry.cut] - 1) // height - low[entry.cut] // height + 1
