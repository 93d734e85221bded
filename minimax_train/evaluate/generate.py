"""Text goes on: a prompt is read in the parallel form, then a token is chosen and read at a time, with memory of constant size but for the
softmax layers' keys and values. For small models on one rank."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from minimax_train.model.decoder import Decoder
from minimax_train.model.onward import Memory, blank, read_on

CHUNK = 4096
"""Tokens of a prompt read at once: ours."""


@dataclass(frozen=True, kw_only=True)
class Choosing:
    """How tokens are chosen."""

    temperature: float = 0.0
    """0: the likeliest. Else drawn from softmax(logits / temperature)."""
    seed: int = 1234

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}; it must be 0 (the likeliest token) or above")


def prefill(decoder: Decoder, prompt_T: Tensor, chunk: int = CHUNK) -> tuple[Tensor, Memory]:
    """A whole prompt int64 `[T]`, `chunk` tokens at a time -> logits `[vocabulary]` of the token behind it, and the memory after it.

    ValueError for a prompt of nothing.
    """
    if not len(prompt_T):
        raise ValueError("the prompt has no token; give at least one")
    memory = blank(decoder)
    for part in prompt_T.split(chunk):
        x, memory = read_on(decoder, part, memory)
    return _logits(decoder, x[-1:]), memory


def continuations(decoder: Decoder, prompt_T: Tensor, choosing: Choosing, chunk: int = CHUNK) -> Iterator[int]:
    """The tokens that follow the prompt, one by one, without end. The same arguments give the same tokens on the same machine."""
    draws = torch.Generator().manual_seed(choosing.seed)
    logits, memory = prefill(decoder, prompt_T, chunk)
    while True:
        token = choose(logits, choosing.temperature, draws)
        yield token
        x, memory = read_on(decoder, torch.tensor([token], device=prompt_T.device), memory)
        logits = _logits(decoder, x)


def generate(decoder: Decoder, prompt: list[int], *, tokens: int, eod: int | None, choosing: Choosing | None = None) -> list[int]:
    """At most `tokens` ids that follow the prompt; the last is `eod` where it came before (None: nothing stops it)."""
    device = next(decoder.parameters()).device
    made: list[int] = []
    for token in islice(continuations(decoder, torch.tensor(prompt, dtype=torch.int64, device=device), choosing or Choosing()), tokens):
        made.append(token)
        if token == eod:
            break
    return made


@torch.no_grad()
def _logits(decoder: Decoder, x_1C: Tensor) -> Tensor:
    logits: Tensor = decoder.head(decoder.norm(x_1C))[0]
    return logits


def choose(logits: Tensor, temperature: float, draws: torch.Generator) -> int:
    """The likeliest token of logits `[vocabulary]` at temperature 0, else one drawn from softmax(logits / temperature), in fp64."""
    if temperature == 0:
        return int(logits.argmax())
    chances = (logits.double().cpu() / temperature).softmax(-1)
    return int(torch.multinomial(chances, 1, generator=draws))
