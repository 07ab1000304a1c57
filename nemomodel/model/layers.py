"""The parts every layer is made of: linear, norm, dense MLP. Sequence first, no biases."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nemomodel.model.past import Past
from nemomodel.ops.activation import squared_relu
from nemomodel.ops.linear import linear
from nemomodel.ops.norm import rms_norm
from nemomodel.ops.precision import wide
from nemomodel.ops.product import onednn_linear
from nemomodel.parallel.exchange import gather_positions, scatter_positions
from nemomodel.parallel.mesh import SINGLE, Mesh
from nemomodel.parallel.shard import parameter
from nemomodel.quant.linear import QuantizedLinear


class Linear(nn.Module):
    """y = x W^T.

    Args:
        in_size, out_size: of the whole layer.
        rows, columns: the part of W [out_size, in_size] that this rank holds.
    """

    def __init__(
        self,
        in_size: int,
        out_size: int,
        *,
        dtype: torch.dtype,
        rows: Sequence[range] | None = None,
        columns: Sequence[range] | None = None,
    ):
        super().__init__()
        self.weight = parameter(out_size, in_size, dtype=dtype, rows=rows, columns=columns)
        self.quantized: QuantizedLinear | None = None  # see model/quantize.py

    def forward(self, x: Tensor) -> Tensor:
        if self.quantized:
            return self.quantized(x, self.weight)
        return linear(x, self.weight)


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight."""

    def __init__(self, size: int, *, eps: float, dtype: torch.dtype):
        super().__init__()
        self.eps = eps
        self.weight = parameter(size, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class MLP(nn.Module):
    """y = fc2 relu(fc1 x)^2: the dense layer, and the shared expert. tp cuts the inner width."""

    def __init__(self, hidden_size: int, ffn_size: int, *, dtype: torch.dtype, mesh: Mesh = SINGLE):
        super().__init__()
        self.tp = mesh.tp
        inner = [mesh.tp.part(ffn_size)]
        self.fc1 = Linear(hidden_size, ffn_size, dtype=dtype, rows=inner)
        self.fc2 = Linear(ffn_size, hidden_size, dtype=dtype, columns=inner)

    def forward(self, x_SBD: Tensor) -> Tensor:
        h_SBF = squared_relu(self.fc1(gather_positions(x_SBD, self.tp)))
        return scatter_positions(self.fc2(h_SBF), self.tp)


class CachedNorm:
    """RMSNorm without gradients, in few operations: x w sqrt(D) / hypot(|x|, sqrt(eps D)).

    Args:
        weight: [D], or of several norms at once [n, D].
    """

    def __init__(self, weight: Tensor, eps: float):
        size = weight.shape[-1]
        self.weight = wide(weight) * size**0.5
        self.floor = self.weight.new_tensor((eps * size) ** 0.5)

    def __call__(self, x: Tensor) -> Tensor:
        dtype = self.weight.dtype
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dtype)
        y = (x * self.weight).div_(torch.hypot(norm, self.floor))
        return y if x.dtype == dtype else y.to(x.dtype)


ONEDNN_FEW_ROWS, ONEDNN_ONE_ROW = 500_000, 1_000_000
"""Elements of a weight from which oneDNN's FP32 product of 2 to 8 rows, or of one row, is faster
than MKL's on a CPU, up to four times (docs/decoding.md). PyTorch calls it for BF16 only."""


class CachedLinear:
    """y = x W^T without gradients, for few rows."""

    def __init__(self, weight: Tensor):
        self.weight, self.transposed = weight, weight.T
        self.onednn_rows = range(0)
        if weight.device.type == "cpu" and weight.dtype == torch.float32:
            first = 1 if weight.numel() >= ONEDNN_ONE_ROW else 2
            if weight.numel() < ONEDNN_FEW_ROWS:
                if weight.shape[0] > weight.shape[1]:
                    # MKL is faster with few rows when the longer dimension is contiguous.
                    self.transposed = self.transposed.contiguous()
            elif torch.backends.mkldnn.is_available():
                self.onednn_rows = range(first, 9)

    def __call__(self, x_TI: Tensor) -> Tensor:
        if self.onednn_rows and x_TI.shape[0] in self.onednn_rows:
            return onednn_linear(x_TI, self.weight)
        return torch.mm(x_TI, self.transposed)


class CachedMLP:
    """The dense layer without gradients; it remembers nothing."""

    def __init__(self, mixer: MLP):
        self.fc1, self.fc2 = CachedLinear(mixer.fc1.weight), CachedLinear(mixer.fc2.weight)

    def __call__(self, x_TD: Tensor, past: Past) -> Tensor:
        return self.fc2(self.fc1(x_TD).relu_().square_())
