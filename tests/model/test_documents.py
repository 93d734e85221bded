"""A packed row is its documents, each alone: no leakage, forward or backward."""

import torch

from minimax_train.engine.session import Session
from minimax_train.engine.stage import bare, build_stage
from minimax_train.model.row import Row
from tests.support import little_model


def test_packed_row_equals_its_documents(alone: Session) -> None:
    """Odd lengths, a one-token document, slopes of the slowest heads (the last lightning layer of many)."""
    decoder = bare(build_stage(little_model(rotary_dim=8, num_attention_heads=6), alone, seed=1)).double()
    for block in decoder.blocks.values():
        if hasattr(block.attention, "slopes"):
            block.attention.slopes = torch.tensor([0.0, 5e-5, 1e-3, 0.02, 0.3, 0.917])
    g = torch.Generator().manual_seed(0)
    documents = [torch.randint(0, 300, (n,), generator=g) for n in (67, 1, 130, 2, 64)]
    together = Row.of_documents(documents)
    weights = torch.randn(len(together.tokens), 300, generator=g, dtype=torch.float64)

    def logits_and_gradients(rows: list[Row]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        decoder.zero_grad()
        logits = torch.cat([decoder.logits(row) for row in rows])
        (logits * weights).sum().backward()
        return logits.detach(), [p.grad.clone() for p in decoder.parameters() if p.grad is not None]

    packed, packed_gradients = logits_and_gradients([together])
    single, single_gradients = logits_and_gradients([Row.of_documents([d]) for d in documents])
    assert (packed - single).norm() / single.norm() < 1e-6  # the router and the rotation are fp32 by design
    for ours, theirs in zip(packed_gradients, single_gradients, strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm() + 1e-9


def test_a_document_does_not_see_the_one_before(alone: Session) -> None:
    """Changing document 0 changes nothing in document 1, to the last bit of fp32."""
    decoder = bare(build_stage(little_model(), alone, seed=1))
    first, second, other = (torch.randint(0, 300, (n,), generator=torch.Generator().manual_seed(n)) for n in (100, 50, 100))
    other = (first + 7) % 300
    with torch.no_grad():
        a, b = (decoder.logits(Row.of_documents([x, second]))[100:] for x in (first, other))
    assert torch.equal(a, b)
