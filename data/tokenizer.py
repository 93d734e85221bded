"""Tokenizers: `tokenizer.json` and sentencepiece models; load, train, encode text as nothing but text."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

END_OF_DOCUMENT_NAMES = ("<|endoftext|>", "<end_of_sentence>", "</s>")
"""Tried in this order; the second is MiniMax-Text-01's. In a Hugging Face folder its own eos_token is tried last."""

FILE_NAME = "tokenizer.json"
MODEL_NAMES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
CONFIG_NAME = "tokenizer_config.json"


class Engine(Protocol):
    """What a tokenizer library has to give."""

    def encode(self, texts: list[str]) -> list[list[int]]: ...

    def decode(self, ids: list[int]) -> str: ...


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """A tokenizer file and what a token dataset must know of it.

    `content` is the file, byte for byte, and `sha256` its digest (hexadecimal); `suffix` is what follows PREFIX where it is kept,
    `library` what encodes it; `vocabulary` is the greatest id + 1, added tokens included; `eod` is the id that ends a document and
    `eod_token` its name.
    """

    content: bytes
    sha256: str
    vocabulary: int
    eod: int
    eod_token: str
    engine: Engine
    suffix: str = ".tokenizer.json"
    library: str = "tokenizers"

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, nothing added, nothing cut: the literal text "<|endoftext|>" is text and does not become the token."""
        return self.engine.encode(list(texts))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; special tokens show by their names."""
        return self.engine.decode(list(ids))


def load_tokenizer(path: str | Path, *, eod: str | None = None) -> Tokenizer:
    """Reads a `tokenizer.json`, a sentencepiece `.model`, or a Hugging Face folder: either file in it, or what AutoTokenizer makes of it.

    `eod` names the end-of-document token (default: END_OF_DOCUMENT_NAMES). Raises ValueError when there is no such file, it is no
    tokenizer, or the end-of-document token is not in it.
    """
    path = Path(path)
    names = [eod] if eod else [*END_OF_DOCUMENT_NAMES, *_eos_of(path / CONFIG_NAME)]
    if path.is_dir() and not (path / FILE_NAME).is_file():
        if (path / CONFIG_NAME).is_file():
            return _tokenizer(_auto_tokenizer(path), names, where=str(path))
        path = next((path / name for name in MODEL_NAMES if (path / name).is_file()), path / FILE_NAME)
    file = path / FILE_NAME if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"{file}: no such file; a tokenizer is a {FILE_NAME}, a sentencepiece .model or a directory that holds one")
    if file.suffix == ".model":
        return _sentencepiece(file.read_bytes(), names, where=str(file))
    return _tokenizer(file.read_bytes(), names, where=str(file))


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
    return _tokenizer(engine.to_str(pretty=True).encode(), [*END_OF_DOCUMENT_NAMES], where="the trained tokenizer")


def word_tokenizer(words: Sequence[str]) -> Tokenizer:
    """A tokenizer whose ids are whole words, by their place in `words`: text is words with white space between, and no other word.

    The first, which ends documents, is one of END_OF_DOCUMENT_NAMES. Encoding another word raises the library's own error.
    """
    engine = tokenizers.Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}))
    engine.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    engine.add_special_tokens([words[0]])
    return _tokenizer(engine.to_str(pretty=True).encode(), words[:1], where="the tokenizer of words")


class _HuggingFace:
    """`tokenizers`, with special tokens found in the text encoded as ordinary text."""

    def __init__(self, content: bytes) -> None:
        self.tokenizer = tokenizers.Tokenizer.from_str(content.decode())
        self.tokenizer.no_truncation()  # a file may carry the limits of the model it was made for
        self.tokenizer.no_padding()
        self.tokenizer.encode_special_tokens = True  # the library's name for it

    def encode(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=False))


class _SentencePiece:
    """sentencepiece, which takes control symbols found in the text for ordinary text."""

    def __init__(self, content: bytes) -> None:
        import sentencepiece

        self.processor: Any = sentencepiece.SentencePieceProcessor(model_proto=content)

    def encode(self, texts: list[str]) -> list[list[int]]:
        encoded: list[list[int]] = self.processor.encode(texts, out_type=int, num_threads=1)
        return encoded

    def decode(self, ids: list[int]) -> str:
        pieces = [self.processor.id_to_piece(number) if self.processor.is_control(number) else number for number in ids]
        text, run = "", []
        for piece in [*pieces, ""]:
            if isinstance(piece, int):
                run.append(piece)
                continue
            text += self.processor.decode(run) + piece
            run = []
        return text


def _tokenizer(content: bytes, names: Sequence[str], *, where: str) -> Tokenizer:
    try:
        engine = _HuggingFace(content)
    except Exception as error:  # the library raises plain Exception for whatever it cannot read
        raise ValueError(f"{where}: not a tokenizer.json ({str(error).splitlines()[0]})") from None
    there = [token.content for token in engine.tokenizer.get_added_tokens_decoder().values() if token.special]
    name, number = _end_of_document({name: engine.tokenizer.token_to_id(name) for name in names}, there, where)
    return Tokenizer(
        content=content,
        sha256=hashlib.sha256(content).hexdigest(),
        vocabulary=max(engine.tokenizer.get_vocab(with_added_tokens=True).values()) + 1,
        eod=number,
        eod_token=name,
        engine=engine,
    )


def _sentencepiece(content: bytes, names: Sequence[str], *, where: str) -> Tokenizer:
    try:
        engine = _SentencePiece(content)
    except ImportError:
        raise ValueError(f"{where}: a sentencepiece model needs the package `sentencepiece`: install it") from None
    except Exception as error:  # the library raises RuntimeError for whatever it cannot read
        raise ValueError(f"{where}: not a sentencepiece model ({str(error).splitlines()[0]})") from None
    model = engine.processor
    size = model.get_piece_size()
    known = {name: number for name in names if model.id_to_piece(number := model.piece_to_id(name)) == name}
    there = [model.id_to_piece(number) for number in range(size) if model.is_control(number)]
    name, number = _end_of_document(known, there, where)
    return Tokenizer(
        content=content,
        sha256=hashlib.sha256(content).hexdigest(),
        vocabulary=size,
        eod=number,
        eod_token=name,
        engine=engine,
        suffix=".tokenizer.model",
        library="sentencepiece",
    )


def _auto_tokenizer(folder: Path) -> bytes:
    """The tokenizer.json that transformers makes of a folder without one; no code of the folder's is run."""
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise ValueError(f"{folder}: holds no {FILE_NAME}; to make one of it `transformers` must be installed") from None
    try:
        loaded = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        return str(loaded.backend_tokenizer.to_str()).encode()
    except Exception as error:  # the library raises whatever it meets
        raise ValueError(f"{folder}: AutoTokenizer cannot make a {FILE_NAME} of it ({str(error).splitlines()[0]})") from None


def _eos_of(config: Path) -> list[str]:
    """The eos_token a Hugging Face folder names."""
    try:
        token = json.loads(config.read_bytes())["eos_token"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    name = token.get("content") if isinstance(token, dict) else token
    return [name] if isinstance(name, str) else []


def _end_of_document(numbers: dict[str, int | None], there: list[str], where: str) -> tuple[str, int]:
    for name, number in numbers.items():
        if number is not None:
            return name, number
    shown = ", ".join(there[:20]) + (f" and {len(there) - 20} more" if len(there) > 20 else "")
    tried = " or ".join(numbers) or "among those usual"
    raise ValueError(f"{where}: no end-of-document token {tried}; name one of its special tokens: {shown or 'it has none'}")
