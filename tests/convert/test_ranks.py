"""Checkpoints of many ranks: written for their layout, read under it, saved by it, and exported to the same bytes as one rank's."""

from pathlib import Path

import pytest
import torch

from minimax_train.checkpoint.shelf import verified_record
from minimax_train.checkpoint.store import load_weights, save
from minimax_train.convert.from_hf import from_hf
from minimax_train.convert.table import table
from minimax_train.convert.to_hf import to_hf
from minimax_train.engine.session import session
from minimax_train.engine.stage import bare, build_stages, together
from minimax_train.engine.state import model_state
from minimax_train.engine.torch_dist import Numbers, read_index
from minimax_train.model.stages import cut_layers
from parallel.layout import Layout
from parallel.testing import run_ranks
from parallel.world import Place
from tests.convert.test_hostile import split
from tests.support import FIXTURE

LAYOUTS = {
    "tp2 x ep2 x pp2": Layout(tensor=2, expert=2, pipeline=2),
    "ep2 x etp2": Layout(expert=2, expert_tensor=2),
    "pp2 interleaved": Layout(pipeline=2, virtual_pipeline=2),
}


def load_and_save(place: Place, checkpoint: Path, target: Path, layout: Layout) -> None:
    """Every rank loads its part and they save together."""
    with session(layout=layout, place=place) as joined:
        record = verified_record(checkpoint)
        cut = cut_layers(record.model, layout, 64)
        stages = build_stages(record.model, joined, cut.held(joined.groups.pipeline.rank()), dtype=record.precision, seed=None)
        model = together([bare(stage) for stage in stages])
        for parameter in model.parameters():
            torch.nn.init.constant_(parameter, float("nan"))
        load_weights(model, checkpoint, record, joined.groups)
        save(target, model_state(model, joined.groups), record, joined.groups)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """One rank's export."""
    folder = tmp_path_factory.mktemp("one")
    from_hf(FIXTURE, folder / "ckpt")
    to_hf(folder / "ckpt", folder / "hf", "minimax_m1")
    return files(folder / "hf")


@pytest.mark.parametrize("name", LAYOUTS)
def test_export_of_many_ranks_is_one_ranks(name: str, tmp_path: Path, exported: dict[str, bytes]) -> None:
    """Imported straight to the layout, loaded and saved by its 4 ranks, exported: byte for byte what one rank exports."""
    layout = LAYOUTS[name]
    from_hf(FIXTURE, tmp_path / "ckpt", layout=layout)
    _check_parts(tmp_path / "ckpt", layout)
    run_ranks(4, load_and_save, tmp_path / "ckpt", tmp_path / "saved", layout)
    to_hf(tmp_path / "saved", tmp_path / "hf", "minimax_m1", workers=2)
    found = files(tmp_path / "hf")
    assert found["model.safetensors"] == exported["model.safetensors"]
    chunks = {key: len(tensor.chunks) for key, tensor in read_index(tmp_path / "saved" / "tensors").items()}
    assert name == "pp2 interleaved" or max(chunks.values()) > 1, "no tensor was saved in parts: the test shows nothing"


def _check_parts(checkpoint: Path, layout: Layout) -> None:
    """No chunk lies in two ranks' parts, and there are no more chunks than that takes, of these small tensors."""
    stored = read_index(checkpoint / "tensors")
    for entry in table(verified_record(checkpoint).model):
        chunks = stored[f"model.{entry.name}"].chunks
        ranks = layout.expert_tensor if len(entry.shape) == 3 else layout.tensor
        wanted = len(entry.parts) * (ranks if entry.cut is not None else 1)
        assert len(chunks) == wanted, entry.name
        for chunk in chunks:
            if entry.cut is not None:
                height = entry.shape[entry.cut] // entry.matrices // ranks
                assert chunk.shape[entry.cut] == height and chunk.offset[entry.cut] % height == 0, entry.name


def test_two_files_with_an_index(tmp_path: Path, exported: dict[str, bytes]) -> None:
    """A model in several files becomes the same checkpoint, and several files again where asked, with an index that from-hf accepts."""
    split(tmp_path / "source")
    from_hf(tmp_path / "source", tmp_path / "ckpt", workers=2)
    to_hf(tmp_path / "ckpt", tmp_path / "one", "minimax_m1")
    assert files(tmp_path / "one")["model.safetensors"] == exported["model.safetensors"]
    to_hf(tmp_path / "ckpt", tmp_path / "many", "minimax_m1", shard_bytes=200_000)
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) == 7
    from_hf(tmp_path / "many", tmp_path / "again")
    to_hf(tmp_path / "again", tmp_path / "one again", "minimax_m1")
    assert files(tmp_path / "one again") == files(tmp_path / "one")


def test_reading_stays_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more numbers are in memory at once than a piece has, whatever the tensors' sizes: both ways, at pieces of 2,000 bytes."""
    largest = [0]
    scratch = Numbers.scratch

    def counted(self: Numbers, count: int, dtype: torch.dtype) -> torch.Tensor:
        largest[0] = max(largest[0], count * dtype.itemsize)
        return scratch(self, count, dtype)

    monkeypatch.setattr("minimax_train.convert.pieces.MOST_BYTES", 2_000)
    monkeypatch.setattr(Numbers, "scratch", counted)
    from_hf(FIXTURE, tmp_path / "ckpt")
    to_hf(tmp_path / "ckpt", tmp_path / "hf", "minimax_m1")
    assert 1_000 < largest[0] <= 2_000
    assert len(read_index(tmp_path / "ckpt" / "tensors")["model.embedding.weight"].chunks) == 32
