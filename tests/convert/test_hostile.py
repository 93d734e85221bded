"""Folders that mean harm or are merely broken: exit 2 and one line, nothing read outside them, nothing run, nothing written."""

import json
import os
import pickle
import random
import shutil
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from minimax_train.checkpoint.manifest import NAME as MANIFEST
from minimax_train.checkpoint.manifest import write_manifest
from minimax_train.cli import main
from minimax_train.convert.from_hf import from_hf
from minimax_train.convert.safetensors_file import header_of, read_header
from minimax_train.convert.to_hf import to_hf
from minimax_train.engine.session import Session
from minimax_train.evaluate.logits import load_decoder
from tests.support import FIXTURE

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_watched: list[list[str]] = []  # where the files that are opened are noted, while anybody wants to know


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _watched and event == "open" and isinstance(arguments[0], (str, bytes)):
        _watched[-1].append(os.fsdecode(arguments[0]))


sys.addaudithook(_audit)


@contextmanager
def opened() -> Iterator[list[str]]:
    """The files that Python opens inside the `with`."""
    _watched.append([])
    try:
        yield _watched[-1]
    finally:
        _watched.pop()


class Marker:
    """A pickle that makes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"touch {self.path}",))


def split(folder: Path) -> None:
    """The fixture in two files with an index."""
    folder.mkdir()
    shutil.copy(FIXTURE / "config.json", folder)
    tensors = load_file(FIXTURE / WEIGHTS)
    names = list(tensors)
    where = {}
    for number, held in enumerate((names[::2], names[1::2])):
        file = f"model-0000{number + 1}-of-00002.safetensors"
        body = b"".join(tensors[name].numpy().tobytes() for name in held)
        header = header_of([(name, torch.float32, tuple(tensors[name].shape)) for name in held])
        (folder / file).write_bytes(header.replace(b'"__metadata__":{"format":"pt"},', b" " * 31) + body)
        where |= dict.fromkeys(held, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": where}))


def refused(folder: Path, capsys: pytest.CaptureFixture[str], outside: Path | None = None) -> str:
    """Converts it on the command line: exit 2, one line, no target, no file of `outside` opened. Returns the line."""
    before = sorted(p.name for p in folder.parent.iterdir())
    with opened() as files:
        status = main(["convert", "from-hf", str(folder), "--to", str(folder.parent / "target"), "--workers", "1"])
    said = capsys.readouterr()
    assert (status, said.out) == (2, ""), said
    assert said.err.startswith("minimax-train: error: ") and said.err.count("\n") == 1 and len(said.err) < 2000, said.err
    assert sorted(p.name for p in folder.parent.iterdir()) == before
    if outside is not None:
        assert not [file for file in files if Path(file).resolve().is_relative_to(outside.resolve())]
    return said.err


def raw(header: dict[str, Any] | bytes, body: bytes = bytes(16), length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def entry(first: int = 0, end: int = 16, shape: Any = (4,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape) if isinstance(shape, tuple) else shape, "data_offsets": [first, end]}


HEADERS: dict[str, bytes] = {
    "length 2^62": raw({"a": entry()}, length=2**62),
    "length 2^64 - 1": raw({"a": entry()}, length=2**64 - 1),
    "longer than allowed": struct.pack("<Q", 100_000_001) + b" " * 100,
    "not JSON": raw(b"{nonsense"),
    "bad UTF-8": raw(b'{"\xff": 1}'),
    "out of bounds": raw({"a": entry(0, 32, (8,))}),
    "overlap": raw({"a": entry(0, 16), "b": entry(8, 16, (2,))}),
    "hole": raw({"a": entry(0, 4, (1,)), "b": entry(8, 16, (2,))}),
    "hole at the start": raw({"a": entry(4, 16, (3,))}),
    "negative offset": raw({"a": entry(-16, 16)}),
    "end before start": raw({"a": entry(16, 0)}),
    "shape and size differ": raw({"a": entry(0, 16, (5,))}),
    "shape overflows": raw({"a": entry(0, 16, (2**33, 2**33))}),
    "shape beyond 64 bits": raw({"a": entry(0, 16, (2**200,))}),
    "negative shape": raw({"a": entry(0, 16, (-2, -2))}),
    "shape of text": raw({"a": entry(0, 16, "4")}),
    "shape of booleans": raw({"a": entry(0, 4, [True])}, bytes(4)),
    "shape of floats": raw({"a": entry(0, 16, [4.0])}),
    "a name twice": raw(b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}'),
    "unknown dtype": raw({"a": entry(dtype="F99")}),
    "dtype of no text": raw({"a": entry(dtype=["F32"])}),
    "more fields": raw({"a": {**entry(), "strides": [1]}}),
    "fewer fields": raw({"a": {"dtype": "F32"}}),
    "trailing bytes": raw({"a": entry()}, bytes(17)),
    "truncated body": raw({"a": entry()}, bytes(15)),
    "empty file": b"",
    "seven bytes": b"\x01" * 7,
    "nested 100,000 deep": raw(b"[" * 100_000 + b"]" * 100_000),
    "an endless number": raw(b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,16]}}'),
    "a list": raw(b"[]"),
    "a tensor that is a list": raw({"a": [1, 2, 3]}),
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers_that_are_refused(name: str, tmp_path: Path) -> None:
    """Before a byte of a tensor is read; each in less than a second (H5: the test's own time limit is the suite's)."""
    path = tmp_path / "x.safetensors"
    path.write_bytes(HEADERS[name])
    with pytest.raises(ValueError, match=r"x\.safetensors"):
        read_header(path)


def test_a_sound_header_is_the_librarys(tmp_path: Path) -> None:
    """Ours reads what the library writes, and the library reads what ours writes."""
    tensors = {"b": torch.randn(3, 4), "a": torch.randn(5).bfloat16(), "none": torch.zeros(0, 4), "scalar": torch.tensor(2.5)}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    found = read_header(tmp_path / "x.safetensors")
    assert {name: (place.dtype, place.shape) for name, place in found.items()} == {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()}
    body = (tmp_path / "x.safetensors").read_bytes()
    for name, place in found.items():
        assert body[place.start : place.start + place.size] == tensors[name].view(-1).view(torch.uint8).numpy().tobytes()
    (tmp_path / "y.safetensors").write_bytes(
        header_of([(n, t.dtype, tuple(t.shape)) for n, t in tensors.items()])
        + b"".join(t.view(-1).view(torch.uint8).numpy().tobytes() for t in tensors.values())
    )
    again = load_file(tmp_path / "y.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/etc/passwd", "sub/model.safetensors", "..", ".", "", "a\0b", "link.safetensors"]
)
def test_names_that_lead_out(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outside = tmp_path / "elsewhere"
    outside.mkdir()
    shutil.copy(FIXTURE / WEIGHTS, outside / "outside.safetensors")
    work = tmp_path / "work"
    work.mkdir()
    split(work / "source")
    (work / "source" / "sub").mkdir()
    (work / "source" / "link.safetensors").symlink_to(outside / "outside.safetensors")
    index = json.loads((work / "source" / INDEX).read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], name)
    (work / "source" / INDEX).write_text(json.dumps(index))
    refused(work / "source", capsys, outside)


@pytest.mark.parametrize(
    "name", ["config.json", INDEX, "tokenizer.json", "LICENSE", "model-00001-of-00002.safetensors", "modeling_minimax_m1.py"]
)
@pytest.mark.parametrize("kind", ["link", "loop", "pipe", "folder"])
def test_what_is_no_plain_file_of_the_folder(name: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A link to a sound file outside, a link to itself, a named pipe that would never end, a folder."""
    outside, work = tmp_path / "elsewhere", tmp_path / "work"
    outside.mkdir()
    work.mkdir()
    split(work / "source")
    path = work / "source" / name
    if path.exists():
        path.rename(outside / name)
    else:
        (outside / name).write_text("{}")
    match kind:
        case "link":
            path.symlink_to(outside / name)
        case "loop":
            path.symlink_to(path)
        case "pipe":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
    refused(work / "source", capsys, outside)


