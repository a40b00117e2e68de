"""What only a card can show: threads side by side, recorded micro-batches, memory that is enforced."""

from __future__ import annotations

import copy
import math
from typing import Any, cast

import numpy as np
import pytest
import torch

import cuda_compiler
import ghost_kernels as kernels
import ghost_kernels_cuda
import manifolds
import prime_device
import vote_units
from bench_models import Endless, config_of, gaussian_model, ghost_model
from ghost_core import ghost_cross_entropy
from night_shift import AntigravitySentinel, LayerPeel, MemoryContingency, Shape, TrainingGovernor
from night_watch import NightWatch
from packed_batches import Batch
from qwen_prime_wrapper import copy_tensors, model_tensors
from training_recipe import Recipe
from vote_casting import Turn
from vote_trainer import VoteTrainer

CARD = torch.cuda.is_available()
needs_card = pytest.mark.skipif(not CARD, reason="no CUDA device: what runs side by side is not tested")
SHAPES = [(1, 1), (3, 37), (130, 1031), (257, 1536), (64, 8960), (1000, 2048)]
KEYS, FOUR_KEYS = (0x12345678, 0x9ABCDEF0), (0x12345678, 0x9ABCDEF0, 0xFFFFFFFF, 0x00000001)


@pytest.mark.parametrize("architecture", ["sm_61", "sm_70", "sm_75", "sm_86", "sm_90"])
def test_the_kernels_compile_for_every_card_from_pascal_on(architecture: str) -> None:
    try:
        cuda_compiler._nvrtc("12")
    except cuda_compiler.CudaCompilerError:
        pytest.skip("no NVRTC of CUDA 12, the last that knows Pascal: pip install nvidia-cuda-nvrtc-cu12==12.6.85")
    source = ghost_kernels_cuda.SOURCE.read_text(encoding="utf-8")
    assert b"dequantize_bfloat16_words" in cuda_compiler.compile_source(source, architecture, "12")
    with pytest.raises(cuda_compiler.CudaCompilerError, match=r"(?s)refuses the kernels for .*undefined"):
        cuda_compiler.compile_source("__global__ void f() { g(); }", architecture, "12")


def test_a_card_gets_the_newest_code_that_it_runs() -> None:
    try:
        cuda_compiler._nvrtc("12")
    except cuda_compiler.CudaCompilerError:
        pytest.skip("no NVRTC of CUDA 12")
    found = {card: cuda_compiler.architecture_for(*card, "12") for card in ((6, 1), (7, 5), (8, 9), (9, 0))}
    assert found == {(6, 1): "sm_61", (7, 5): "sm_75", (8, 9): "sm_89", (9, 0): "sm_90"}
    # A revision that the compiler does not know yet.
    assert cuda_compiler.architecture_for(9, 9, "12") == "sm_90"
    with pytest.raises(cuda_compiler.CudaCompilerError, match=r"capability 3\.0.*5\.0.*9\.0"):
        cuda_compiler.architecture_for(3, 0, "12")


def both(tensors: dict[str, Any]) -> list[dict[str, Any]]:
    """Copies on the CPU and on the card."""

    def placed(x: Any, device: str) -> Any:
        if isinstance(x, torch.Tensor):
            return x.clone().to(device)
        return x.to(device) if isinstance(x, manifolds.Manifold) else x

    return [{k: placed(x, device) for k, x in tensors.items()} for device in ("cpu", "cuda")]


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    a, b = (t.cpu().view(torch.int16) if t.dtype == torch.bfloat16 else t.cpu() for t in (a, b))
    return torch.equal(a, b)


@needs_card
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", manifolds.NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dequantize(shape: tuple[int, int], name: str, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(shape)
    words = torch.from_numpy(rng.integers(-32768, 32768, shape).astype(np.int16))
    words.view(-1)[:1] = -32768
    scale = torch.from_numpy((10.0 ** rng.uniform(-4, 1, shape[0])).astype(np.float32))
    results = []
    for t in both({"words": words, "scale": scale, "table": manifolds.build(name)}):
        out = torch.full(shape, math.nan, dtype=dtype, device=t["words"].device)
        results.append(kernels.dequantize(t["words"], t["scale"], t["table"], out, dtype=dtype))
    assert same(*results)


