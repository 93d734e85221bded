"""Small real inputs for the data room's tests."""

from pathlib import Path

import pytest

from data.prepare import prepare
from data.tokenizer import Tokenizer, train_tokenizer

TEXTS = [
    "def attend(q, k, v):\n    return softmax(q @ k.T) @ v\n",
    "naïve café — 文書 😀\r\n\ttabs and CRLF",
    "The literal <|endoftext|> in a text is text.",
    "x",
    "one two three four five six seven eight nine ten\n" * 40,
]


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS, vocabulary=300)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """TEXTS as files 0.txt ... 4.txt."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for number, text in enumerate(TEXTS):
        (folder / f"{number}.txt").write_bytes(text.encode())
    return folder


@pytest.fixture
def prefix(folder: Path, tokenizer: Tokenizer) -> Path:
    """TEXTS prepared."""
    prefix = folder.parent / "out" / "five.texts"
    prepare([folder], tokenizer, prefix, quiet=True)
    return prefix
