"""Faults of other trainers of such models, as tests: each names where it was reported.

What is compared is the gradient of the loss of all sequences in one pass, by plain autograd of the
model alone: no ranks, no micro-batches, no optimizer.
"""

import gc
import math
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from nemomodel.checkpoint.state import Engine, random_states
from nemomodel.config.schema import Config
from nemomodel.data.batch import MicroBatch, open_data
from nemomodel.data.indexed import IndexedWriter
from nemomodel.model.init import initialize
from nemomodel.model.nemotron import Losses, Nemotron
from nemomodel.ops.documents import Documents
from nemomodel.parallel.mcore import Ranks, start_ranks, stop_ranks
from nemomodel.train.loop import build_engine
from nemomodel.train.step import DeviceBatch, count_targets, forward_backward, update
from tests.close import assert_close
from tests.ranks.gradients import whole_gradients
from tests.ranks.test_train import (
    VOCAB,
    assert_same_state,
    make_config,
    read_records,
    read_state,
    run_to_end,
)

MODEL = (
    'model.layer_pattern="M*E-"',
    "model.mamba.num_heads=8",
    "model.mamba.num_groups=4",
    "model.attention.num_heads=8",
    "model.init_std=0.1",  # gradients of A_log far above the rounding of their terms
    "train.stop_after=1",
    "train.validation_sequences=4",  # as many as a short file has
    "optim.grad_clip=none",
)
BATCH, LENGTH = 4, 32


def write_documents(path: Path, windows: list[list[int]]) -> None:
    """A token file for `make_config(path)` whose windows have documents of these lengths.

    A batch takes as many windows as there are, so each step sees all of them in some order.
    """
    assert len(windows) == BATCH
    path.mkdir(parents=True)
    generator = np.random.default_rng(7)
    for name in ("train", "validation"):
        writer = IndexedWriter(path / name, dtype=np.dtype("<u2"))
        for lengths in [*windows, [1]]:  # the last window reads the token after it
            assert sum(lengths) in (LENGTH, 1)
            for length in lengths:
                writer.add(generator.integers(0, VOCAB, length))
        writer.finish()


def batches(config: Config, *, ranks: int = 1) -> list[list[MicroBatch]]:
    """The first global batch: the micro-batches of every data-parallel rank."""
    data = open_data(config.data, train=config.train, vocab_size=VOCAB, seed=config.run.seed)
    return [data.batch(0, dp_rank=rank, dp_size=ranks) for rank in range(ranks)]


def in_one_pass(config: Config) -> DeviceBatch:
    pieces = batches(config)[0]
    fields = ("ids_BS", "labels_BS", "loss_mask_BS", "document_BS")
    whole = MicroBatch(*(torch.cat([getattr(piece, name) for piece in pieces]) for name in fields))
    return DeviceBatch.of(whole, torch.device("cpu"))


def make_model(config: Config) -> Nemotron:
    model = Nemotron(config.model, dtype=torch.float32)
    initialize(model, seed=config.run.seed)
    return model


def plain_gradients(model: Nemotron, batch: DeviceBatch) -> dict[str, Tensor]:
    names, params = zip(*model.named_parameters(), strict=True)
    loss = model.loss(batch.ids_BS, batch.labels_BS, batch.loss_mask_BS, batch.documents)
    return dict(zip(names, torch.autograd.grad(loss, params), strict=True))


def check_trainer(
    run_ranks: Callable, path: Path, layouts: list[tuple[int, str]], *overrides: str
) -> None:
    """One step of the trainer under each layout (ranks, keys) has the plain gradient and losses."""
    config = make_config(path / "files", *MODEL, *overrides)
    model, batch = make_model(config), in_one_pass(config)
    expected = plain_gradients(model, batch)
    assert all(gradient.isfinite().all() for gradient in expected.values())
    inputs = (batch.ids_BS, batch.labels_BS, batch.loss_mask_BS, batch.documents)
    cross_entropy, num_targets = model.cross_entropy(*inputs)
    losses = (cross_entropy / num_targets).tolist()
    for number, (world, layout) in enumerate(layouts):
        keys = [f"parallel.{key}" if "." not in key else key for key in layout.split()]
        run_dir = path / f"run_{number}"
        here = make_config(path / "files", f"run.dir={run_dir}", *MODEL, *overrides, *keys)
        gc.collect()
        run_ranks(world, run_to_end, here)
        (record,) = read_records(run_dir)
        names = ["loss/lm", *(f"loss/mtp_{k}" for k in range(1, len(losses)))]
        for name, loss in zip(names, losses, strict=True):
            wanted = None if math.isnan(loss) else pytest.approx(loss, rel=1e-6)
            assert record[name] == wanted, (name, layout)
        state = read_state(run_dir, 1)
        for name, gradient in expected.items():
            # The first moment after one step is a tenth of the gradient.
            (moment,) = (state[k] for k in state if k.endswith(f".exp_avg.model.{name}"))
            assert_close(moment * 10, gradient, limit=1e-5, name=f"{name} with {layout or world}")


