"""Prompts of a user for a checkpoint: text or ids, one after the other, each on a blank memory."""

from dataclasses import dataclass
from pathlib import Path

from data.tokenizer import Tokenizer
from minimax_train.engine.session import Session
from minimax_train.evaluate.generate import Choosing, generate
from minimax_train.evaluate.logits import load_decoder, read_input_ids
from minimax_train.evaluate.tokenizer import find_tokenizer, has_tokenizer
from minimax_train.model.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class Made:
    """What followed one prompt."""

    prompt_tokens: int
    ids: list[int]
    """The last is the end of the document where that stopped it."""
    text: str | None
    """None where there is no tokenizer."""


def go_on(
    path: Path,
    prompt: str | Path,
    session: Session,
    choosing: Choosing,
    *,
    tokens: int,
    tokenizer: Path | None = None,
    past_end: bool = False,
) -> list[Made]:
    """At most `tokens` tokens after each prompt: a text, or each row of a file's `input_ids`.

    The end-of-document token of the tokenizer stops it unless `past_end`. ValueError where text is given and there is no tokenizer, and
    where ids are given without one and without `past_end`: nobody knows then which token ends a document.
    """
    decoder, record = load_decoder(path, session)
    words = _tokenizer(path, prompt, tokenizer, record.model, past_end)
    if isinstance(prompt, Path):
        prompts = read_input_ids(prompt, record.model.vocab_size).tolist()
    else:
        assert words is not None
        prompts = words.encode([prompt])
    eod = None if past_end or words is None else words.eod
    made = []
    for ids in prompts:
        new = generate(decoder, ids, tokens=tokens, eod=eod, choosing=choosing)
        made.append(Made(prompt_tokens=len(ids), ids=new, text=None if words is None else words.decode(new[:-1] if eod in new else new)))
    return made


def _tokenizer(path: Path, prompt: str | Path, given: Path | None, model: ModelConfig, past_end: bool) -> Tokenizer | None:
    if isinstance(prompt, Path) and past_end and not given and not has_tokenizer(path):
        return None
    return find_tokenizer(path, given, model)
