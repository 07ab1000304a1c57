"""What ranks send each other in one step is what the formulas of docs/parallelism.md say."""

import gc
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from nemomodel.config.pattern import LayerKind
from nemomodel.config.schema import Config
from nemomodel.data.batch import open_data
from nemomodel.model.layout import activation_bytes
from nemomodel.model.nemotron import Nemotron
from nemomodel.model.portion import Portion
from nemomodel.model.traffic import step_traffic
from nemomodel.parallel.mcore import Ranks, start_ranks, stop_ranks
from nemomodel.parallel.stage import Stage
from nemomodel.train.loop import build_engine
from nemomodel.train.step import DeviceBatch, count_targets, forward_backward, update
from tests.ranks.test_layouts import LAYOUTS as ALL_LAYOUTS
from tests.ranks.test_layouts import MODEL
from tests.ranks.test_train import OVERLAP, VOCAB, make_config

LAYOUTS = ALL_LAYOUTS | {"dp2": (2, ""), "pp2 vpp2 ep2": (4, "pp=2 vpp=2 ep=2")}
RECOMPUTE = 'train.recompute=["mamba","attention","moe","mlp"]'


class Wire(TorchDispatchMode):
    """Counts the bytes that this rank sends, by the name of the process group.

    The dispatcher sees every collective, whoever calls it and under whatever name.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sent: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self._count(func.name().removeprefix("c10d::"), args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: Any) -> None:
        group = dist.ProcessGroup.unbox(next(a for a in args if isinstance(a, torch.ScriptObject)))
        n = group.size()
        if name in ("send", "recv_"):  # of pipelines alone, sometimes by the group of all ranks
            self.sent["pp"] += _bytes(args[0]) * (name == "send")
            return
        whole = {
            "allreduce_": lambda tensors, *_: 2 * _bytes(tensors),
            "_allgather_base_": lambda gathered, *_: _bytes(gathered),
            "allgather_": lambda gathered, *_: _bytes(gathered),
            "_reduce_scatter_base_": lambda _, summed, *__: _bytes(summed),
            "allgather_into_tensor_coalesced_": lambda gathered, *_: _bytes(gathered),
            "reduce_scatter_tensor_coalesced_": lambda _, summed, *__: _bytes(summed),
            "alltoall_base_": lambda _, handed_in, *__: _bytes(handed_in),
        }[name](*args)
        self.sent[group.group_name] += whole * (n - 1) / n


def _bytes(tensors: Any) -> int:
    return tensors.nbytes if isinstance(tensors, torch.Tensor) else sum(map(_bytes, tensors))


def _axes(ranks: Ranks) -> dict[str, str]:
    """Axis of each process group, by its name."""
    g = ranks.groups
    groups = {
        "tp": g.tp,
        "cp": g.cp,
        "tp_cp": g.tp_cp,
        "ep": g.ep,
        "etp": g.expt_tp,
        "dp": g.dp_cp,
        "expert_dp": g.expt_dp,
        "norm": g.intra_dist_opt,
        "all": dist.group.WORLD,
    }
    names = {group.group_name: axis for axis, group in groups.items()}
    assert len(names) == len(groups)
    return names | {"pp": "pp"}


def _kept(model: Nemotron, batch: DeviceBatch, targets: torch.Tensor) -> int:
    """Bytes that the forward pass of a micro-batch keeps for the backward pass."""
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        kept[storage.data_ptr()] = storage
        return t

    shape = model.sent_shape(*batch.ids_BS.shape)
    received = None if model.stage.first else torch.randn(shape, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        losses = model.losses(
            *(batch.ids_BS, batch.labels_BS, batch.loss_mask_BS, batch.documents),
            num_targets=targets,
            num_sequences=1,
            received=received,
        )
    keep(losses.total)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    return sum(storage.nbytes() for at, storage in kept.items() if at not in weights)


def _steps(config: Config, path: Path, number: int) -> None:
    """Train for `number` steps; write down what the last one sent, and what a pass keeps."""
    ranks = start_ranks(config)
    engine = build_engine(config, ranks)
    data = open_data(config.data, train=config.train, vocab_size=VOCAB, seed=config.run.seed)
    for step in range(1, number + 1):
        pieces = data.batch(step - 1, dp_rank=ranks.dp_rank, dp_size=ranks.dp_size)
        batches = [DeviceBatch.of(piece, ranks.device) for piece in pieces]
        with Wire() as wire:
            targets, _ = count_targets(batches, engine, ranks, stop=False)
            losses = forward_backward(
                batches,
                engine,
                ranks,
                num_targets=targets,
                num_sequences=config.train.global_batch_size,
                step=step,
            )
            update(losses, engine, step=step)
    axes = _axes(ranks)
    result = {
        "sent": {axes[name]: size for name, size in wire.sent.items()},
        "kept": [_kept(chunk.module, batches[0], targets) for chunk in engine.chunks],
        "pipeline_rank": ranks.mesh.pp.rank,
    }
    (path / f"{ranks.rank}.json").write_text(json.dumps(result))
    stop_ranks()


class Run(NamedTuple):
    portion: Portion
    sent: dict[str, float]
    """Bytes of all ranks together in one step, by axis."""
    kept: list[tuple[int, list[int]]]
    """Of every rank its place in the pipeline, and bytes kept of a micro-batch by each stage."""


@pytest.fixture
def run_step(run_ranks: Callable, tmp_path: Path) -> Callable[..., Run]:
    """run_step(layout, *overrides, steps=1): what the last of those steps sent."""

    def start(layout: str, *overrides: str, steps: int = 1) -> Run:
        world, degrees = LAYOUTS[layout]
        axes = [f"parallel.{degree}" for degree in degrees.split()]
        config = make_config(tmp_path, *MODEL, *axes, *overrides)
        gc.collect()
        run_ranks(world, _steps, config, tmp_path, steps)
        results = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(world)]
        sent: Counter[str] = Counter()
        for result in results:
            sent.update(result["sent"])
        # The one number that is not in the formulas: the gradient norm, FP32, summed once.
        assert sent.pop("norm") == world * 2 * 4 * (world - 1) / world
        kept = [(result["pipeline_rank"], result["kept"]) for result in results]
        return Run(Portion(config, world), {k: n for k, n in sent.items() if n}, kept)

    return start


def formula(portion: Portion) -> dict[str, float]:
    """Bytes of all ranks together in one step, by axis."""
    sent: Counter[str] = Counter()
    for stages in portion.stages:
        for axis, sizes in step_traffic(portion, stages).items():
            sent[axis] += sum(sizes.values()) * portion.ranks / len(portion.stages)
    return sent


def kept_on_a_cpu(portion: Portion, stage: Stage) -> int:
    """The estimate without what experts keep on a GPU only: the input of fc2."""
    moe, recomputed = portion.config.model.moe, portion.config.train.recompute
    copies = portion.tokens * moe.top_k * portion.config.parallel.etp
    passes = 0 if "moe" in recomputed else portion.passes(stage).count(LayerKind.MOE)
    fc2_input = copies * moe.ffn_size // portion.config.parallel.etp * portion.width
    return activation_bytes(portion, stage) - passes * fc2_input


CASES = {
    "tp2": ("tp2",),
    "cp2": ("cp2",),
    "ep2": ("ep2",),
    "etp2": ("etp2",),
    "pp2": ("pp2",),
    "dp2": ("dp2",),
    "tp2 cp2 ep4 recomputed": ("tp2 cp2 ep4", RECOMPUTE),
    "pp2 ep2 dp2": ("pp2 ep2 dp2",),
    "tp4, two key/value heads": ("tp4",),
    "cp4": ("cp4",),
    "pp4": ("pp4",),
    "tp2 etp2 ep2 recomputed": ("tp2 etp2 ep2", RECOMPUTE),
    "tp2 pp2 ep2": ("tp2 pp2 ep2",),
    "tp2 cp2 ep2 dp2": ("tp2 cp2 ep2 dp2",),
    "pp2 vpp2 ep2": ("pp2 vpp2 ep2",),
    "pp2 ep2 dp2, no MTP": ("pp2 ep2 dp2", "model.mtp=none"),
    "dp2, pieces of two": ("dp2", "train.micro_batch_size=2"),
}
FAST = 8


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=[pytest.mark.slow] * (i >= FAST)) for i, c in enumerate(CASES)]
)
def test_ranks_send_and_keep_what_the_formulas_say(case: str, run_step: Callable[..., Run]) -> None:
    run = run_step(*CASES[case])
    assert run.sent == pytest.approx(formula(run.portion), rel=1e-12)
    # Ranks get more copies or fewer than others: the mean is that of even routing.
    for rank, stages in enumerate(run.portion.stages):
        alike = [kept for at, kept in run.kept if at == rank]
        for stage, kept in zip(stages, zip(*alike, strict=True), strict=True):
            assert mean(kept) == pytest.approx(kept_on_a_cpu(run.portion, stage), rel=0.02), stage


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["dp2", "tp2 cp2 ep2 dp2"])
def test_bytes_of_bf16_are_those_of_the_formulas(layout: str, run_step: Callable[..., Run]) -> None:
    run = run_step(layout, "precision.recipe=bf16")
    assert run.sent == pytest.approx(formula(run.portion), rel=1e-12)


@pytest.mark.slow
def test_overlap_gathers_weights_once(run_step: Callable[..., Run]) -> None:
    """The second step gathers the weights that the first one has made."""
    run = run_step("dp2", *OVERLAP, steps=2)
    assert run.sent == pytest.approx(formula(run.portion), rel=1e-12)


def test_latent_experts_move_latent_over_hidden_of_a_plain_moe(
    run_step: Callable[..., Run],
) -> None:
    """Tokens there and back; gates and counts do not depend on the width."""
    moved = {}
    for overrides in ((), ("model.moe.latent_size=none",)):
        run = run_step("ep2", *overrides)
        (stages,) = run.portion.stages
        sizes = step_traffic(run.portion, stages)["ep"]
        moved[overrides] = run.sent["ep"] - 2 * (sizes["gates"] + sizes["counts"])
    latent, plain = moved.values()
    model = run.portion.config.model
    assert latent / plain == 16 / model.hidden_size == 0.5
