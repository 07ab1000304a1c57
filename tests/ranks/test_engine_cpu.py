"""The CPU seam answers megatron-core and nobody else."""

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from nemomodel.parallel import cpu

cpu.install()

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a no-op where CUDA exists")

CALLS = {
    "type": "torch.zeros(1).type()",
    "bf16_type": "torch.zeros(1, dtype=torch.bfloat16).type()",
    "zeros": "str(torch.zeros(1, device='cuda').device)",
    "tensor": "str(torch.tensor([1.0], device='cuda').device)",
    "cuda": "str(torch.ones(1).cuda().device)",
    "current_device": "torch.cuda.current_device()",
}


def _called_by(module: str, expression: str) -> object:
    return eval(expression, {"__name__": module, "torch": torch})


@pytest.mark.parametrize(
    ("call", "answer"),
    [
        ("type", "torch.cuda.FloatTensor"),
        ("bf16_type", "torch.cuda.BFloat16Tensor"),
        ("zeros", "cpu"),
        ("tensor", "cpu"),
        ("cuda", "cpu"),
        ("current_device", "cpu"),
    ],
)
def test_megatron_sees_a_device(call: str, answer: str) -> None:
    assert _called_by("megatron.core.optimizer.optimizer", CALLS[call]) == answer


def test_other_code_sees_the_truth() -> None:
    assert _called_by("mine", CALLS["type"]) == "torch.FloatTensor"
    for call in ("zeros", "tensor", "cuda"):
        with pytest.raises((RuntimeError, AssertionError)):
            _called_by("mine", CALLS[call])
    assert torch.zeros(1).type(torch.float64).dtype == torch.float64


def _gradient_norm(rank_size: int) -> None:
    from megatron.core.optimizer.clip_grads import get_grad_norm_fp32

    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(2 * rank_size, generator=generator) * 1e-3
    own = whole.view(2, -1)[dist.get_rank()]
    for pieces in ([own], [own[:1000], own[1000:5000], own[5000:].view(-1, 5)]):
        norm = get_grad_norm_fp32(pieces, grad_stats_parallel_group=dist.group.WORLD)
        assert norm == pytest.approx(whole.double().norm().item(), rel=2e-7)


def test_the_gradient_norm_is_that_of_float64_however_it_is_cut(run_ranks: Callable) -> None:
    """PyTorch's own is 8e-5 off for as many numbers."""
    run_ranks(2, _gradient_norm, 2_000_000)


@pytest.mark.slow
def test_import_is_quiet_and_without_compiler() -> None:
    script = (
        "import sys, torch; compile_ = torch.compile; import nemomodel.parallel.mcore;"
        "assert torch.compile is compile_; assert 'torch._inductor' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
