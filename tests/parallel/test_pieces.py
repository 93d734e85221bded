"""Pieces: who holds which tokens of a packed row. Pure arithmetic against a table made token by token."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from parallel.pieces import Pieces, balanced, cut_row, zigzag
from parallel.states import state_flow
from tests.parallel.packings import ROWS, TOKENS, packings

RANKS = (1, 2, 4, 8)


def document_of(bounds: tuple[int, ...]) -> list[int]:
    return [d for d, (a, b) in enumerate(itertools.pairwise(bounds)) for _ in range(b - a)]


def shuffled_owners(ranks: int, seed: int) -> tuple[int, ...]:
    order = torch.randperm(2 * ranks, generator=torch.Generator().manual_seed(seed)).tolist()
    return tuple(piece // 2 for piece in order)


def test_zigzag() -> None:
    assert zigzag(1) == (0,)
    assert zigzag(2) == (0, 1, 1, 0)
    assert zigzag(4) == (0, 1, 2, 3, 3, 2, 1, 0)


@given(bounds=packings(), ranks=st.sampled_from(RANKS), seed=st.integers(0, 100))
def test_cut_and_join(bounds: tuple[int, ...], ranks: int, seed: int) -> None:
    whole = torch.arange(TOKENS)
    for owners in (zigzag(ranks), balanced(bounds, ranks), shuffled_owners(ranks, seed)):
        pieces = Pieces(bounds, owners)
        parts = [pieces.cut(whole, rank) for rank in range(pieces.ranks)]
        assert all(len(part) == TOKENS // ranks for part in parts)
        assert torch.equal(pieces.join(parts), whole)


@given(bounds=packings(), ranks=st.sampled_from(RANKS), seed=st.integers(0, 100))
def test_local_documents(bounds: tuple[int, ...], ranks: int, seed: int) -> None:
    """Two neighbouring local tokens are of one local document exactly if they are neighbours in the row and of one document there.

    Empty documents are kept and are nobody's: documents that go on are counted among them."""
    document = document_of(bounds)
    for owners in (zigzag(ranks), shuffled_owners(ranks, seed)):
        pieces = Pieces(bounds, owners)
        for rank in range(ranks):
            tokens, local = pieces.cut(torch.arange(TOKENS), rank).tolist(), pieces.local(rank)
            starts = {0} | {
                i for i in range(1, len(tokens)) if tokens[i] != tokens[i - 1] + 1 or document[tokens[i]] != document[tokens[i - 1]]
            }
            assert list(dict.fromkeys(local.bounds)) == [*sorted(starts), len(tokens)]
            assert len(local.enters) == len(local.leaves) == (2 if ranks > 1 else 0)
            for slot, piece in enumerate(pieces.held(rank)[: len(local.enters)]):
                start, stop = piece * pieces.length, (piece + 1) * pieces.length
                mine = {piece - 1: start, piece + 1: stop}
                outside = {side: owners[side] != rank if 0 <= side < len(owners) else True for side in mine}
                goes_on = {side: 0 < border < TOKENS and document[border - 1] == document[border] for side, border in mine.items()}
                assert (local.enters[slot] >= 0) == (goes_on[piece - 1] and outside[piece - 1])
                assert (local.leaves[slot] >= 0) == (goes_on[piece + 1] and outside[piece + 1])
                if local.enters[slot] >= 0:
                    assert tokens[local.bounds[local.enters[slot]]] == start
                if local.leaves[slot] >= 0:
                    assert tokens[local.bounds[local.leaves[slot] + 1] - 1] == stop - 1


