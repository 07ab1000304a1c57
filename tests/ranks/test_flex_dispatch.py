"""The dispatch by fused kernels: the same sums, gradients and counts as by plain all-to-all."""

import dataclasses
import inspect
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from nemomodel.config.load import ConfigError
from nemomodel.config.schema import MoeConfig
from nemomodel.model.moe import LatentMoE
from nemomodel.parallel import flex_dispatch
from nemomodel.parallel.mcore import start_ranks, stop_ranks
from nemomodel.parallel.mesh import Axis, Mesh
from tests.close import assert_close
from tests.ranks import fused_kernels
from tests.ranks.test_train import make_config

from megatron.core.transformer.moe import fused_a2a  # isort: skip (after the CPU seam)
from megatron.core.transformer.moe.token_dispatcher import MoEFlexTokenDispatcher  # isort: skip

DISPATCHERS = ("deepep", "hybridep")
MOE = MoeConfig(num_experts=8, top_k=3, ffn_size=24, latent_size=16, shared_ffn_size=8)
TOKENS, WIDTH = 33, 32


def _build(mesh: Mesh, dtype: torch.dtype, reach: int) -> LatentMoE:
    """The same weights for every dispatcher; experts from `reach` on get nothing, 0 a lot."""
    torch.manual_seed(3)
    layer = LatentMoE(MOE, WIDTH, dtype=dtype, mesh=mesh)
    with torch.no_grad():
        for param in layer.parameters():
            param.copy_(torch.randn(param.shape) * 0.3)
        layer.router.expert_bias.zero_()
        layer.router.expert_bias[0] = 0.5
        layer.router.expert_bias[reach:] = -10.0
    return layer


def _results(layer: LatentMoE, rank: int, reach: int) -> dict[str, Tensor]:
    """What a rank computes for tokens of its own, and all gradients."""
    generator = torch.Generator().manual_seed(rank)
    shape, dtype = (TOKENS, 1, WIDTH), layer.router.weight.dtype
    x, dy = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    y, count_E, _ = layer(x.requires_grad_())
    params = dict(layer.named_parameters())
    gradients = torch.autograd.grad(y, [x, *params.values()], dy)
    assert count_E.sum() == TOKENS * MOE.top_k
    assert not count_E[reach:].any()
    assert count_E[0] > TOKENS / 2
    return {"y": y, "count": count_E} | dict(zip(["dx", *params], gradients, strict=True))


def _compare(overrides: list[str], precision: torch.dtype, reach: int, path: Path) -> None:
    fused_kernels.install()
    ranks = start_ranks(make_config(path / f"rank_{torch.distributed.get_rank()}", *overrides))
    expected = _results(_build(ranks.mesh, precision, reach), ranks.rank, reach)
    limit = 1e-6 if precision == torch.float32 else 8e-3
    for dispatcher in DISPATCHERS:
        mesh = dataclasses.replace(ranks.mesh, dispatcher=dispatcher)
        layer = _build(mesh, precision, reach)
        assert isinstance(layer.dispatch, flex_dispatch._FlexDispatch)
        for _ in range(2):  # buffers are kept from one call to the next
            results = _results(layer, ranks.rank, reach)
        for name, value in expected.items():
            if name == "count":
                assert torch.equal(results[name], value), dispatcher
                continue
            assert value.any() or ".experts." in f".{name}", name
            where = f"{name} on rank {ranks.rank} by {dispatcher}"
            assert_close(results[name], value, limit=limit, name=where)
    stop_ranks()


@pytest.mark.parametrize(
    ("precision", "reach"),
    [
        pytest.param(torch.float32, 7, id="fp32"),
        pytest.param(torch.bfloat16, 7, id="bf16"),
        pytest.param(torch.float32, 3, id="ranks-without-tokens"),
    ],
)
@pytest.mark.parametrize("layout", ["ep=2", "etp=2", "ep=4", "ep=2 etp=2"])
def test_fused_kernels_do_what_the_all_to_all_does(
    layout: str, precision: torch.dtype, reach: int, run_ranks: Callable, tmp_path: Path
) -> None:
    """Outputs, counts, and the gradients of tokens, router and experts; experts without tokens,
    and one with very many."""
    sizes = dict(part.split("=") for part in layout.split())
    world = int(sizes.get("ep", 1)) * int(sizes.get("etp", 1))
    overrides = [f"parallel.{part}" for part in layout.split()]
    # The tests' MoE has 4 experts; only the process groups come from this config.
    run_ranks(world, _compare, overrides, precision, reach, tmp_path)


def test_places_are_those_of_megatron_core() -> None:
    """The same map of tokens to (rank, expert there) as its flex dispatcher makes."""
    ep, etp, local = 3, 2, 4
    mesh = Mesh(ep=Axis(size=ep), etp=Axis(size=etp), experts=Axis(size=ep * etp))
    dispatch = flex_dispatch.make(ep * local, dataclasses.replace(mesh, dispatcher="deepep"))
    expert_TK = torch.rand(20, ep * local).topk(5).indices
    gate_TK = torch.rand(20, 5)
    place_TK, place_gate_TK = dispatch._places(expert_TK, gate_TK)
    gate_TE = torch.zeros(20, ep * local).scatter(1, expert_TK, gate_TK)
    like = SimpleNamespace(tp_size=etp, ep_size=ep, num_local_experts=local)
    _, expected = MoEFlexTokenDispatcher._initialize_metadata(like, gate_TE > 0, gate_TE)
    places = torch.zeros(20, dispatch.num_places).scatter(1, place_TK, place_gate_TK)
    assert torch.equal(places, expected.flatten(1))


def test_megatron_core_calls_the_kernels_as_the_stand_ins_are_called() -> None:
    """Of the functions that exist only with the package, the parameters by which we call them."""
    parameters = {
        fused_a2a.FusedDispatch: "ctx x token_indices token_probs num_experts group",
        fused_a2a.FusedCombine: "ctx x group handle",
        fused_a2a.HybridEPDispatch: "ctx x routing_map probs group num_local_experts",
        fused_a2a.HybridEPCombine: "ctx x handle num_permuted_tokens pad_multiple",
    }
    for function, expected in parameters.items():
        found = inspect.signature(function.forward).parameters
        names = expected.split()
        assert list(found)[: len(names)] == names, function
        rest = list(found.values())[len(names) :]
        assert all(p.default is not inspect.Parameter.empty for p in rest), function


@pytest.mark.parametrize("dispatcher", DISPATCHERS)
def test_missing_kernels_are_named_at_the_start(dispatcher: str, tmp_path: Path) -> None:
    overrides = (f'parallel.dispatcher="{dispatcher}"', "parallel.ep=2", "precision.recipe=bf16")
    config = make_config(tmp_path, *overrides)
    torch.distributed.init_process_group("fake", rank=0, world_size=2)
    try:
        with pytest.raises(ConfigError, match=f'{dispatcher}.*need GPUs.*use "alltoall"'):
            start_ranks(config)
    finally:
        torch.distributed.destroy_process_group()
    with pytest.raises(ConfigError, match=f'{dispatcher}.*deep_ep.*install.*"alltoall"'):
        flex_dispatch.require(dispatcher, torch.device("cuda"))