def test_pickles_are_not_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    work = tmp_path / "work"
    work.mkdir()
    split(work / "source")
    (work / "source" / INDEX).unlink()
    for path in (work / "source").glob("*.safetensors"):
        path.unlink()
    (work / "source" / "pytorch_model.bin").write_bytes(pickle.dumps(Marker(tmp_path / "marker")))
    assert "pytorch_model.bin can run code when read" in refused(work / "source", capsys)
    assert not (tmp_path / "marker").exists()


def test_a_checkpoints_pickle_makes_nothing_but_its_records(tmp_path: Path, alone: Session) -> None:
    """Even where every checksum holds: whoever wrote the pickle wrote the manifest too. Export and training's loading refuse alike."""
    from_hf(FIXTURE, tmp_path / "ckpt")
    metadata = tmp_path / "ckpt" / "tensors" / ".metadata"
    metadata.write_bytes(pickle.dumps(Marker(tmp_path / "marker")))
    (tmp_path / "ckpt" / MANIFEST).unlink()
    write_manifest(tmp_path / "ckpt")
    with pytest.raises(ValueError, match="it asks for posix.system"):
        to_hf(tmp_path / "ckpt", tmp_path / "out", "minimax_m1")
    with pytest.raises(ValueError, match="it asks for posix.system"):
        load_decoder(tmp_path / "ckpt", alone)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ckpt"]


