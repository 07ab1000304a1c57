"""AdamW with decoupled weight decay, bias correction and clipping by the global norm."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

Tensors = Mapping[str, Tensor]


def clip_oracle(grads: Tensors, *, max_norm: float | None) -> tuple[dict[str, Tensor], float]:
    """Scale all gradients by min(1, max_norm / (norm + 1e-6)), norm over all their elements.

    The 1e-6 is what torch.nn.utils.clip_grad_norm_ and megatron-core add, too. None clips not.

    Returns:
        The scaled gradients and the norm before.
    """
    norm = math.sqrt(sum(float(grad.double().square().sum()) for grad in grads.values()))
    factor = 1.0 if max_norm is None else min(1.0, max_norm / (norm + 1e-6))
    return {name: grad * factor for name, grad in grads.items()}, norm


def adamw_update_oracle(
    param: Tensor,
    grad: Tensor,
    moment1: Tensor,
    moment2: Tensor,
    *,
    n: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The n-th update of one tensor, n from 1; returns the new parameter and moments.

        m = beta1 m + (1 - beta1) g          v = beta2 v + (1 - beta2) g^2
        p = p - lr (m / (1 - beta1^n) / (sqrt(v / (1 - beta2^n)) + eps) + weight_decay p)

    Source: arXiv:1711.05101, algorithm 2.
    """
    moment1 = beta1 * moment1 + (1 - beta1) * grad
    moment2 = beta2 * moment2 + (1 - beta2) * grad * grad
    mean = moment1 / (1 - beta1**n)
    square = moment2 / (1 - beta2**n)
    step = mean / (torch.sqrt(square) + eps) + weight_decay * param
    return param - lr * step, moment1, moment2


def adamw_oracle(
    params: Tensors,
    grads: Sequence[Tensors],
    *,
    lr: Sequence[float],
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    grad_clip: float | None,
) -> dict[str, Tensor]:
    """Parameters after one update per entry of `grads`, from moments of zero.

    Weight decay acts on tensors of two or more dims only. Each set of gradients is clipped as a
    whole before its update.

    Args:
        lr: learning rate of each update.
    """
    params = dict(params)
    moment1 = {name: torch.zeros_like(param) for name, param in params.items()}
    moment2 = {name: torch.zeros_like(param) for name, param in params.items()}
    for n, (raw, lr_n) in enumerate(zip(grads, lr, strict=True), start=1):
        clipped, _ = clip_oracle(raw, max_norm=grad_clip)
        for name, param in params.items():
            params[name], moment1[name], moment2[name] = adamw_update_oracle(
                param,
                clipped[name],
                moment1[name],
                moment2[name],
                n=n,
                lr=lr_n,
                beta1=beta1,
                beta2=beta2,
                eps=eps,
                weight_decay=weight_decay if param.dim() >= 2 else 0.0,
            )
    return params