@needs_card
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", [8, 16, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cast_and_take_back(shape: tuple[int, int], bits: int, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(shape)
    units = vote_units.VoteUnits.for_buffer(bits, 5)
    total = shape[0] + 3
    gradient = torch.from_numpy(rng.standard_normal(shape).astype(np.float32) * 10.0 ** rng.uniform(-3, 3, shape))
    start = torch.from_numpy(rng.integers(-units.carry, units.carry + 1, (total, shape[1])))
    tensors = {
        "gradient": gradient.to(dtype),
        "rows": torch.from_numpy(rng.permutation(total)[: shape[0]]),
        "yardstick": torch.from_numpy((10.0 ** rng.uniform(-2, 4, total)).astype(np.float32)),
        "votes": start.to(torch.int8 if bits == 8 else torch.int16),
        "row_squares": torch.from_numpy(rng.integers(-(1 << 40), 1 << 40, total)),
        "row_sketch": torch.from_numpy(rng.integers(-(1 << 40), 1 << 40, total)),
    }
    results = []
    for t in both(tensors):
        for slot in range(5):
            kernels.cast_votes(**t, keys=KEYS, slot=slot, units=units)
        results.append([t[n].clone() for n in ("votes", "row_squares", "row_sketch")])
        for slot in range(5):
            kernels.cast_votes(**t, keys=KEYS, slot=slot, units=units, sign=-1)
        assert all(torch.equal(t[n].cpu(), tensors[n]) for n in ("votes", "row_squares", "row_sketch"))
    assert all(same(a, b) for a, b in zip(*results, strict=True))
    assert shape == (1, 1) or not same(results[0][0], tensors["votes"])


@needs_card
def test_what_is_not_finite_is_marked_casts_nothing_and_is_taken_back() -> None:
    units = vote_units.VoteUnits.for_buffer(8, 1)
    gradient = torch.randn(40, 1536, device="cuda")
    rows = torch.arange(40, device="cuda")
    rows[7] = -1
    state = [torch.zeros(40, 1536, dtype=torch.int8), torch.zeros(40).long(), torch.zeros(40).long()]
    votes, squares, sketch = (t.cuda() for t in state)
    mark = torch.zeros(1, dtype=torch.int32, device="cuda")
    yardstick = torch.full((40,), 8.0, device="cuda")
    options: dict[str, Any] = {"keys": KEYS, "slot": 0, "units": units, "mark": mark}
    kernels.cast_votes(gradient, rows, yardstick, votes, squares, sketch, **options)
    assert mark.item() == 0 and not votes[7].any() and votes[6].any()
    for bad in (math.nan, math.inf, -math.inf):
        before = [t.clone() for t in (votes, squares, sketch)]
        wrong = gradient.clone()
        wrong[3, 1535] = bad
        kernels.cast_votes(wrong, rows, yardstick, votes, squares, sketch, **options)
        assert mark.item() == 1 and votes[3, 1535] == before[0][3, 1535]
        mark.zero_()
        kernels.cast_votes(wrong, rows, yardstick, votes, squares, sketch, **options, sign=-1)
        assert all(torch.equal(a, b) for a, b in zip(before, (votes, squares, sketch), strict=True))
        mark.zero_()


