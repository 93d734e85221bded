"""Reading on equals reading at once: logits, tokens, and memory that does not grow."""

import itertools

import pytest
import torch
from torch import Tensor

from minimax_train.engine.session import Session
from minimax_train.engine.stage import bare, build_stage
from minimax_train.evaluate.generate import Choosing, choose, continuations, generate, prefill
from minimax_train.evaluate.logits import batch_logits
from minimax_train.model.decoder import Decoder
from minimax_train.model.onward import blank, read_on
from tests.support import little_model


@pytest.fixture(scope="module")
def decoder(alone: Session) -> Decoder:
    """Drawn weights, of which those of experts and routers are large enough that every layer matters; half of each head turns."""
    model = bare(build_stage(little_model(rotary_dim=8), alone, seed=3, rope_base=500.0)).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.mul_(1 + 0.5 * torch.rand(weight.shape, generator=torch.Generator().manual_seed(len(name))))
    return model


def prompt(length: int, seed: int) -> Tensor:
    return torch.randint(0, 300, (length,), generator=torch.Generator().manual_seed(seed))


def in_parts(decoder: Decoder, ids: Tensor, sizes: list[int]) -> Tensor:
    """Logits `[T, vocabulary]` of a document read in parts."""
    memory, logits = blank(decoder), []
    for part in ids.split(sizes):
        x, memory = read_on(decoder, part, memory)
        logits.append(decoder.head(decoder.norm(x)).detach())
    return torch.cat(logits)


def apart(ours: Tensor, truth: Tensor) -> float:
    """The largest relative error of any position's logits."""
    return float(((ours - truth).norm(dim=-1) / truth.norm(dim=-1)).max())


@pytest.mark.parametrize("sizes", [[77], [1] * 77, [1, 75, 1], [40, 37], [16, 1, 1, 31, 28]], ids=lambda s: f"{len(s)} parts")
def test_every_position_is_as_in_the_parallel_form(decoder: Decoder, sizes: list[int]) -> None:
    ids = prompt(77, 1)
    assert apart(in_parts(decoder, ids, sizes), batch_logits(decoder, ids[None])[0]) < 1e-5


def test_prompts_one_after_the_other_do_not_meet(decoder: Decoder) -> None:
    for length, seed in ((129, 2), (1, 3), (32, 2)):
        ids = prompt(length, seed)
        for chunk in (17, 1000):
            logits, _ = prefill(decoder, ids, chunk)
            assert apart(logits, batch_logits(decoder, ids[None])[0, -1]) < 1e-5


def test_greedy_tokens_are_the_parallel_forms(decoder: Decoder) -> None:
    ids = prompt(19, 5)
    expected = ids
    for _ in range(24):
        expected = torch.cat([expected, batch_logits(decoder, expected[None])[0, -1].argmax()[None]])
    made = generate(decoder, ids.tolist(), tokens=24, eod=None)
    assert made == expected[19:].tolist()
    assert len(set(made)) > 3


def test_states_do_not_grow(decoder: Decoder) -> None:
    _, memory = prefill(decoder, prompt(50, 6))
    _, later = read_on(decoder, prompt(9, 7), memory)
    for kind, before, after in zip(decoder.config.layer_kinds, memory.layers, later.layers, strict=True):
        if kind == "lightning":
            assert [t.shape for t in before] == [t.shape for t in after] == [torch.Size([4, 16, 16])]
            assert after[0].dtype == torch.float32
        else:
            assert [len(t) for t in (*before, *after)] == [50, 50, 59, 59]
    assert (memory.tokens, later.tokens) == (50, 59)


def test_a_memory_can_be_read_on_from_twice(decoder: Decoder) -> None:
    _, memory = prefill(decoder, prompt(21, 8))
    for seed in (9, 10):
        ids = torch.cat([prompt(21, 8), prompt(6, seed)])
        x, _ = read_on(decoder, ids[21:], memory)
        assert apart(decoder.head(decoder.norm(x)), batch_logits(decoder, ids[None])[0, 21:]) < 1e-5


def test_states_are_fp32_in_a_bf16_model(alone: Session) -> None:
    """As near the fp32 model's logits as the parallel form in bf16 is."""
    halves = bare(build_stage(little_model(), alone, dtype="bf16", seed=3)).eval()
    ids = prompt(40, 11)
    _, memory = prefill(halves, ids)
    assert {t.dtype for kind, kept in zip(halves.config.layer_kinds, memory.layers, strict=True) for t in kept if kind == "lightning"} == {
        torch.float32
    }
    truth = batch_logits(bare(build_stage(little_model(), alone, seed=3)).eval(), ids[None])[0]
    parallel = (batch_logits(halves, ids[None])[0].float() - truth).norm()
    assert (in_parts(halves, ids, [1] * 40).float() - truth).norm() < 1.5 * parallel


def test_stops_at_the_end_of_the_document(decoder: Decoder) -> None:
    ids = prompt(19, 5).tolist()
    made = generate(decoder, ids, tokens=24, eod=None)
    stop = made[5]
    assert generate(decoder, ids, tokens=24, eod=stop) == made[: made.index(stop) + 1]
    assert generate(decoder, ids, tokens=0, eod=None) == []


def test_temperature_draws_from_the_softmax() -> None:
    logits = torch.tensor([2.0, 0.0, -1.0, 1.0])
    draws = torch.Generator().manual_seed(1)
    found = torch.tensor([choose(logits, 0.5, draws) for _ in range(4000)]).bincount(minlength=4) / 4000
    expected = torch.tensor([54.598, 1.0, 0.1353, 7.389]) / 63.123  # exp(logits / 0.5)
    assert ((found - expected).abs() < 4 * (expected * (1 - expected) / 4000).sqrt()).all()


def test_the_seed_decides(decoder: Decoder) -> None:
    ids = prompt(5, 5)
    made = [list(itertools.islice(continuations(decoder, ids, Choosing(temperature=0.7, seed=seed)), 8)) for seed in (5, 5, 6)]
    assert made[0] == made[1] != made[2]


def test_refuses_nothing_to_go_on_from(decoder: Decoder) -> None:
    with pytest.raises(ValueError, match="no token"):
        prefill(decoder, torch.zeros(0, dtype=torch.int64))
    with pytest.raises(ValueError, match="temperature is -1"):
        Choosing(temperature=-1)
