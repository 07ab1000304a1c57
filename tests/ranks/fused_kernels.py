"""Stand-ins for the kernels of DeepEP: its two buffer classes over all-to-all on a CPU.

They have the interface that megatron-core 0.19.2 calls (core/transformer/moe/fused_a2a.py), and do
what the documentation of deep_ep/buffer.py and deep_ep/hybrid_ep_buffer.py in deepseek-ai/DeepEP
says; `install` puts them in its place.
"""

import importlib
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def install() -> None:
    """In a forked rank: let megatron-core find a package deep_ep."""
    package, utils = ModuleType("deep_ep"), ModuleType("deep_ep.utils")
    package.Buffer, package.HybridEPBuffer = Buffer, HybridEpBuffer
    utils.EventHandle = utils.EventOverlap = None  # only of asynchronous calls
    sys.modules |= {"deep_ep": package, "deep_ep.utils": utils}
    from megatron.core.transformer.moe import fused_a2a

    importlib.reload(fused_a2a)
    assert fused_a2a.HAVE_DEEP_EP
    assert fused_a2a.HAVE_HYBRIDEP


def exchange(t: Tensor, receive: list[int], send: list[int], group: Any) -> Tensor:
    out = t.new_empty(sum(receive), *t.shape[1:])
    dist.all_to_all_single(out, t.contiguous(), receive, send, group=group)
    return out


def exchange_counts(count_P: Tensor, group: Any) -> Tensor:
    out = torch.empty_like(count_P)
    dist.all_to_all_single(out, count_P.contiguous(), group=group)
    return out