@given(bounds=packings(), ranks=st.sampled_from(RANKS), seed=st.integers(0, 100))
def test_flows(bounds: tuple[int, ...], ranks: int, seed: int) -> None:
    """State i matters to piece j exactly if one document covers the border after i and the border before j; gradients mirror that."""
    document = document_of(bounds)
    for owners in (zigzag(ranks), shuffled_owners(ranks, seed)):
        pieces = Pieces(bounds, owners)
        flow, count, length = state_flow(pieces), len(owners), pieces.length
        mirrored = flow.mirrored()
        for i, j in itertools.combinations(range(count), 2):
            same = document[(i + 1) * length - 1] == document[j * length]
            assert (flow.first[j] <= i) == same
            assert (flow.last[i] >= j) == same
            assert (mirrored.first[count - 1 - i] <= count - 1 - j) == same
        matter = {(i, j) for j in range(count) for i in range(flow.first[j], j) if flow.sources[i] and flow.targets[j]}
        assert flow.near == {j for i, j in matter if i == j - 1}
        assert flow.far_sources == {i for i, j in matter if i < j - 1}
        assert flow.far_targets == {j for i, j in matter if i < j - 1}
        assert mirrored.mirrored() == flow


@given(bounds=packings(), ranks=st.sampled_from((2, 4)))
def test_work_and_balance(bounds: tuple[int, ...], ranks: int) -> None:
    document = document_of(bounds)
    pieces = cut_row(bounds, ranks)
    pairs = [sum(document[k] == document[q] for k in range(q + 1)) for q in range(TOKENS)]
    assert pieces.work() == [sum(pairs[p * pieces.length : (p + 1) * pieces.length]) for p in range(2 * ranks)]
    work = pieces.work()
    busiest = max(sum(work[p] for p in pieces.held(rank)) for rank in range(ranks))
    assert pieces.imbalance() == pytest.approx(busiest * ranks / sum(pairs))
    best = min(  # of all pairings
        max(work[order[2 * r]] + work[order[2 * r + 1]] for r in range(ranks))
        for order in (itertools.permutations(range(2 * ranks)) if ranks == 2 else [_greedy(work)])
    )
    assert cut_row(bounds, ranks, "balanced").imbalance() == pytest.approx(best * ranks / sum(pairs))


def _greedy(work: list[int]) -> list[int]:
    """The best pairing by trying all 105 of eight pieces."""

    def pairings(rest: list[int]) -> list[list[int]]:
        return [[rest[0], b, *more] for b in rest[1:] for more in pairings([x for x in rest[1:] if x != b])] if rest else [[]]

    return min(pairings(list(range(len(work)))), key=lambda o: max(work[o[i]] + work[o[i + 1]] for i in range(0, len(o), 2)))


def test_one_document_is_balanced_by_zigzag() -> None:
    for ranks in RANKS:
        assert cut_row(ROWS["one document"], ranks, "balanced").owners == zigzag(ranks)
        assert cut_row(ROWS["one document"], ranks).imbalance() == pytest.approx(1.0)
    contiguous = Pieces(ROWS["one document"], (0, 0, 1, 1, 2, 2, 3, 3))
    assert contiguous.imbalance() == pytest.approx(1.74, abs=0.01)  # nearly (2 CP - 1) / CP


@pytest.mark.parametrize(
    ("bounds", "ranks", "message"),
    [
        ((0, 90), 4, "90 tokens, not a multiple of its 8 pieces"),
        ((0, 0), 2, "0 tokens"),
        ((0, 60, 50, 96), 2, r"cu_seqlens is \[0, 60, 50, 96\]; it must begin with 0 and never fall"),
        ((4, 96), 2, "must begin with 0"),
        ((), 2, "must begin with 0"),
    ],
)
def test_refuses(bounds: tuple[int, ...], ranks: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Pieces(bounds, zigzag(ranks))


def test_refuses_owners_and_lengths() -> None:
    with pytest.raises(ValueError, match=r"hold \[3, 1\] pieces"):
        Pieces((0, 96), (0, 0, 0, 1))
    with pytest.raises(ValueError, match="95 tokens was given to be cut; the row has 96"):
        cut_row((0, 96), 2).cut(torch.zeros(95), 0)
