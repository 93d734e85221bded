"""gigatoken is used where it gives the reference's ids, and only there; long texts are cut only where their ids do not change."""

import contextlib
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers

from data import long_text
from data.encoder import Encoder, GigatokenEncoder, ReferenceEncoder, choose_encoder
from data.long_line import BadText
from data.long_text import encode_long
from data.tokenizer import Tokenizer, load_tokenizer

LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
ENGLISH = "The quick brown fox can't jump over 12345 lazy dogs' backs;\n\n  def f(x):\n\treturn x + 1\n\nStop here. "
TEXT = ENGLISH * 5 + "Größe, naïve café e\u0301\u0323 नमस्ते 文書の形\r\n" * 3
LITERAL = "before <|endoftext|> after"


def byte_level(
    pattern: str | None = None, *, regex: bool = True, normalizer: Any = None, added: Sequence[Any] = ()
) -> tokenizers.Tokenizer:
    """Byte-level BPE of 400 ids with GPT-2's pattern or another, trained on TEXT."""
    engine = tokenizers.Tokenizer(models.BPE())
    byte = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex and pattern is None)
    engine.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), byte]) if pattern else byte
    engine.decoder = decoders.ByteLevel()
    if normalizer:
        engine.normalizer = normalizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False)
    engine.train_from_iterator([TEXT], trainer)
    engine.add_tokens(list(added))
    return engine


@pytest.fixture
def loaded(tmp_path: Path) -> Callable[[tokenizers.Tokenizer], Tokenizer]:
    def load(engine: tokenizers.Tokenizer) -> Tokenizer:
        engine.save(str(tmp_path / "tokenizer.json"))
        return load_tokenizer(tmp_path)

    return load


def choose(tokenizer: Tokenizer, said: list[str], **changes: Any) -> Encoder:
    options: dict[str, Any] = {"size": 1 << 40, "choice": "auto", "say": said.append, **changes}
    return choose_encoder(tokenizer, lambda: [TEXT, LITERAL], **options)


@pytest.mark.parametrize("pattern", [None, LLAMA3])
def test_gigatoken_where_it_is_equal(loaded: Callable[..., Tokenizer], pattern: str | None) -> None:
    said: list[str] = []
    tokenizer = loaded(byte_level(pattern))
    encoder = choose(tokenizer, said)
    assert (encoder.name, said) == ("gigatoken", [])
    ids, ends = encoder.encode([LITERAL, "", TEXT])
    assert ids.dtype == np.uint32 and ends[0] == 0 and ends[1] == ends[2]
    expected = tokenizer.encode([LITERAL, "", TEXT])
    assert [ids[a:b].tolist() for a, b in zip(ends, ends[1:], strict=False)] == expected
    assert tokenizer.eod not in ids  # the literal in the text stays text
    assert encoder.encode([])[1].tolist() == [0]
    encoder.refresh()
    assert choose(tokenizer, said, size=1000).name == choose(tokenizer, said, choice="reference").name == "tokenizers"
    assert said == []  # a choice, or too little to be worth it, is no news


@pytest.mark.parametrize(
    ("engine", "why"),
    [
        (lambda: byte_level(regex=False), "it differs on a sample of the input: token 0 .* expected"),
        (lambda: byte_level(added=[AddedToken("lazy", lstrip=True, rstrip=True), AddedToken("fox", single_word=True)]), "it differs"),
        (lambda: byte_level(normalizer=normalizers.Lowercase()), "Lowercase"),
        (lambda: byte_level("[aeiou]+|."), "Split regex"),
    ],
)
def test_the_reference_where_it_differs(loaded: Callable[..., Tokenizer], engine: Callable[[], tokenizers.Tokenizer], why: str) -> None:
    """The first two load without complaint and give other ids."""
    said: list[str] = []
    tokenizer = loaded(engine())
    assert choose(tokenizer, said).name == "tokenizers"
    (line,) = said
    assert line.startswith("encoding with tokenizers, not gigatoken: ")
    with pytest.raises(ValueError, match=f"gigatoken cannot be used: .*{why}"):
        choose(tokenizer, said, choice="gigatoken")


