"""Cross-entropy of a linear head, and the targets of multi-token prediction."""

import torch
from torch import Tensor


def linear_cross_entropy_oracle(
    x_TD: Tensor, head_weight: Tensor, label_T: Tensor, token_weight_T: Tensor
) -> Tensor:
    """sum_t token_weight_t * (-log softmax(head x_t)[label_t]).

    The label of a token of weight 0 is not read, whatever it is.

    Args:
        head_weight: [V, D].
    """
    return cross_entropy_oracle(x_TD @ head_weight.T, label_T, token_weight_T)


def cross_entropy_oracle(logits_TV: Tensor, label_T: Tensor, token_weight_T: Tensor) -> Tensor:
    """sum_t token_weight_t * (log sum_v exp(logits_tv) - logits_t[label_t])."""
    total = 0 * logits_TV.sum()  # With no token at all the gradient is zero, not missing.
    for t in range(logits_TV.shape[0]):
        if token_weight_T[t] == 0:
            continue
        largest = logits_TV[t].max().detach()
        log_sum = torch.log(torch.exp(logits_TV[t] - largest).sum()) + largest
        nats = log_sum - logits_TV[t, label_T[t]]
        total = total + token_weight_T[t].to(nats.dtype) * nats
    return total


def mtp_targets_oracle(
    labels_BS: Tensor,
    loss_mask_BS: Tensor,
    *,
    depth: int,
    document_BS: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Labels and validity of the head `depth` tokens beyond the main head (depth 0 is that one).

    Position i is to predict labels[i + depth]. That target is valid when i + depth is inside the
    row, counts by itself (loss_mask[i + depth]) and is in i's document. Where the target is not
    valid the label is 0.

    Returns:
        label_BS (int64) and valid_BS (bool).
    """
    batch, length = labels_BS.shape
    label_BS = torch.zeros(batch, length, dtype=torch.int64)
    valid_BS = torch.zeros(batch, length, dtype=torch.bool)
    for b in range(batch):
        for i in range(length - depth):
            same = document_BS is None or document_BS[b, i + depth] == document_BS[b, i]
            if same and loss_mask_BS[b, i + depth]:
                label_BS[b, i] = labels_BS[b, i + depth]
                valid_BS[b, i] = True
    return label_BS, valid_BS