def test_a_hundred_million_experts_are_not_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    work = tmp_path / "work"
    work.mkdir()
    split(work / "source")
    for path in (work / "source").glob("*.safetensors"):
        path.write_bytes(raw({}, b""))
    _index(work / "source", lambda index: index.update(weight_map={}))
    (work / "source" / INDEX).unlink()
    (work / "source" / WEIGHTS).write_bytes(raw({}, b""))
    for path in (work / "source").glob("model-*"):
        path.unlink()
    _config(work / "source", lambda config: config.update(num_local_experts=10**8))
    assert "asks for 2,400,000,059 tensors, the files have 0" in refused(work / "source", capsys)


def sealed(checkpoint: Path) -> None:
    """Writes a manifest that holds: whoever changed a file may change that too."""
    (checkpoint / MANIFEST).unlink()
    write_manifest(checkpoint)


@pytest.mark.parametrize("text", ["[1]", "[" * 100_000, "nonsense", "null"])
def test_what_travels_is_not_trusted(tmp_path: Path, text: str) -> None:
    from_hf(FIXTURE, tmp_path / "ckpt")
    (tmp_path / "ckpt" / "hugging_face" / "config.json").write_text(text)
    sealed(tmp_path / "ckpt")
    with pytest.raises(ValueError, match=r"hugging_face/config\.json"):
        to_hf(tmp_path / "ckpt", tmp_path / "out", "minimax_m1")


@pytest.mark.parametrize(
    "change",
    [
        {"sizes": ("a", "b")}, {"sizes": (None, 48)}, {"sizes": ()}, {"sizes": (-320, -48)}, {"sizes": (320, 47)}, {"sizes": (640, 24)},
        {"offsets": (1, 0)}, {"offsets": (-1, 0)},
    ],
)  # fmt: skip
def test_an_index_that_does_not_describe_its_tensors(tmp_path: Path, change: dict[str, Any]) -> None:
    """Boxes of text, without axes, beyond the tensor, too few, twice: none of it reads memory that nothing filled."""
    from_hf(FIXTURE, tmp_path / "ckpt")
    metadata = tmp_path / "ckpt" / "tensors" / ".metadata"
    records = pickle.loads(metadata.read_bytes())
    chunk = records.state_dict_metadata["model.embedding.weight"].chunks[0]
    place = next(place for place in records.storage_data if place.fqn == "model.embedding.weight")
    info = records.storage_data.pop(place)
    for name, value in change.items():
        setattr(chunk, name, value)
    records.storage_data[type(place)(place.fqn, torch.Size(chunk.offsets))] = info
    metadata.write_bytes(pickle.dumps(records))
    sealed(tmp_path / "ckpt")
    with pytest.raises(ValueError, match=r"\.metadata is refused"):
        to_hf(tmp_path / "ckpt", tmp_path / "out", "minimax_m1")


