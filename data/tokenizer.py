"""Tokenizers in the `tokenizer.json` format: load, train, encode text as nothing but text."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

END_OF_DOCUMENT_NAMES = ("<|endoftext|>", "<end_of_sentence>", "</s>")
"""Tried in this order; the second is MiniMax-Text-01's."""

FILE_NAME = "tokenizer.json"


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """A `tokenizer.json` and what a token dataset must know of it.

    `content` is the file, byte for byte, and `sha256` its digest (hexadecimal); `vocabulary` is the greatest id + 1, added tokens
    included; `eod` is the id that ends a document and `eod_token` its name.
    """

    content: bytes
    sha256: str
    vocabulary: int
    eod: int
    eod_token: str
    engine: tokenizers.Tokenizer

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, nothing added, nothing cut: the literal text "<|endoftext|>" is text and does not become the token."""
        return [encoding.ids for encoding in self.engine.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; special tokens show by their names."""
        return self.engine.decode(list(ids), skip_special_tokens=False)


def load_tokenizer(path: str | Path, *, eod: str | None = None) -> Tokenizer:
    """Reads a `tokenizer.json`, or the one in a directory. `eod` names the end-of-document token (default: END_OF_DOCUMENT_NAMES).

    Raises ValueError when there is no such file, it is no tokenizer, or the end-of-document token is not in it.
    """
    path = Path(path)
    file = path / FILE_NAME if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"{file}: no such file; a tokenizer is a {FILE_NAME} file or a directory that holds one")
    return _tokenizer(file.read_bytes(), eod, where=str(file))


def train_tokenizer(texts: Iterable[str], *, vocabulary: int = 1024) -> Tokenizer:
    """Byte-level BPE of at most `vocabulary` ids: "<|endoftext|>" is 0, then the 256 bytes, then merges (fewer on a tiny corpus).

    Deterministic in `texts` and their order. Write `content` to a file to keep it. Raises ValueError below 257 ids.
    """
    smallest = 257
    if vocabulary < smallest:
        raise ValueError(f"vocabulary {vocabulary}: a byte-level tokenizer needs at least {smallest} (256 bytes, 1 end of document)")
    engine = tokenizers.Tokenizer(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_DOCUMENT_NAMES[0]],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    engine.train_from_iterator(texts, trainer)
    return _tokenizer(engine.to_str(pretty=True).encode(), None, where="the trained tokenizer")


def _tokenizer(content: bytes, eod: str | None, *, where: str) -> Tokenizer:
    try:
        engine = tokenizers.Tokenizer.from_str(content.decode())
    except Exception as error:  # the library raises plain Exception for whatever it cannot read
        raise ValueError(f"{where}: not a tokenizer.json ({str(error).splitlines()[0]})") from None
    engine.no_truncation()  # a file may carry the limits of the model it was made for
    engine.no_padding()
    engine.encode_special_tokens = True  # the library's name for: special tokens found in the text are encoded as ordinary text
    name, number = _end_of_document(engine, eod, where)
    return Tokenizer(
        content=content,
        sha256=hashlib.sha256(content).hexdigest(),
        vocabulary=max(engine.get_vocab(with_added_tokens=True).values()) + 1,
        eod=number,
        eod_token=name,
        engine=engine,
    )


def _end_of_document(engine: tokenizers.Tokenizer, wanted: str | None, where: str) -> tuple[str, int]:
    names = END_OF_DOCUMENT_NAMES if wanted is None else (wanted,)
    for name in names:
        number = engine.token_to_id(name)
        if number is not None:
            return name, number
    there = [token.content for token in engine.get_added_tokens_decoder().values() if token.special]
    shown = ", ".join(there[:20]) + (f" and {len(there) - 20} more" if len(there) > 20 else "")
    raise ValueError(f"{where}: no end-of-document token {' or '.join(names)}; name one of its special tokens: {shown or 'it has none'}")
