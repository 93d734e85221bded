"""What the tools of data_prepare.py do, each in a process of its own: python data_tools.py TOOL INPUT TOKENIZER FOLDER WORKERS.

Nothing but the tool and the standard library is imported, so that this runs in a tool's own virtual environment.
"""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

PIECE = 32 << 20
"""Bytes of lines that the raw encoders get at once."""


def texts_of(path: Path) -> Iterator[list[str]]:
    with path.open("rb") as file:
        while lines := file.readlines(PIECE):
            yield [json.loads(line)["text"] for line in lines]


def raw_gigatoken(source: Path, tokenizer: Path, folder: Path, workers: int) -> dict[str, float]:
    """encode_batch alone, ids thrown away; the seconds are those of the calls."""
    import gigatoken

    encoder = gigatoken.Tokenizer(str(tokenizer))
    seconds, tokens = 0.0, 0
    for texts in texts_of(source):
        begin = time.process_time()
        ids = encoder.encode_batch(texts, parallel=workers > 1)
        seconds += time.process_time() - begin
        tokens += len(ids.layout.content.data)
    return {"encode_cpu_seconds": seconds, "tokens": tokens}


def raw_tokenizers(source: Path, tokenizer: Path, folder: Path, workers: int) -> dict[str, float]:
    """encode_batch alone, ids thrown away; the seconds are those of the calls."""
    import tokenizers

    encoder = tokenizers.Tokenizer.from_file(str(tokenizer))
    seconds, tokens = 0.0, 0
    for texts in texts_of(source):
        for first in range(0, len(texts), 500):  # its records take some hundred bytes a token
            begin = time.process_time()
            tokens += sum(len(encoding) for encoding in encoder.encode_batch(texts[first : first + 500]))
            seconds += time.process_time() - begin
    return {"encode_cpu_seconds": seconds, "tokens": tokens}


def datatrove(source: Path, tokenizer: Path, folder: Path, workers: int) -> dict[str, float]:
    """MegatronDocumentTokenizer over an input that was split beforehand into one file for each worker."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens.megatron_tokenizer import MegatronDocumentTokenizer

    steps = [
        JsonlReader(str(folder.parent / "split"), glob_pattern="*.jsonl"),
        MegatronDocumentTokenizer(str(folder / "out"), tokenizer_name_or_path=str(tokenizer), eos_token="<|endoftext|>"),
    ]
    LocalPipelineExecutor(pipeline=steps, tasks=workers, workers=workers, logging_dir=str(folder / "logs")).run()
    return {"tokens": sum(path.stat().st_size // 2 for path in (folder / "out").glob("*.bin"))}


def datasets_map(source: Path, tokenizer: Path, folder: Path, workers: int) -> dict[str, float]:
    """load_dataset, map in batches with the end of document added, save_to_disk."""
    import datasets
    import tokenizers

    datasets.disable_progress_bars()
    encoder = tokenizers.Tokenizer.from_file(str(tokenizer))
    eod = encoder.token_to_id("<|endoftext|>")

    def encode(rows: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        return {"ids": [[*encoding.ids, eod] for encoding in encoder.encode_batch(rows["text"])]}

    rows = datasets.load_dataset("json", data_files=str(source), split="train", cache_dir=str(folder / "cache"))
    done = rows.map(encode, batched=True, batch_size=200, num_proc=workers, remove_columns=rows.column_names)
    done.save_to_disk(str(folder / "out"))
    return {"tokens": sum(sum(map(len, batch["ids"])) for batch in done.iter(1000)) if workers < 0 else 0}


TOOLS = {"raw_gigatoken": raw_gigatoken, "raw_tokenizers": raw_tokenizers, "datatrove": datatrove, "datasets_map": datasets_map}


if __name__ == "__main__":
    tool, source, tokenizer, folder, workers = sys.argv[1:]
    result = TOOLS[tool](Path(source), Path(tokenizer), Path(folder), int(workers))
    Path(folder, "result.json").write_text(json.dumps(result))
