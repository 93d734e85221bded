"""Bytes on each pipeline rank at the moment of a step when they are most: plain arithmetic over kept.py, working.py and weights.py."""

from collections import Counter
from dataclasses import dataclass

from minimax_train.model.recompute import Recompute
from minimax_train.plan import Plan
from minimax_train.planner.in_flight import moments
from minimax_train.planner.kept import Kept, batch_rows, head_kept, layer_input, layer_kept, row_kept, total
from minimax_train.planner.sizes import IMBALANCE, Device, Sizes, sizes_of
from minimax_train.planner.weights import Weights, count_weights
from minimax_train.planner.working import Moment, head_moment, layer_moments


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """Bytes of one pipeline rank's busiest GPU; `peak` is the sum of all others."""

    rank: int
    layers: tuple[range, ...]
    rows_held: int
    """Rows (of one of its chunks each) that activations are kept of at that moment."""
    parameters: int
    gradients: int
    optimizer: int
    activations: int
    """Kept for the backward pass, of all rows in flight; without what follows."""
    states: int
    """Lightning states among what is kept."""
    logits: int
    """The head's: what it keeps, and where the peak is its gradient, that."""
    working: int
    """What lives for the moment alone."""
    buffers: int
    """The batch's rows of token ids; with tensor parallelism megatron-core's buffer of gathered tokens."""
    moment: str
    """What runs then."""

    @property
    def peak(self) -> int:
        return self.static + self.activations + self.states + self.logits + self.working

    @property
    def static(self) -> int:
        """Between two steps."""
        return self.parameters + self.gradients + self.optimizer + self.buffers


@dataclass(frozen=True, kw_only=True)
class StageMemory:
    """A stage's pipeline ranks."""

    stage: str
    recompute: Recompute
    ranks: tuple[RankMemory, ...]

    @property
    def worst(self) -> RankMemory:
        """The rank with the highest peak; the first of several."""
        return max(self.ranks, key=lambda rank: rank.peak)


@dataclass(frozen=True, kw_only=True)
class _Alive:
    """What lives at a moment of a chunk's backward pass, beside other rows' tensors."""

    kept: tuple[Kept, ...]
    working: int
    moment: str

    @property
    def bytes(self) -> int:
        return sum(tensor.bytes for tensor in self.kept) + self.working