@needs_card
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("shrink", "reach"), [(0, 1 << 15), (99_999, 5)])
@pytest.mark.parametrize("kind", ["int8", "int16", "compact"])
def test_apply(shape: tuple[int, int], shrink: int, reach: int, kind: str) -> None:
    rng = np.random.default_rng(shape)
    table = manifolds.build("compact" if kind == "compact" else "prime-harmonic")
    units = vote_units.VoteUnits.for_buffer({"int8": 8, "int16": 16, "compact": 6}[kind], 1)
    votes = torch.from_numpy(np.rint(rng.standard_normal(shape) * units.carry / 3).clip(-units.carry, units.carry))
    levels = torch.from_numpy(rng.integers(-table.top, table.top + 1, shape))
    words = (levels << table.vote_bits) + (votes.long() if kind == "compact" else 0)
    tensors = {
        "indices": words.to(torch.int16),
        "votes": None if kind == "compact" else votes.to(getattr(torch, kind)),
        "stride": torch.from_numpy((2.0 ** rng.uniform(15, 34, shape[0])).astype(np.int64)),
        "manifold": table,
    }
    results = []
    for t in both(tensors):
        options = {"decay": 45_875, "carry": units.carry, "shrink": shrink, "reach": reach}
        counts = kernels.apply_votes(**t, keys=FOUR_KEYS, **options)
        results.append((t["indices"], t["votes"], counts))
    (i, v, counts), (j, w, others) = results
    assert same(i, j) and (v is None or same(v, w)) and counts == others
    assert counts[0] > 0 or shape == (1, 1)


@needs_card
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.int8, torch.int16])
def test_whispers_and_majorities(shape: tuple[int, int], dtype: torch.dtype) -> None:
    rng = np.random.default_rng(shape)
    tensors = {
        "gradient": torch.from_numpy(rng.standard_normal(shape).astype(np.float32)),
        "rows": torch.arange(shape[0]),
        "yardstick": torch.from_numpy((10.0 ** rng.uniform(-1, 1, shape[0])).astype(np.float32)),
        "votes": torch.from_numpy(rng.integers(-9, 10, shape)).to(dtype),
        "row_sizes": torch.zeros(shape[0], dtype=torch.int64),
        "row_squares": torch.zeros(shape[0], dtype=torch.int64),
    }
    moved = {
        "indices": torch.from_numpy(rng.integers(-32767, 32768, shape)).to(torch.int16),
        "stride": torch.from_numpy((2.0 ** rng.uniform(0, 30, shape[0])).astype(np.int64)),
        "manifold": manifolds.build("linear"),
    }
    results = []
    for t, m in zip(both(tensors), both(moved), strict=True):
        kernels.cast_whispers(**t, gate=3000)
        numbers = {"threshold": 2, "jitter": 2, "chance": 50_000, "decay": 62_259, "carry": 60}
        counts = kernels.flip_by_majority(**m, votes=t["votes"], keys=FOUR_KEYS, **numbers)
        results.append([t["votes"], t["row_sizes"], t["row_squares"], m["indices"], torch.tensor(counts)])
    assert all(same(a, b) for a, b in zip(*results, strict=True))