def test_ranks_and_micro_batches_with_unevenly_many_targets(
    run_ranks: Callable, tmp_path: Path
) -> None:
    """NVIDIA/Megatron-LM#7452: the MTP loss is divided by the targets of its own rank; two rows
    with 4 and 2 have the gradient 4.0 on two ranks and 3.25 on one. Here one row has none."""
    write_documents(tmp_path / "files", [[1] * 32, [32], [1] * 16 + [16], [2] * 16])
    config = make_config(tmp_path / "files", *MODEL)
    targets = [sum(int(b.loss_mask_BS.sum()) for b in rank) for rank in batches(config, ranks=4)]
    assert sorted(targets) == [0, 15, 16, 31]
    layouts = [(2, ""), (4, "")]  # two micro-batches each, and one
    check_trainer(run_ranks, tmp_path, layouts)


@pytest.mark.parametrize(
    ("windows", "layouts"),
    [
        pytest.param(
            [[1] * 16 + [16], [16] + [1] * 16, [1] * 24 + [8], [32]],
            [(4, "tp=2 cp=2")],
            id="half",
        ),
        pytest.param(
            [[1] * 32, [1] * 32, [1] * 9 + [2] + [1] * 21, [1] * 32],
            [(2, "cp=2"), (4, "cp=4")],
            id="one-target",
        ),
    ],
)
def test_targets_on_some_context_parallel_ranks_only(
    windows: list[list[int]],
    layouts: list[tuple[int, str]],
    run_ranks: Callable,
    tmp_path: Path,
) -> None:
    """NVIDIA/Megatron-LM#7513: with one target in all the gradient is halved by CP 2, and divided
    by 4 by CP 4. Then the MTP heads have no target at all, and add nothing."""
    write_documents(tmp_path / "files", windows)
    batch = in_one_pass(make_config(tmp_path / "files", *MODEL))
    per_rank = batch.loss_mask_BS.unflatten(1, (4, -1)).sum(-1)
    assert (per_rank == 0).any(1).sum() >= 3
    check_trainer(run_ranks, tmp_path, layouts)