def test_a_box_twice_and_another_missing(tmp_path: Path) -> None:
    from_hf(FIXTURE, tmp_path / "ckpt")
    metadata = tmp_path / "ckpt" / "tensors" / ".metadata"
    records = pickle.loads(metadata.read_bytes())
    chunks = records.state_dict_metadata["model.blocks.0.experts.down"].chunks
    chunks[1] = chunks[0]
    metadata.write_bytes(pickle.dumps(records))
    sealed(tmp_path / "ckpt")
    with pytest.raises(ValueError, match="do not fill its shape"):
        to_hf(tmp_path / "ckpt", tmp_path / "out", "minimax_m1")


def test_what_travelled_is_found_from_inside_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative path does not lose the tokenizer."""
    from_hf(FIXTURE, tmp_path / "run" / "checkpoints" / "step-00000001")
    (tmp_path / "run" / "checkpoints" / "step-00000001" / "hugging_face").rename(tmp_path / "run" / "hugging_face")
    (tmp_path / "run" / "hugging_face" / "tokenizer.json").write_text("{}")
    sealed(tmp_path / "run" / "checkpoints" / "step-00000001")
    monkeypatch.chdir(tmp_path / "run" / "checkpoints")
    to_hf(Path("step-00000001"), tmp_path / "out", "minimax_m1")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert "auto_map" in json.loads((tmp_path / "out" / "config.json").read_text())


def test_code_is_carried_and_never_run(tmp_path: Path) -> None:
    """auto_map's files travel to an export of the same format, and to no other; none is imported."""
    source = tmp_path / "source"
    shutil.copytree(FIXTURE, source)
    code = f"open({str(tmp_path / 'marker')!r}, 'w')\n"
    for name in ("configuration_minimax_m1.py", "modeling_minimax_m1.py", "unasked.py"):
        (source / name).write_text(code)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "LICENSE", "chat_template.jinja"):
        (source / name).write_text(name)
    from_hf(source, tmp_path / "ckpt")
    to_hf(tmp_path / "ckpt", tmp_path / "m1", "minimax_m1")
    to_hf(tmp_path / "ckpt", tmp_path / "text", "minimax_text_01")
    carried = {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "LICENSE", "chat_template.jinja"}
    own = {"config.json", WEIGHTS}
    assert {p.name for p in (tmp_path / "text").iterdir()} == carried | own
    assert {p.name for p in (tmp_path / "m1").iterdir()} == carried | own | {"configuration_minimax_m1.py", "modeling_minimax_m1.py"}
    assert (tmp_path / "m1" / "modeling_minimax_m1.py").read_text() == code
    original = json.loads((FIXTURE / "config.json").read_text())
    written = {name: json.loads((tmp_path / name / "config.json").read_text()) for name in ("m1", "text")}
    assert written["m1"].pop("torch_dtype") == "float32"
    assert written["m1"] == original
    assert "auto_map" not in written["text"]
    assert not (tmp_path / "marker").exists()


def _config(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def _index(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))


MEANINGFUL = [
    "attn_type_list", "head_dim", "hidden_size", "intermediate_size", "layernorm_mlp_alpha", "model_type", "num_attention_heads",
    "num_experts_per_tok", "num_hidden_layers", "num_key_value_heads", "num_local_experts", "rms_norm_eps", "rope_theta", "rotary_dim",
    "vocab_size",
]  # fmt: skip
WRONG = [None, "8", -1, 0, [], {}, [[]], {"a": 1}, float("nan"), float("inf"), "x" * 10_000, "../../etc/passwd"]


