import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

LITERAL = "before <|endoftext|> after"


def test_training_is_deterministic_and_of_the_size_asked_for() -> None:
    texts = [Path(json.__file__).read_text(), Path(json.decoder.__file__).read_text()]
    first, second = (train_tokenizer(iter(texts), vocabulary=512) for _ in range(2))
    assert first.content == second.content
    assert (first.vocabulary, first.eod, first.eod_token) == (512, 0, "<|endoftext|>")
    assert train_tokenizer(texts, vocabulary=300).vocabulary == 300
    with pytest.raises(ValueError, match="vocabulary 256"):
        train_tokenizer(texts, vocabulary=256)


def test_load_keeps_file_bytes_and_hash(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "tokenizer.json").write_bytes(tokenizer.content)
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        loaded = load_tokenizer(path)
        assert (loaded.content, loaded.sha256, loaded.vocabulary) == (tokenizer.content, tokenizer.sha256, tokenizer.vocabulary)
        assert loaded.encode([LITERAL]) == tokenizer.encode([LITERAL])


@given(text=st.text())
def test_any_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    (ids,) = tokenizer.encode([text])
    assert tokenizer.decode(ids) == text
    assert tokenizer.eod not in ids


def test_special_tokens_in_text_stay_text(tokenizer: Tokenizer) -> None:
    stock = tokenizers.Tokenizer.from_str(tokenizer.content.decode())
    assert tokenizer.eod in stock.encode(LITERAL).ids  # the trap: what everyone gets by default
    (ids,) = tokenizer.encode([LITERAL])
    assert tokenizer.eod not in ids
    assert tokenizer.decode(ids) == LITERAL
    assert tokenizer.decode([*ids, tokenizer.eod]) == LITERAL + "<|endoftext|>"


def test_limits_and_additions_of_the_file_are_not_applied(tmp_path: Path, tokenizer: Tokenizer) -> None:
    engine = tokenizers.Tokenizer.from_str(tokenizer.content.decode())
    engine.enable_truncation(4)
    engine.enable_padding(length=50)
    engine.post_processor = tokenizers.processors.TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    engine.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).encode([LITERAL, "x"]) == tokenizer.encode([LITERAL, "x"])


def test_end_of_document_is_found_or_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    file = tmp_path / "tokenizer.json"
    engine = tokenizers.Tokenizer.from_str(tokenizer.content.decode())
    engine.add_special_tokens(["</s>", "<end_of_sentence>", "<stop>"])
    engine.save(str(file))
    assert load_tokenizer(file).eod_token == "<|endoftext|>"
    chosen = load_tokenizer(file, eod="<stop>")
    assert (chosen.eod, chosen.vocabulary) == (302, 303)

    file.write_text(file.read_text().replace("<|endoftext|>", "<other>"))
    assert load_tokenizer(file).eod_token == "<end_of_sentence>"
    with pytest.raises(ValueError, match=r"no end-of-document token <none>; .*<other>, </s>, <end_of_sentence>, <stop>"):
        load_tokenizer(file, eod="<none>")


def test_what_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        load_tokenizer(tmp_path)
    for content in (b"{}", b"\xff", b""):
        (tmp_path / "tokenizer.json").write_bytes(content)
        with pytest.raises(ValueError, match=r"tokenizer.json: not a tokenizer.json"):
            load_tokenizer(tmp_path)