@needs_card
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cross_entropy_is_that_of_float64(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    import ghost_grid

    monkeypatch.setattr(ghost_grid, "SLICE_ELEMENTS", 64 * 1000)
    model = ghost_model("toy", manifolds.build()).cuda()
    grid = model.get_output_embeddings().grid
    hidden = torch.randn(70, 64, device="cuda", dtype=dtype, requires_grad=True)
    targets = torch.randint(4096, (70,), device="cuda")
    targets[5:9] = -100
    loss = ghost_cross_entropy(hidden, targets, grid)
    loss.backward()
    exact = hidden.detach().double().requires_grad_()
    logits = exact @ grid.dequantize(dtype=dtype).double().T
    wanted = torch.nn.functional.cross_entropy(logits, targets, reduction="sum", ignore_index=-100)
    wanted.backward()
    close = 1e-5 if dtype == torch.float32 else 2e-2
    assert loss.item() == pytest.approx(wanted.item(), rel=close)
    error = (hidden.grad.double() - exact.grad).norm() / exact.grad.norm()
    assert error < close and not hidden.grad[5:9].any()


class Packed(Endless):
    """Rows of two documents every second time, with prompts that are no answers."""

    def __init__(self, vocabulary: int, tokens: int) -> None:
        super().__init__(vocabulary, tokens)
        self.count = 0

    def __next__(self) -> Batch:
        batch = super().__next__()
        self.count += 1
        positions, labels = batch.position_ids.clone(), batch.labels.clone()
        if self.count % 2:
            positions[:, self.tokens // 3 :] -= self.tokens // 3
        labels[:, : self.tokens // 5] = -100
        answers = int((labels[:, 1:] != -100).sum())
        return Batch(batch.input_ids, labels, positions, 1, batch.tokens, answers)

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]
        self.generator.set_state(state["generator"])


class ThreeRows(Packed):
    """Three rows, of which the last ends with padding."""

    def __init__(self, vocabulary: int, tokens: int) -> None:
        super().__init__(vocabulary, tokens)
        self.batch_size = 3

    def __next__(self) -> Batch:
        rows = [super(ThreeRows, self).__next__() for _ in range(3)]
        ids, labels, positions = (
            torch.cat([getattr(row, name) for row in rows]) for name in ("input_ids", "labels", "position_ids")
        )
        empty = self.tokens // 4
        ids[2, -empty:], labels[2, -empty:], positions[2, -empty:] = 0, -100, torch.arange(empty)
        return Batch(ids, labels, positions, 3, ids.numel() - empty, int((labels[:, 1:] != -100).sum()))


def trainer_of(
    graphs: str,
    rule: str = "momentum",
    data: type = Packed,
    count: int = 5,
    watched: bool = False,
    peel: str = "none",
    tied: bool = True,
    compute: str = "bfloat16",
) -> VoteTrainer:
    prime_device.make_deterministic("cuda")
    table = manifolds.build("compact" if rule == "compact" else "prime-harmonic")
    model = gaussian_model({**config_of("toy"), "tie_word_embeddings": tied}, table, "cuda")
    settings: dict[str, Any] = {"grad_accum": count, "lr": 1e-3, "device": "cuda", "compute": compute, "warmup": 0}
    recipe = Recipe(steps=50, vote_rule=cast(Any, rule), cuda_graphs=cast(Any, graphs), **settings)
    watch = NightWatch(
        LayerPeel.parse(peel),
        AntigravitySentinel(),
        TrainingGovernor.for_rule(rule),
        MemoryContingency(Shape(96, (batches := data(4096, 96)).batch_size, count)),
    )
    return VoteTrainer(model, cast(Any, batches), recipe, watch if watched else None)


def state_of(trainer: VoteTrainer) -> dict[str, torch.Tensor]:
    state = {f"{n}.indices": g.indices for n, g in trainer.grids.items()}
    for name, grid in trainer.grids.items():
        state |= {f"{name}.{k}": v for k, v in grid.vote_state().items()}
    return {k: v.cpu().clone() for k, v in {**state, **trainer.floats}.items()}


@needs_card
@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize("rule", ["momentum", "compact"])
def test_two_recorded_runs_are_bit_for_bit_the_same(rule: str, watched: bool) -> None:
    trainers = [trainer_of("on", rule, watched=watched) for _ in range(2)]
    for _ in range(4):
        losses = [t.step().loss for t in trainers]
        assert losses[0] == losses[1] and math.isfinite(losses[0])
    assert all(t.caster.graph is not None and t.caster.graph.recorded for t in trainers)
    states = [state_of(t) for t in trainers]
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


def unrecorded(trainer: VoteTrainer) -> VoteTrainer:
    """The same trainer, who queues every micro-batch anew."""
    trainer.caster.recordable = lambda batch: False  # type: ignore[method-assign]
    return trainer


@needs_card
@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize("rule", ["momentum", "compact"])
def test_a_recorded_run_is_bit_for_bit_one_that_is_not(rule: str, watched: bool) -> None:
    recorded, ordinary = trainer_of("on", rule, watched=watched), unrecorded(trainer_of("on", rule, watched=watched))
    for _ in range(4):
        assert recorded.step().loss == ordinary.step().loss
    assert recorded.caster.graph is not None and recorded.caster.graph.recorded
    assert ordinary.caster.graph is not None and not ordinary.caster.graph.recorded
    a, b = state_of(recorded), state_of(ordinary)
    assert all(torch.equal(a[k], b[k]) for k in a)


@needs_card
@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize(
    "changes",
    [{"tied": False}, {"compute": "float32"}, {"data": ThreeRows}, {"data": ThreeRows, "tied": False, "count": 1}],
    ids=str,
)
def test_other_models_types_and_shapes_are_recorded_to_the_same_bits(changes: dict[str, Any], watched: bool) -> None:
    recorded, ordinary = (trainer_of("on", watched=watched, **changes) for _ in range(2))
    unrecorded(ordinary)
    for _ in range(4):
        assert recorded.step().loss == ordinary.step().loss
    assert recorded.caster.graph is not None and recorded.caster.graph.recorded
    a, b = state_of(recorded), state_of(ordinary)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@needs_card
def test_a_return_to_a_checkpoint_is_the_same_with_recordings_and_without() -> None:
    recorded, ordinary = trainer_of("on", watched=True), unrecorded(trainer_of("on", watched=True))
    for trainer in (recorded, ordinary):
        trainer.step()
        trainer.step()
        content = {"model": model_tensors(trainer.model), "votes": trainer.votes(), "train_state": trainer.state()}
        content = copy.deepcopy(content)
        trainer.step()
        trainer.roll_back(content)
        for _ in range(3):
            trainer.step()
    assert recorded.caster.graph is not None and recorded.caster.graph.recorded and recorded.done == 5
    a, b = state_of(recorded), state_of(ordinary)
    assert all(torch.equal(a[k], b[k]) for k in a)


@needs_card
def test_without_recordings_the_votes_are_nearly_the_same() -> None:
    """``off`` computes the head at the answers alone: other shapes of products, other roundings."""
    recorded, ordinary = trainer_of("on"), trainer_of("off")
    for _ in range(4):
        assert recorded.step().loss == pytest.approx(ordinary.step().loss, rel=1e-3)
    assert ordinary.caster.graph is None
    a, b = state_of(recorded), state_of(ordinary)
    weights = {k: t for k, t in a.items() if k.endswith("indices")}
    differing = sum(int((t != b[k]).sum()) for k, t in weights.items())
    assert differing <= sum(t.numel() for t in weights.values()) // 10


@needs_card
@pytest.mark.parametrize("peel", ["none", "1:2:1"])
def test_a_run_on_a_card_resumes_to_the_same_bits(peel: str) -> None:
    whole, first = trainer_of("on", watched=True, peel=peel), trainer_of("on", watched=True, peel=peel)
    for _ in range(7):
        whole.step()
    for _ in range(4):
        first.step()
    content = copy.deepcopy({"model": model_tensors(first.model), "votes": first.votes(), "train_state": first.state()})
    second = trainer_of("on", watched=True, peel=peel)
    copy_tensors(second.model, content["model"])
    second.restore(content)
    for _ in range(3):
        second.step()
    a, b = state_of(whole), state_of(second)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@needs_card
@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_watch_finds_the_same_in_recorded_micro_batches(count: int) -> None:
    recorded, ordinary = (trainer_of("on", data=Endless, count=count, watched=True) for _ in range(2))
    unrecorded(ordinary)
    for step in range(5):
        a, b = recorded.step(), ordinary.step()
        assert a.loss == b.loss
        assert a.agreement.keys() == b.agreement.keys() and (step == 0 or a.agreement)
        for name, pair in b.agreement.items():
            assert a.agreement[name] == pytest.approx(pair, abs=1e-3)
        if b.seconded is None:
            assert a.seconded is None and step == 0
        else:
            assert a.seconded == pytest.approx(b.seconded, abs=1e-3)
        for name, grid in recorded.grids.items():
            mine, other = grid.hearing, ordinary.grids[name].hearing
            assert grid.heard and mine.followed.share == pytest.approx(other.followed.share, abs=1e-3)
            assert mine.obeyed.share == pytest.approx(other.obeyed.share, abs=1e-3)
    assert recorded.caster.graph is not None and recorded.caster.graph.recorded
    assert len(recorded.caster.graph._graphs) == {1: 1, 2: 2, 5: 3}[count]


@needs_card
@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize("k", [0, 3, 4])
def test_a_recorded_micro_batch_that_is_not_finite_leaves_no_trace(watched: bool, k: int) -> None:
    trainer = trainer_of("on", watched=watched)
    trainer.step()
    trainer.step()
    assert trainer.caster.graph is not None and trainer.caster.graph.recorded
    trainer.ballot.open("cast", trainer.done, 2, 5)
    batch = next(trainer.batches)
    before = state_of(trainer)
    assert math.isfinite(cast(float, trainer.caster.cast(batch, Turn(trainer.done, 2, trainer.shape.grad_accum, 1.0))))
    assert not torch.equal(state_of(trainer)["model.embed_tokens.grid.votes"], before["model.embed_tokens.grid.votes"])
    # A scale that is no number: neither is the loss.
    grid = trainer.grids["model.layers.1.mlp.down_proj.grid"]
    scale = grid.scale.clone()
    before, gradients = state_of(trainer), {n: p.grad.clone() for n, p in trainer.floats.items()}
    grid.scale.fill_(math.nan)
    assert trainer.caster.cast(batch, Turn(trainer.done, k, trainer.shape.grad_accum, 1.0)) is None
    grid.scale.copy_(scale)
    after = state_of(trainer)
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert all(torch.equal(gradients[n], p.grad) for n, p in trainer.floats.items())
    assert math.isfinite(cast(float, trainer.caster.cast(batch, Turn(trainer.done, k, trainer.shape.grad_accum, 1.0))))


@needs_card
def test_where_memory_is_short_nothing_is_recorded_and_the_run_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, other = trainer_of("on"), unrecorded(trainer_of("on"))

    def short(self: Any, memory: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr("micro_batch_graph.MicroBatchGraph._passes", short)
    for _ in range(3):
        result, wanted = trainer.step(), other.step()
        assert result.loss == wanted.loss
    assert trainer.caster.graph is None
    a, b = state_of(trainer), state_of(other)
    assert all(torch.equal(a[k], b[k]) for k in a)


@needs_card
def test_memory_that_really_runs_out_while_something_is_recorded_costs_the_recording_alone() -> None:
    """The limit is set when the first recording begins: what is in use, and a little."""
    trainer, other = trainer_of("on", watched=True), unrecorded(trainer_of("on", watched=True))
    total = torch.cuda.get_device_properties(0).total_memory
    assert trainer.caster.graph is not None
    prepare, limited = trainer.caster.graph._prepare, []

    def under_a_limit(example: Any) -> Any:
        memory = prepare(example)
        if not limited:
            torch.cuda.empty_cache()
            limited.append((torch.cuda.memory_reserved() + (1 << 20)) / total)
            torch.cuda.set_per_process_memory_fraction(limited[0])
        return memory

    def free_again() -> None:
        torch.cuda.set_per_process_memory_fraction(1.0)
        release()

    release, trainer.caster.graph._prepare = trainer.caster.free, under_a_limit  # type: ignore[method-assign]
    trainer.caster.free = free_again  # type: ignore[method-assign]
    events = []
    try:
        for _ in range(3):
            result, wanted = trainer.step(), other.step()
            events += result.events
            assert result.loss == wanted.loss
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert limited and ("cuda_graphs", {"state": "off", "reason": "out of memory"}) in events
    a, b = state_of(trainer), state_of(other)
    assert all(torch.equal(a[k], b[k]) for k in a)


@needs_card
def test_gather_rows_adds_up_in_the_order_of_the_tokens() -> None:
    ids = torch.randint(9, (300,), device="cuda")
    gradient = torch.randn(300, 130, device="cuda")
    summed, rows = ghost_kernels_cuda.gather_rows(gradient, ids)
    kept = rows >= 0
    assert rows[kept].tolist() == sorted(set(ids.tolist()))
    wanted = torch.zeros(9, 130).index_add_(0, ids.cpu(), gradient.cpu())
    assert torch.equal(summed[kept].cpu(), wanted[rows[kept].cpu()])