class Buffer:
    """DeepEP: a token travels once to each rank that has an expert of its."""

    def __init__(self, group: Any, num_nvl_bytes: int = 0, num_rdma_bytes: int = 0):
        self.group, self.num_nvl_bytes, self.num_rdma_bytes = group, num_nvl_bytes, num_rdma_bytes

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> SimpleNamespace:
        return SimpleNamespace(
            get_nvl_buffer_size_hint=lambda hidden_bytes, num_ranks: hidden_bytes * num_ranks,
            get_rdma_buffer_size_hint=lambda hidden_bytes, num_ranks: 0,
        )

    get_combine_config = get_dispatch_config

    def get_dispatch_layout(
        self,
        topk_idx: Tensor,
        num_experts: int,
        previous_event: Any = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, None, Tensor, Tensor, None]:
        assert topk_idx.dtype == torch.int64
        ranks = self.group.size()
        chosen_TE = torch.zeros(len(topk_idx), num_experts, dtype=torch.bool)
        chosen_TE.scatter_(1, topk_idx, True)
        in_rank_TP = chosen_TE.unflatten(1, (ranks, -1)).any(-1)
        return in_rank_TP.sum(0), None, chosen_TE.sum(0), in_rank_TP, None

    def dispatch(
        self,
        x: Tensor,
        handle: tuple | None = None,
        num_tokens_per_rank: Tensor | None = None,
        num_tokens_per_rdma_rank: Tensor | None = None,
        is_token_in_rank: Tensor | None = None,
        num_tokens_per_expert: Tensor | None = None,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        previous_event: Any = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple:
        if handle is not None:
            assert topk_idx is None
            in_rank_TP, send, receive = handle
            sent = torch.cat([x[mask] for mask in in_rank_TP.T])
            return exchange(sent, receive, send, self.group), None, None, None, None, None
        assert topk_weights.dtype == torch.float32
        send = num_tokens_per_rank.tolist()
        receive = exchange_counts(num_tokens_per_rank, self.group).tolist()
        local = len(num_tokens_per_expert) // len(send)
        ids, weights = [], []
        for p, mask in enumerate(is_token_in_rank.T):
            id_TK = topk_idx[mask] - p * local
            there_TK = (id_TK >= 0) & (id_TK < local)
            ids.append(id_TK.masked_fill(~there_TK, -1))
            weights.append(topk_weights[mask].masked_fill(~there_TK, 0))
        sent = torch.cat([x[mask] for mask in is_token_in_rank.T]), torch.cat(ids)
        got_x, got_ids, got_weights = (
            exchange(t, receive, send, self.group) for t in (*sent, torch.cat(weights))
        )
        counts = torch.bincount(got_ids[got_ids >= 0], minlength=local).tolist()
        handle = is_token_in_rank, send, receive
        return got_x, got_ids, got_weights, counts, handle, None

    def combine(
        self,
        x: Tensor,
        handle: tuple,
        topk_weights: Tensor | None = None,
        previous_event: Any = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, None]:
        assert x.is_contiguous()
        in_rank_TP, send, receive = handle
        token = in_rank_TP.T.nonzero()[:, 1]

        def add_up(t: Tensor) -> Tensor:
            back = exchange(t, send, receive, self.group)
            total = torch.zeros(len(in_rank_TP), t.shape[1])
            return total.index_add_(0, token, back.float()).to(t.dtype)

        return add_up(x), None if topk_weights is None else add_up(topk_weights), None


class HybridEpBuffer:
    """HybridEP: copies travel, and arrive grouped by expert."""

    def __init__(
        self,
        *,
        group: Any,
        hidden_dim: int,
        max_num_of_tokens_per_rank: int,
        num_local_experts: int,
        use_fp8: bool,
        num_sms_preprocessing_api: int,
    ):
        self.group, self.hidden_dim, self.most = group, hidden_dim, max_num_of_tokens_per_rank

    def dispatch_with_permute(
        self,
        *,
        hidden: Tensor,
        scaling_factor: None,
        pad_multiple: None,
        num_permuted_tokens: int | None,
        routing_map: Tensor | None = None,
        probs: Tensor | None = None,
        num_of_experts_per_rank: int | None = None,
        handle: tuple | None = None,
        non_blocking: bool = False,
    ) -> tuple:
        assert hidden.is_contiguous()
        assert hidden.shape[1] == self.hidden_dim
        assert len(hidden) <= self.most
        first = handle is None
        if first:
            assert routing_map.dtype == torch.bool
            assert probs.dtype == torch.float32
            sent_PE = routing_map.sum(0).view(self.group.size(), num_of_experts_per_rank)
            got_PE = exchange_counts(sent_PE, self.group)
            expert_R = torch.arange(got_PE.shape[1]).repeat(len(got_PE))
            expert_R = expert_R.repeat_interleave(got_PE.flatten())
            by_expert_R = expert_R.argsort(stable=True)
            handle = routing_map, sent_PE.sum(1).tolist(), got_PE.sum(1).tolist(), by_expert_R
        routing_map, send, receive, by_expert_R = handle
        place_R, token_R = routing_map.T.nonzero(as_tuple=True)
        got = exchange(hidden[token_R], receive, send, self.group)[by_expert_R]
        if not first:
            assert num_permuted_tokens == len(got)
            return got, None, None, None, None
        got_probs = exchange(probs[token_R, place_R], receive, send, self.group)[by_expert_R]
        return got, got_probs, None, got_PE.sum(0).to(torch.int32), handle

    def combine_with_unpermute(
        self, *, hidden: Tensor, handle: tuple, pad_multiple: None, probs: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        assert hidden.is_contiguous()
        routing_map, send, receive, by_expert_R = handle
        place_R, token_R = routing_map.T.nonzero(as_tuple=True)
        back_R = by_expert_R.argsort()
        got = exchange(hidden[back_R], send, receive, self.group)
        total = torch.zeros(len(routing_map), hidden.shape[1])
        total = total.index_add_(0, token_R, got.float()).to(hidden.dtype)
        if probs is None:
            return total, None
        d_probs = torch.zeros(routing_map.shape)
        d_probs[token_R, place_R] = exchange(probs[back_R], send, receive, self.group)
        return total, d_probs
