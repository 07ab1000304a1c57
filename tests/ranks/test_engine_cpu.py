"""The CPU seam answers megatron-core and nobody else."""

import subprocess
import sys

import pytest
import torch

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


@pytest.mark.slow
def test_import_is_quiet_and_without_compiler() -> None:
    script = (
        "import sys, torch; compile_ = torch.compile; import nemomodel.parallel.mcore;"
        "assert torch.compile is compile_; assert 'torch._inductor' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
