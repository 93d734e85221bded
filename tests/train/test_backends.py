"""The forms of the attentions are chosen once: what the layers run, what is written down and what is said are one value."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from minimax_train.doctor import examine
from minimax_train.engine import stage
from minimax_train.engine.session import Session
from minimax_train.kernels.choice import Backends
from minimax_train.model import lightning, softmax
from minimax_train.model.block import Block
from minimax_train.train.loop import train
from minimax_train.train.metrics import Metrics
from tests.support import little_model, little_plan


def test_run_json_says_what_the_layers_run(corpus: Path, tmp_path: Path, alone: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """A choice that is not this machine's own goes from the place where it is made into every call, run.json and the log."""
    chosen = Backends(lightning="definition", softmax="a form of the test's own")
    asked: list[tuple[Any, ...]] = []
    called: list[Any] = []
    said: list[str] = []
    lightning_steps, causal_attention = lightning.lightning_steps, softmax.causal_attention

    def choose(*machine: Any) -> Backends:
        asked.append(machine)
        return chosen

    def remembered(*arguments: Any, backend: str, **options: Any) -> Any:
        called.append(backend)
        return lightning_steps(*arguments, backend=backend, **options)

    def made(backend: str, **facts: Any) -> Any:
        attend = causal_attention("sdpa", **facts)
        return lambda *arguments: (called.append(backend), attend(*arguments))[1]

    monkeypatch.setattr(stage, "best_backends", choose)
    monkeypatch.setattr(lightning, "lightning_steps", remembered)
    monkeypatch.setattr(softmax, "causal_attention", made)
    monkeypatch.setattr(Metrics, "say", lambda self, line: said.append(line))
    train(little_plan(corpus, steps=1), tmp_path / "run", alone)

    assert asked == [(torch.device("cpu"), torch.float32, little_model().head_dim, (32, 24), "auto")], "chosen once, for this model"
    assert set(called) == {chosen.lightning, chosen.softmax}
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (facts["lightning_backend"], facts["softmax_backend"]) == (chosen.lightning, chosen.softmax)
    assert facts["experts_backend"] == chosen.experts
    assert f"attention backends: lightning {chosen.lightning}, softmax {chosen.softmax}" in said


def test_a_form_that_is_asked_for_and_cannot_run_is_refused(corpus: Path, tmp_path: Path, alone: Session) -> None:
    with pytest.raises(
        ValueError, match=r"^experts_backend 'te' takes bfloat16 on a GPU, not torch.float32 on cpu; choose auto or one of loop$"
    ):
        train(little_plan(corpus, steps=1, experts_backend="te"), tmp_path / "run", alone)


def test_layers_hold_this_machines_choice(alone: Session) -> None:
    decoder = stage.build_stage(little_model(), alone).network
    assert decoder.backends == Backends(lightning="cpu", softmax="sdpa")
    blocks = [block for block in decoder.blocks.values() if isinstance(block, Block)]
    held = [block.attention.backend for block in blocks]
    assert held == [getattr(decoder.backends, kind) for kind in little_model().layer_kinds]


def test_doctor_says_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """The packages by what would be used of them, and the choice they lead to."""
    if torch.cuda.is_available():
        pytest.skip("what a machine without CUDA has is tested")
    facts = examine()
    assert facts["backends"] == "lightning cpu, softmax sdpa (bf16 heads of 128 on cpu)"
    assert {"triton", "transformer-engine", "apex", "flash-attn", "flash-attn 3"} <= facts.keys()
    real = importlib.util.find_spec
    for module, name in (("transformer_engine", "transformer-engine"), ("amp_C", "apex"), ("flash_attn_interface", "flash-attn 3")):
        assert facts[name].startswith("absent")
        monkeypatch.setattr(importlib.util, "find_spec", lambda asked, module=module: asked == module or real(asked))
        assert examine()[name] == "present"