def stage_memory(plan: Plan, number: int, ranks: int, *, device: Device = "cuda", imbalance: float = IMBALANCE) -> StageMemory:
    """Of the plan's stage `number` on `ranks` GPUs. The layout must fit them (Plan.check_ranks)."""
    stage, layout = plan.stages[number], plan.layout_of(number)
    s = sizes_of(plan, number, device=device, imbalance=imbalance)
    cut = plan.cut(layout)
    rows = max(1, max(part.batch_tokens for part in stage.parts) // stage.length // layout.data(ranks))
    buffers = batch_rows(s, rows) + (s.gathered * s.hidden * s.bytes if s.tensor > 1 else 0)
    found = []
    for rank in range(layout.pipeline):
        chunks = cut.held(rank)
        weights = count_weights(plan, layout, chunks, ranks)
        held = [_chunk_kept(plan, s, layers) for layers in chunks]
        alive = [_alive(plan, s, layers) for layers in chunks]
        cases = {(chunk, tuple(sorted(counts.items()))) for chunk, counts in moments(layout, rank, rows)}
        _, most, others = max(
            (_worst(held, Counter(dict(counts)) - Counter([chunk]), alive[chunk]) for chunk, counts in sorted(cases)),
            key=lambda found: found[0],
        )
        found.append(_rank(rank, chunks, s, weights, held, buffers, most, others))
    return StageMemory(stage=stage.name, recompute=stage.recompute, ranks=tuple(found))


def _worst(held: list[list[Kept]], others: Counter[int], alive: list[_Alive]) -> tuple[int, _Alive, Counter[int]]:
    """Bytes of activations, the moment of a backward pass when they are most, and the rows that wait, by chunk."""
    most = max(alive, key=lambda moment: moment.bytes)
    return sum(count * total(held[chunk]) for chunk, count in others.items()) + most.bytes, most, others


def _rank(
    rank: int,
    chunks: tuple[range, ...],
    s: Sizes,
    weights: Weights,
    held: list[list[Kept]],
    buffers: int,
    alive: _Alive,
    others: Counter[int],
) -> RankMemory:
    kept: Counter[str] = Counter()
    for tensor in alive.kept:
        kept[tensor.part] += tensor.bytes
    for chunk, count in others.items():
        for tensor in held[chunk]:
            kept[tensor.part] += count * tensor.bytes
    states, logits = kept.pop("states", 0), kept.pop("head", 0)
    of_head = alive.moment == "head's gradient"
    step = optimizer_working(s, weights)
    idle = states + logits + kept.total() + alive.working < step
    return RankMemory(
        rank=rank,
        layers=chunks,
        rows_held=0 if idle else others.total() + 1,
        parameters=weights.parameters,
        gradients=weights.gradients,
        optimizer=weights.optimizer,
        activations=0 if idle else kept.total(),
        states=0 if idle else states,
        logits=0 if idle else logits + (alive.working if of_head else 0),
        working=step if idle else 0 if of_head else alive.working,
        buffers=buffers,
        moment="optimizer's step" if idle else alive.moment,
    )


def optimizer_working(s: Sizes, weights: Weights) -> int:
    """torch's AdamW, where neither Transformer Engine's nor apex's is installed: on a GPU the roots of all second moments at once."""
    return 4 * weights.shard if s.device == "cuda" else 0


def _chunk_kept(plan: Plan, s: Sizes, layers: range) -> list[Kept]:
    """What one row leaves in a chunk until its backward pass."""
    kept = [*row_kept(s), *_passed(plan, s, layers)]
    for layer in layers:
        kept += layer_input(s) if s.recompute == "full" else layer_kept(s, plan.model.layer_kinds[layer])
    return kept + (head_kept(s) if layers.stop == plan.model.num_layers else [])


def _passed(plan: Plan, s: Sizes, layers: range) -> list[Kept]:
    """What the chunk before sent, where the first layer keeps a copy of it; the interleaved schedule holds what this one sends on too."""
    one = s.tokens * s.hidden * s.bytes
    received = [Kept(part="input", name="what the chunk before sent", shape="[T, C] b", bytes=one)]
    sent = [Kept(part="input", name="what the next chunk got", shape="[T, C] b", bytes=one)]
    held = s.interleaved and layers.stop < plan.model.num_layers
    return [*(received if layers.start > 0 and s.copies_input and s.recompute != "full" else []), *(sent if held else [])]


def _alive(plan: Plan, s: Sizes, layers: range) -> list[_Alive]:
    """The moments of a chunk's backward pass, from the last layer to the first."""
    kinds, is_last = plan.model.layer_kinds, layers.stop == plan.model.num_layers
    before = [*row_kept(s), *_passed(plan, s, layers)]
    found = []
    if is_last:
        moment = head_moment(s)
        found.append(_Alive(kept=tuple(_chunk_kept(plan, s, layers)), working=moment.bytes, moment=moment.name))
    each = [layer_input(s) if s.recompute == "full" else layer_kept(s, kinds[layer]) for layer in layers]
    for count in range(len(layers), 0, -1):
        kind = kinds[layers[count - 1]]
        own, earlier = layer_kept(s, kind), [tensor for kept in each[: count - 1] for tensor in kept]
        if s.recompute == "full" and s.copies_input:
            earlier += layer_input(s)[:1]
        for moment in layer_moments(s, kind):
            left = _left(own, moment)
            found.append(
                _Alive(kept=(*before, *earlier, *left), working=moment.bytes, moment=f"{kind} layer {layers[count - 1]}: {moment.name}")
            )
    return found


def _left(own: list[Kept], moment: Moment) -> list[Kept]:
    return [tensor for tensor in own if tensor.name not in moment.freed]