def mutate(folder: Path, draw: random.Random) -> str:
    """Breaks the folder in one way, and says how."""
    files = sorted(p for p in folder.iterdir() if p.suffix == ".safetensors")
    file = draw.choice(files)
    body = file.read_bytes()
    header = struct.unpack("<Q", body[:8])[0]
    kind = draw.choice(
        ["config value", "config key", "config text", "index name", "index entry", "index text", "header bit", "header length", "cut",
         "longer", "zeros", "gone", "swapped", "renamed", "number", "header entry", "twice", "total"]
    )  # fmt: skip
    match kind:
        case "config value":
            key, value = draw.choice(MEANINGFUL), draw.choice(WRONG)
            _config(folder, lambda config: config.update({key: value}))
            kind += f" {key} {str(value)[:20]}"
        case "config key":
            key = draw.choice([k for k in MEANINGFUL if k not in ("rotary_dim",)])
            _config(folder, lambda config: config.pop(key) if draw.random() < 0.5 else config.update({f"{key}_": 1}))
        case "config text":
            text = (folder / "config.json").read_text()
            at = draw.randrange(1, len(text) - 5)
            (folder / "config.json").write_text(
                draw.choice([text[:at], text + "}", "[" * 100_000, "", "null", "[]", text.replace(":", "", 1)])
            )
        case "index name":
            name = draw.choice(["../x", "/dev/zero", "gone.safetensors", "", ".", "config.json", files[0].name + "\0", 7, None, [], "a/b"])
            _index(folder, lambda index: index["weight_map"].update({draw.choice(list(index["weight_map"])): name}))
        case "index entry":
            choice = draw.random()
            _index(
                folder,
                lambda index: (
                    index["weight_map"].pop(draw.choice(list(index["weight_map"])))
                    if choice < 0.5
                    else index["weight_map"].update({"model.layers.99.stray": files[0].name})
                ),
            )
        case "index text":
            text = (folder / INDEX).read_text()
            (folder / INDEX).write_text(
                draw.choice([text[: len(text) // 2], "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "\x00"])
            )
        case "total":
            _index(
                folder,
                lambda index: index.update(metadata={"total_size": draw.choice([0, -1, 1e3, "x", index["metadata"]["total_size"] + 4])}),
            )
        case "header bit":
            at = draw.randrange(8 + 32, 8 + header)  # behind the blanks where the metadata was
            file.write_bytes(body[:at] + bytes([body[at] ^ 1 << draw.randrange(8)]) + body[at + 1 :])
        case "header length":
            wrong = draw.choice([0, 1, header - 1, header + 1, header + 8, len(body), 2**31, 2**63, draw.getrandbits(64)])
            file.write_bytes(struct.pack("<Q", wrong) + body[8:])
        case "cut":
            file.write_bytes(body[: draw.randrange(len(body))])
        case "longer":
            file.write_bytes(body + bytes(draw.randrange(1, 99)))
        case "zeros":
            file.write_bytes(bytes(len(body)))
        case "gone":
            draw.choice([file, folder / "config.json"]).unlink()
        case "swapped":
            first, second = files
            one = first.read_bytes()
            first.write_bytes(second.read_bytes())
            second.write_bytes(one)
        case "renamed":
            file.rename(folder / f"model-0000{draw.randrange(3, 9)}-of-00002.safetensors")
        case "number":
            at = 8 + header + 4 * draw.randrange((len(body) - 8 - header) // 4)
            file.write_bytes(body[:at] + struct.pack("<f", draw.choice([float("nan"), float("inf"), -float("inf")])) + body[at + 4 :])
        case "header entry":
            tensors = json.loads(body[8 : 8 + header])
            name = draw.choice(list(tensors))
            field = draw.choice(["dtype", "shape", "data_offsets"])
            tensors[name][field] = draw.choice([None, [], "F64", [1], [0, 2**62], [2**40, 2**40, 2**40], {"a": 1}, -1])
            text = json.dumps(tensors).encode()
            file.write_bytes(struct.pack("<Q", len(text)) + text + body[8 + header :])
        case "twice":
            shutil.copy(file, folder / "model-extra.safetensors")
    return f"{kind}: {file.name}"


@pytest.mark.parametrize("part", range(4))
def test_three_hundred_broken_folders(part: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each ends in exit 2 with one line (80 a part; which ones depends on the part alone)."""
    draw = random.Random(part)
    (tmp_path / "work").mkdir()
    for number in range(80):
        folder = tmp_path / "work" / "source"
        split(folder)
        how = mutate(folder, draw)
        try:
            refused(folder, capsys, tmp_path / "elsewhere")
        except AssertionError as error:
            raise AssertionError(f"part {part}, folder {number}, {how}: {error}") from error
        shutil.rmtree(folder)
    split(tmp_path / "work" / "source")
    assert main(["convert", "from-hf", str(tmp_path / "work" / "source"), "--to", str(tmp_path / "work" / "target"), "--workers", "1"]) == 0
