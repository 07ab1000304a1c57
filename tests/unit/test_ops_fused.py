"""Compiled passes: the gradients of the plain ones, and these where there is no compiler."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nemomodel.config.schema import MambaConfig, ModelConfig, MoeConfig
from nemomodel.model.init import initialize
from nemomodel.model.nemotron import Nemotron
from nemomodel.ops import fused, ssd
from nemomodel.ops.documents import Documents
from tests.close import rms_ratio

MODEL = ModelConfig(
    layer_pattern="MEM-",
    hidden_size=48,
    vocab_size=64,
    ffn_size=80,
    mamba=MambaConfig(num_heads=4, head_dim=16, num_groups=2, state_size=24, chunk_size=16),
    moe=MoeConfig(num_experts=4, top_k=2, ffn_size=40, shared_ffn_size=56, latent_size=32),
)
LENGTH = 200
"""Neither whole chunks nor whole blocks of them."""


def gradients(dtype: torch.dtype, *, documents: bool, compiling: bool) -> dict[str, Tensor]:
    """Of every parameter, and the loss."""
    model = Nemotron(MODEL, dtype=dtype)
    initialize(model, seed=1)
    ids_BS = torch.randint(64, (2, LENGTH), generator=torch.Generator().manual_seed(2))
    mask_BS = torch.ones_like(ids_BS, dtype=torch.bool)
    document_BS = torch.arange(LENGTH).expand(2, -1).div(37, rounding_mode="floor")
    packed = Documents.from_ids(document_BS) if documents else None
    fused.use_compiler(compiling)
    try:
        loss = model.loss(ids_BS, ids_BS.roll(-1, 1), mask_BS, packed)
        loss.backward()
    finally:
        fused.use_compiler(False)
    return {"loss": loss} | {name: p.grad for name, p in model.named_parameters()}


def worst(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    return max(rms_ratio(actual[name], expected[name]) for name in expected)


def _compare() -> None:
    torch._dynamo.config.recompile_limit = 64  # or later variants would be the plain ones
    ssd.BLOCK_ELEMENTS["cpu"] = 2**13
    for documents in (False, True):
        exact = gradients(torch.float64, documents=documents, compiling=False)
        compiled = gradients(torch.float64, documents=documents, compiling=True)
        assert worst(compiled, exact) < 1e-13, documents
    for dtype in (torch.float32, torch.bfloat16):
        plain, compiled = (gradients(dtype, documents=True, compiling=c) for c in (False, True))
        # Between two products a compiled pass rounds once, at its end.
        assert 0 < worst(compiled, exact) < 1.1 * worst(plain, exact), dtype
        assert worst(compiled, plain) > 0, dtype


@pytest.mark.slow  # compiles for a minute; in a process of its own, which could not fork others
def test_compiled_passes_have_the_gradients_of_the_plain_ones(run_ranks: Callable) -> None:
    run_ranks(1, _compare)


def test_sums_of_rows_are_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    for rows in (31, 32, 96):
        t = torch.arange(rows * 6.0).view(rows, 2, 3)
        for compiling in (False, True):
            monkeypatch.setattr(fused, "_compiling", compiling)
            assert torch.equal(fused.sum_rows(t).sum(0), t.sum(0))


def test_without_a_compiler_functions_run_as_they_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "has_compiler", lambda: False)
    fused.use_compiler()
    assert not fused.compiling()
    assert fused.fused(torch.neg)(torch.ones(())) == -1