@pytest.mark.parametrize(
    ("layouts", "overrides"),
    [
        pytest.param([(4, "cp=4"), (2, "tp=2")], (), id="two-depths"),
        pytest.param(
            [(4, "cp=4"), (4, "tp=2 cp=2")],
            ("train.seq_length=8", "model.mtp.num_depths=3"),
            id="pieces-shorter-than-depths",
        ),
    ],
)
def test_mtp_looks_over_the_borders_of_ranks(
    layouts: list[tuple[int, str]],
    overrides: tuple[str, ...],
    run_ranks: Callable,
    tmp_path: Path,
) -> None:
    """NVIDIA/Megatron-LM#7498: with context parallelism labels, masks and embeddings of MTP are
    shifted within a rank. Pieces of two positions with three depths look over two borders."""
    config = make_config(tmp_path / "files", *MODEL, *overrides)
    id_SB = in_one_pass(config).documents.id_SB
    borders = range(len(id_SB) // 4, len(id_SB), len(id_SB) // 4)
    crossed = [bool((id_SB[s - 1] == id_SB[s]).any()) for s in borders]
    assert all(crossed), "documents that end with the ranks would hide the fault"
    assert (id_SB[1:] != id_SB[:-1]).any(), "nothing is packed"
    check_trainer(run_ranks, tmp_path, layouts, *overrides)


def _run_with_own_streams(config: Config, seed: int, path: Path) -> None:
    rank = dist.get_rank()
    for seed_ in (random.seed, np.random.seed, torch.manual_seed):
        seed_(seed + rank)
    run_to_end(config)
    path.mkdir(exist_ok=True)
    torch.save(random_states(), path / f"{rank}.pt")


@pytest.mark.parametrize("recipe", ["bf16", pytest.param("nvfp4", marks=pytest.mark.slow)])
def test_every_rank_of_the_experts_resumes_its_own_random_stream(
    recipe: str, run_ranks: Callable, tmp_path: Path
) -> None:
    """NVIDIA/Megatron-LM#6858: random states are saved once per data-parallel rank, so after a
    resume with EP they were wrong on 252 of 256 ranks. Stochastic rounding (nvfp4) goes on too."""
    world = 2
    common = (f"precision.recipe={recipe}", f"parallel.ep={world}")

    def train(name: str, stop_after: int, seed: int) -> None:
        keys = (f"run.dir={tmp_path / name}", f"train.stop_after={stop_after}")
        config = make_config(tmp_path / "files", *MODEL, *common, *keys)
        run_ranks(world, _run_with_own_streams, config, seed, tmp_path / f"{name}_{stop_after}")

    train("straight", 2, 100)
    train("parts", 1, 100)
    train("parts", 2, 900)
    assert read_records(tmp_path / "parts") == read_records(tmp_path / "straight")
    assert_same_state(read_state(tmp_path / "parts", 2), read_state(tmp_path / "straight", 2))
    streams = set()
    for rank in range(world):
        straight, resumed = (
            torch.load(tmp_path / f"{name}_2" / f"{rank}.pt") for name in ("straight", "parts")
        )
        assert torch.equal(resumed["torch"], straight["torch"]), rank
        assert torch.equal(resumed["numpy"][0], straight["numpy"][0]), rank
        assert resumed["python"] == straight["python"], rank
        streams.add((resumed["torch"].numpy().tobytes(), resumed["python"]))
    assert len(streams) == world, "ranks with the same stream would hide the fault"


def _own_batches(config: Config, ranks: Ranks) -> list[DeviceBatch]:
    pieces = batches(config, ranks=ranks.dp_size)[ranks.dp_rank]
    return [DeviceBatch.of(piece, ranks.device) for piece in pieces]


def _backward(
    config: Config, engine: Engine, ranks: Ranks, pieces: list[DeviceBatch]
) -> tuple[dict[str, Tensor], Losses]:
    """Whole gradients of one global batch, and what this rank adds to it."""
    num_targets, _ = count_targets(pieces, engine, ranks, stop=False)
    number = config.train.global_batch_size
    losses = forward_backward(
        pieces, engine, ranks, num_targets=num_targets, num_sequences=number, step=1
    )
    return whole_gradients(engine, ranks), losses


BORDERS = ((11, 21), (16, 24), (7, 25), (8, 9))


def _three_documents(packed: bool) -> MicroBatch:
    """Sequences of three documents, each with letters of its own; only the second has targets."""
    ids, documents, masks = [], [], []
    for first, second in BORDERS:
        position = torch.arange(LENGTH)
        document = (position >= first).int() + (position >= second).int()
        ids.append(torch.randint(0, 100, (LENGTH,)) + 100 * document)
        documents.append(document if packed else torch.zeros_like(document))
        masks.append((position >= first) & (position < second - 1))
    ids_BS = torch.stack(ids)
    labels_BS = ids_BS.roll(-1, 1)
    return MicroBatch(ids_BS, labels_BS, torch.stack(masks), torch.stack(documents))


def _save_embedding_gradients(config: Config, path: Path) -> None:
    ranks = start_ranks(config)
    engine = build_engine(config, ranks)
    for packed in (True, False):
        torch.manual_seed(0)
        pieces = [
            DeviceBatch.of(MicroBatch(*(t.unsqueeze(0) for t in row)), ranks.device)
            for row in zip(*vars(_three_documents(packed)).values(), strict=True)
        ]
        gradients, _ = _backward(config, engine, ranks, pieces)
        if ranks.rank == 0:
            torch.save(gradients["embedding.weight"], path / f"{packed}.pt")
    stop_ranks()


@pytest.mark.parametrize("layout", ["cp=4", "tp=2", "tp=2 cp=2"])
def test_packed_documents_see_nothing_of_each_other(
    layout: str, run_ranks: Callable, tmp_path: Path
) -> None:
    """SkyRL#2056, prime-rl#3000: without `seq_idx` the Mamba state of one document goes on in the
    next. Borders on and off those of ranks; what one sees of another would have a gradient."""
    keys = [f"parallel.{key}" for key in layout.split()]
    config = make_config(tmp_path, *MODEL, "model.moe.aux_loss_coeff=0", *keys)
    world = config.parallel.tp * config.parallel.cp
    run_ranks(world, _save_embedding_gradients, config, tmp_path)
    packed, open_ = (torch.load(tmp_path / f"{name}.pt") for name in (True, False))
    before, inside, after = packed.split(100)
    assert inside.any()
    assert not before.any()
    assert not after.any()
    assert open_[:100].any(), "as one document it does see what comes before"


FORCED = 2


def _force_one_expert(model: Nemotron) -> None:
    for router in model.routers().values():
        router.expert_bias[FORCED] = 10.0


def _save_forced(config: Config, path: Path) -> None:
    ranks = start_ranks(config)
    engine = build_engine(config, ranks)
    _force_one_expert(engine.ddp.module)
    gradients, losses = _backward(config, engine, ranks, _own_batches(config, ranks))
    _, count = update(losses, engine, step=1)
    if ranks.rank == 0:
        torch.save((gradients, count), path)
    stop_ranks()


@pytest.mark.parametrize("layout", ["ep=2", "ep=4", "ep=2 etp=2"])
def test_experts_and_ranks_without_tokens(layout: str, run_ranks: Callable, tmp_path: Path) -> None:
    """TE#2966, torchtitan#2262: expert counts of no tokens. All choose one expert, so all ranks but
    those that hold it get nothing; the other experts' gradients are zero, not undefined."""
    keys = ("model.moe.top_k=1", "model.moe.normalize_gates=false")
    parallel = [f"parallel.{key}" for key in layout.split()]
    config = make_config(tmp_path, *MODEL, *keys, *parallel)
    model = make_model(config)
    _force_one_expert(model)
    expected = plain_gradients(model, in_one_pass(config))
    world = config.parallel.ep * config.parallel.etp
    run_ranks(world, _save_forced, config, tmp_path / "forced.pt")
    gradients, count = torch.load(tmp_path / "forced.pt")
    others = [e for e in range(4) if e != FORCED]
    # One router of the backbone, and one that both MTP depths pass.
    assert count[:, FORCED].tolist() == [BATCH * LENGTH, 2 * BATCH * LENGTH]
    assert not count[:, others].any()
    for name, gradient in expected.items():
        assert_close(gradients[name], gradient, limit=1e-5, name=name)
        if ".experts." in name:
            assert gradients[name][FORCED].any(), name
            assert not gradients[name][others].any(), name


def _save_biases(config: Config, path: Path) -> None:
    ranks = start_ranks(config)
    engine = build_engine(config, ranks)
    _, losses = _backward(config, engine, ranks, _own_batches(config, ranks))
    _, count = update(losses, engine, step=1)
    biases = {name: r.expert_bias for name, r in engine.ddp.module.routers().items()}
    torch.save((count, biases), path / f"rank_{ranks.rank}.pt")
    stop_ranks()


@pytest.mark.parametrize("layout", ["tp=2 ep=2", "cp=2 ep=4", "pp=2 ep=2"])
def test_router_biases_move_by_the_load_of_all_ranks(
    layout: str, run_ranks: Callable, tmp_path: Path
) -> None:
    """Megatron-LM#1545, Megatron-Bridge#947: routers collapse when a rank balances by the tokens
    that it saw, or by those of some ranks."""
    parallel = [f"parallel.{key}" for key in layout.split()]
    config = make_config(tmp_path, *MODEL, "model.moe.bias_update_rate=0.25", *parallel)
    model = make_model(config)

    def direction(pieces: list[MicroBatch]) -> tuple[Tensor, Tensor]:
        """The load of every router, and which way the biases go by it."""
        count = sum(
            model.losses(
                *(piece.ids_BS, piece.labels_BS, piece.loss_mask_BS),
                Documents.from_ids(piece.document_BS),
                num_targets=torch.ones(3),
                num_sequences=BATCH,
            ).count
            for piece in pieces
        )
        return count, (count.double().mean(1, keepdim=True) - count).sign()

    (pieces,) = batches(config)
    expected, up_or_down = direction(pieces)
    misled = [bool((direction(own)[1] != up_or_down).any()) for own in batches(config, ranks=2)]
    assert any(misled), "ranks that all see the load of the whole would hide the fault"
    wanted = dict(zip(model.routers(), 0.25 * up_or_down.float(), strict=True))
    run_ranks(4, _save_biases, config, tmp_path)
    seen = set()
    for rank in range(4):
        count, biases = torch.load(tmp_path / f"rank_{rank}.pt")
        assert torch.equal(count, expected)
        for name, bias in biases.items():
            assert torch.equal(bias, wanted[name]), (rank, name)
            seen.add(name)
    assert seen == wanted.keys()
