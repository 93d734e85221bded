"""Memory does not follow the size of a document."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from data.tokenizer import Tokenizer

SCRIPT = """
import re, sys
from pathlib import Path
from data.prepare import prepare
from data.tokenizer import load_tokenizer
small, large, tokenizer, encoder = sys.argv[1:]
peaks = []
for number, path in enumerate((small, large)):
    prepare([path], load_tokenizer(tokenizer), f"{large}-{number}", quiet=True, encoder=encoder)
    peaks.append(int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024)  # ru_maxrss begins with the parent's
print(*peaks)
"""


@pytest.mark.parametrize("kind", ["jsonl", "txt"])
def test_one_huge_document(tmp_path: Path, tokenizer: Tokenizer, kind: str) -> None:
    """160 MB in one line or one file, against 40 MB: the peak of the second is that of the first, to 40 MiB."""
    (tmp_path / "tokenizer.json").write_bytes(tokenizer.content)
    block = "".join(f"line {number} of a document that goes on\n" for number in range(25_000))
    paths = []
    for times in (42, 168):
        path = tmp_path / f"{times}.{kind}"
        paths.append(str(path))
        with path.open("w") as file:
            head, tail, body = ('{"text": "', '", "id": 7}\n', json.dumps(block)[1:-1]) if kind == "jsonl" else ("", "", block)
            file.write(head)
            for _ in range(times):
                file.write(body)
            file.write(tail)
    command = [sys.executable, "-c", SCRIPT, *paths, str(tmp_path), "gigatoken"]
    first, second = map(float, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
    assert second < first + 40, (first, second)
    assert second < 400
