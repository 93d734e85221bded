"""What a model says at a few places of a long row, however ranks share the row: logits exist for these places alone."""

from dataclasses import dataclass

import torch
from torch import Tensor

from minimax_train.model.decoder import Decoder
from minimax_train.model.row import Row
from parallel.collectives import all_sum
from parallel.groups import Groups


@dataclass(frozen=True, kw_only=True)
class Said:
    """Of n tokens, given the true ones before each."""

    right: Tensor
    """`[n]` bool: it is the token that greedy decoding would take."""
    loss: Tensor
    """`[n]` fp64, nats."""


@torch.no_grad()
def said_at(decoder: Decoder, row: Row, places: list[int], labels: list[int], groups: Groups) -> Said:
    """How the model tells the tokens `labels`, each from the one at its place in the whole row; the same on all ranks of the row.

    All ranks of the row call it together, with a decoder that holds all layers. One small sum over them besides what the layers exchange.
    """
    x_TC, _ = decoder.hidden(decoder.embedding(row.tokens), row)
    tensor = groups.tensor
    known_nC = _gathered(x_TC, row, places, groups)
    missing = -len(places) % tensor.size()  # each tensor-parallel rank gives the head as many rows
    mine = torch.nn.functional.pad(known_nC, (0, 0, 0, missing)).chunk(tensor.size())[tensor.rank()]
    logits: Tensor = decoder.head(decoder.norm(mine))[: len(places)].double()
    wanted = torch.tensor(labels, device=logits.device)
    return Said(right=logits.argmax(-1) == wanted, loss=torch.nn.functional.cross_entropy(logits, wanted, reduction="none"))


def _gathered(x_TC: Tensor, row: Row, places: list[int], groups: Groups) -> Tensor:
    """`[n, hidden]` of the places, wherever they are held: a place is one rank's, the others add zero."""
    held = torch.cat([torch.arange(run.start, run.stop) for run in row.pieces.runs(row.rank)])
    here = held.tensor_split(groups.tensor.size())[groups.tensor.rank()]  # rising, as runs are
    wanted = torch.tensor(places)
    nearest = torch.searchsorted(here, wanted).clamp(max=len(here) - 1)
    found = here[nearest] == wanted
    whole = x_TC.new_zeros(len(places), x_TC.shape[1])
    whole[found.to(x_TC.device)] = x_TC[nearest[found].to(x_TC.device)]
    return all_sum(whole, groups.tensor_context)
