"""The parts every layer is made of: linear, norm, dense MLP. Sequence first, no biases."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nemomodel.model.past import Past
from nemomodel.ops.activation import squared_relu
from nemomodel.ops.linear import linear
from nemomodel.ops.norm import rms_norm


class Linear(nn.Module):
    """y = x W^T."""

    def __init__(self, in_size: int, out_size: int, *, dtype: torch.dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_size, in_size, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight."""

    def __init__(self, size: int, *, eps: float, dtype: torch.dtype):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class MLP(nn.Module):
    """y = fc2 relu(fc1 x)^2: the dense layer, and the shared expert."""

    def __init__(self, hidden_size: int, ffn_size: int, *, dtype: torch.dtype):
        super().__init__()
        self.fc1 = Linear(hidden_size, ffn_size, dtype=dtype)
        self.fc2 = Linear(ffn_size, hidden_size, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(squared_relu(self.fc1(x)))


class CachedMLP:
    """The dense layer without gradients; it remembers nothing."""

    def __init__(self, mixer: MLP):
        self.fc1, self.fc2 = mixer.fc1.weight, mixer.fc2.weight

    def __call__(self, x_SBD: Tensor, past: Past) -> Tensor:
        return F.linear(F.linear(x_SBD, self.fc1).relu_().square_(), self.fc2)