def test_gigatoken_missing(loaded: Callable[..., Tokenizer], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gigatoken", None)
    said: list[str] = []
    assert choose(loaded(byte_level()), said).name == "tokenizers"
    assert said == ["encoding with tokenizers, not gigatoken: gigatoken is not installed"]


def test_memory_that_piled_up_is_let_go(loaded: Callable[..., Tokenizer], monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = GigatokenEncoder(loaded(byte_level()).content)
    first = encoder.engine
    encoder.refresh()
    assert encoder.engine is first
    monkeypatch.setattr("data.encoder.GROWTH", -(1 << 40))
    encoder.refresh()
    assert encoder.engine is not first


class Small:
    """A reference encoder that takes little at once."""

    name, longest = "small", 60

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.whole = ReferenceEncoder(tokenizer)
        self.greatest = 0

    def encode(self, texts: Sequence[str]) -> Any:
        self.greatest = max([self.greatest, *map(len, texts)])
        return self.whole.encode(texts)

    def refresh(self) -> None:
        pass


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_text, "AROUND", 12)
    monkeypatch.setattr(long_text, "WINDOW", 40)
    monkeypatch.setattr(long_text, "MOST", 2000)


@pytest.fixture(scope="module")
def sentencepiece_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    import sentencepiece

    folder = tmp_path_factory.mktemp("sentencepiece")
    (folder / "text").write_text("\n".join([ENGLISH.replace("\n", " ")] * 20))
    for kind in ("bpe", "unigram"):
        sentencepiece.SentencePieceTrainer.train(
            input=str(folder / "text"), model_prefix=str(folder / kind), vocab_size=300, model_type=kind, byte_fallback=True, minloglevel=2
        )
    return {kind: load_tokenizer(folder / f"{kind}.model") for kind in ("bpe", "unigram")}


WORDS = ["the", "fox", "can't", "12345", ";", "\n", "\n\n", "  ", " ", " ", " a", "\t", "é", "文書", "e\u0301", "\nStop", "quick"]


@pytest.mark.parametrize("kind", ["gpt2", "llama3", "bpe", "unigram"])
def test_a_long_text_in_pieces_has_the_ids_of_the_whole(
    kind: str, loaded: Callable[..., Tokenizer], sentencepiece_models: dict[str, Tokenizer], short: None
) -> None:
    tokenizer = sentencepiece_models.get(kind) or loaded(byte_level(LLAMA3 if kind == "llama3" else None))
    draw, cuts = random.Random(1), 0
    for _ in range(60):
        text = "".join(draw.choices(WORDS, k=draw.randint(1, 300)))
        step = draw.randint(1, 90)
        pieces = list(encode_long((text[at : at + step] for at in range(0, len(text), step)), Small(tokenizer)))
        assert np.concatenate(pieces).tolist() == tokenizer.encode([text])[0]
        cuts += len(pieces) - 1
    assert cuts > 60
    english = Small(tokenizer)
    list(encode_long([ENGLISH * 50], english))
    assert english.greatest < 200


def test_where_there_is_no_place_to_cut_the_text_is_refused(loaded: Callable[..., Tokenizer], short: None) -> None:
    encoder = Small(loaded(byte_level()))
    assert len(np.concatenate(list(encode_long(["a" * 400], encoder)))) > 0
    with pytest.raises(BadText, match="no place to cut it in [0-9]+ characters"):
        list(encode_long(["a" * 5000], encoder))


def test_a_tokenizer_that_joins_words_is_not_cut_between_them(loaded: Callable[..., Tokenizer], short: None) -> None:
    """BPE over the whole text, which joins "e fox" and "\\nS": the ids would depend on the cut, so there is none."""
    engine = byte_level(regex=False)
    assert any("Ġ" in piece[1:] or "Ċ" in piece[1:-1] for piece in engine.get_vocab())
    encoder = Small(loaded(engine))
    text = ENGLISH * 50
    whole = encoder.whole.encode([text])[0].tolist()
    with contextlib.suppress(BadText):
        assert np.concatenate(list(encode_long([text], encoder))).tolist() == whole


def test_sentencepiece(sentencepiece_models: dict[str, Tokenizer]) -> None:
    tokenizer = sentencepiece_models["bpe"]
    assert (tokenizer.library, tokenizer.suffix, tokenizer.vocabulary, tokenizer.eod_token) == (
        "sentencepiece",
        ".tokenizer.model",
        300,
        "</s>",
    )
    (ids,) = tokenizer.encode(["the fox </s> and <s>"])
    assert tokenizer.eod not in ids and 1 not in ids  # control symbols in text stay text
    assert tokenizer.decode([*ids, tokenizer.eod]) == "the fox </s> and <s></s>"
    said: list[str] = []
    assert choose(tokenizer, said).name == "sentencepiece"
    assert said == ["encoding with sentencepiece, not gigatoken: a sentencepiece model is encoded by its own library"]


def test_folders_of_hugging_face(tmp_path: Path, sentencepiece_models: dict[str, Tokenizer]) -> None:
    """Without tokenizer.json: what AutoTokenizer makes of it, or the sentencepiece model in it."""
    from transformers import GPT2TokenizerFast

    byte_level().save(str(tmp_path / "t.json"))
    GPT2TokenizerFast(tokenizer_file=str(tmp_path / "t.json")).save_pretrained(tmp_path / "fast")
    expected = load_tokenizer(tmp_path / "fast").encode([TEXT, LITERAL])
    made = tokenizers.Tokenizer.from_file(str(tmp_path / "fast" / "tokenizer.json"))
    (tmp_path / "slow").mkdir()
    made.model.save(str(tmp_path / "slow"))
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (tmp_path / "fast" / name).exists():
            (tmp_path / "slow" / name).write_bytes((tmp_path / "fast" / name).read_bytes())
    assert load_tokenizer(tmp_path / "slow").encode([TEXT, LITERAL]) == expected

    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "tokenizer.model").write_bytes(sentencepiece_models["bpe"].content)
    assert load_tokenizer(tmp_path / "model").sha256 == sentencepiece_models["bpe"].sha256
    (tmp_path / "model" / "tokenizer.model").write_bytes(b"no model")
    with pytest.raises(ValueError, match="not a sentencepiece model"):
        load_tokenizer(tmp_path / "model")
    (tmp_path / "model" / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ValueError, match="AutoTokenizer cannot make"):
        load_tokenizer(tmp_path / "model")


def test_the_end_of_document_a_folder_names(tmp_path: Path) -> None:
    engine = byte_level()
    engine.add_special_tokens(["<|stop|>"])
    text = engine.to_str().replace("<|endoftext|>", "<|other|>")
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ValueError, match="no end-of-document token"):
        load_tokenizer(tmp_path)
    for eos in ('"<|stop|>"', '{"content": "<|stop|>"}'):
        (tmp_path / "tokenizer_config.json").write_text(f'{{"eos_token": {eos}}}')
        assert load_tokenizer(tmp_path).eod_token == "<|stop|>"
