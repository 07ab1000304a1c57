"""Data parallelism, optimizer and schedule of the engine, on one and on two ranks."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nemomodel.checkpoint.state import Engine
from nemomodel.config.load import ConfigError, load_config
from nemomodel.config.schema import Config
from nemomodel.ops.wgrad import deliver_grad
from nemomodel.parallel.mcore import (
    Ranks,
    global_sum,
    start_ranks,
    stop_ranks,
    transformer_config,
    wrap_ddp,
)
from nemomodel.parallel.optimizer import build_optimizer, build_scheduler, step_optimizer
from tests.close import assert_close
from tests.oracles.schedule import lr_oracle
from tests.ranks.gradients import own_part

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests/golden/transformer_config.json"
B, S, D, V = 4, 6, 32, 40


def make_config(*overrides: str) -> Config:
    fixed = ("train.steps=10", "schedule.warmup_steps=2", "schedule.decay_steps=4")
    return load_config(
        ROOT / "configs/tiny.toml",
        [*fixed, "train.global_batch_size=2", "train.micro_batch_size=1", *overrides],
    )


class _Linear(torch.autograd.Function):
    """A linear whose weight gradient goes the way of the operators: into main_grad."""

    @staticmethod
    def forward(ctx: Any, x_BSD: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x_BSD)
        ctx.weight = weight
        return x_BSD @ weight.T

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None]:
        (x_BSD,) = ctx.saved_tensors
        grad = torch.einsum("bsf,bsd->fd", dy.float(), x_BSD.float())
        return dy @ ctx.weight, deliver_grad(ctx.weight, grad)


class Mlp(nn.Module):
    """Weights by autograd and by deliver_grad, one used twice, vectors in FP32 if asked."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.embedding = nn.Embedding(V, D, dtype=dtype)
        self.fc1 = nn.Parameter(torch.randn(D, D).mul(0.3).to(dtype))
        self.fc2 = nn.Linear(D, V, dtype=dtype)
        self.A_log = nn.Parameter(torch.randn(D) * 0.1)
        self.register_buffer("expert_bias", torch.zeros(3))

    def forward(self, ids_BS: Tensor) -> Tensor:
        x_BSD = self.embedding(ids_BS)
        for _ in range(2):
            x_BSD = torch.tanh(_Linear.apply(x_BSD, self.fc1))
        return self.fc2(x_BSD * torch.exp(self.A_log).to(x_BSD.dtype))


def batch(step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, labels and a mask that keeps very different numbers of tokens per row."""
    generator = torch.Generator().manual_seed(step)
    ids_BS = torch.randint(V, (B, S + 1), generator=generator)
    mask_BS = torch.arange(S)[None] < torch.tensor([1, S, 3, 2])[:, None]
    return ids_BS[:, :-1], ids_BS[:, 1:], mask_BS


def build(config: Config, ranks: Ranks) -> tuple[Any, Any, Any]:
    torch.manual_seed(7)
    dtype = torch.bfloat16 if config.precision.recipe == "bf16" else torch.float32
    ddp = wrap_ddp(Mlp(dtype), config, ranks)
    optimizer = build_optimizer([ddp], config, ranks)
    return ddp, optimizer, build_scheduler(optimizer, config)


def make_engine(config: Config, ranks: Ranks) -> Engine:
    ddp, optimizer, scheduler = build(config, ranks)
    return Engine([ddp], optimizer, scheduler)


def backward(ddp: Any, ranks: Ranks, step: int) -> float:
    """Loss of the global batch; every rank has its rows, as B / dp_size micro-batches of one."""
    ids_BS, labels_BS, mask_BS = batch(step)
    rows = range(ranks.dp_rank, B, ranks.dp_size)
    count = global_sum(sum(mask_BS[row].sum() for row in rows))
    ddp.zero_grad_buffer()
    total = torch.zeros(())
    for row in rows:
        ddp_context = ddp.no_sync() if row != rows[-1] else torch.enable_grad()
        with ddp_context:
            logits_SV = ddp(ids_BS[row : row + 1])[0].float()
            loss_S = nn.functional.cross_entropy(logits_SV, labels_BS[row], reduction="none")
            loss = (loss_S * mask_BS[row]).sum() / count
            loss.backward()
        total += loss.detach()
    ddp.finish_grad_sync()
    return global_sum(total).item()


def train(ddp: Any, optimizer: Any, scheduler: Any, ranks: Ranks, steps: range) -> list[float]:
    losses = []
    for step in steps:
        losses.append(backward(ddp, ranks, step))
        assert math.isfinite(step_optimizer(optimizer))
        scheduler.step(1)
    return losses


def _train_and_save(path: Path, overrides: tuple[str, ...]) -> None:
    config = make_config(*overrides)
    ranks = start_ranks(config)
    ddp, optimizer, scheduler = build(config, ranks)
    losses = train(ddp, optimizer, scheduler, ranks, range(3))
    state = {"loss": torch.tensor(losses), **ddp.module.state_dict()}
    backward(ddp, ranks, 3)
    for name, param in ddp.module.named_parameters():
        # The reduced gradient lives in shards: put zeros elsewhere, and sum over ranks.
        grad = torch.zeros_like(param, dtype=torch.float32).view(-1)
        own = own_part(optimizer, param)
        grad[own] = param.main_grad.view(-1)[own]
        state[f"grad.{name}"] = global_sum(grad)
    torch.save(state, path / f"rank_{ranks.rank}.pt")
    stop_ranks()


def _run(run_ranks: Callable, path: Path, world: int, *overrides: str) -> dict[str, Tensor]:
    path.mkdir()
    run_ranks(world, _train_and_save, path, overrides)
    states = [torch.load(path / f"rank_{rank}.pt") for rank in range(world)]
    for state in states[1:]:
        for name, value in state.items():
            assert torch.equal(value, states[0][name]), name
    return states[0]


def test_two_ranks_train_as_one(run_ranks: Callable, tmp_path: Path) -> None:
    one = _run(run_ranks, tmp_path / "one", 1)
    two = _run(run_ranks, tmp_path / "two", 2)
    assert len(one) == 12
    for name, value in one.items():
        if name != "expert_bias":
            assert_close(two[name], value, limit=1e-6, name=name)


OVERLAP = ("parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true")


@pytest.mark.parametrize("recipe", ["fp32", "bf16"])
@pytest.mark.parametrize("overlap", [OVERLAP[:1], OVERLAP], ids=["reduce", "reduce_and_gather"])
def test_overlap_changes_nothing(
    run_ranks: Callable, tmp_path: Path, recipe: str, overlap: tuple[str, ...]
) -> None:
    precision = f"precision.recipe={recipe}"
    plain = _run(run_ranks, tmp_path / "plain", 2, precision)
    overlapped = _run(run_ranks, tmp_path / "overlap", 2, precision, *overlap)
    for name, value in plain.items():
        assert torch.equal(overlapped[name], value), name


@pytest.fixture
def ranks() -> Any:
    started = start_ranks(make_config())
    yield started
    stop_ranks()


def test_gradients_accumulate_in_fp32_and_equal_autograd(ranks: Ranks) -> None:
    ddp, _, _ = build(make_config("precision.recipe=bf16"), ranks)
    assert {p.dtype for p in ddp.module.parameters()} == {torch.float32, torch.bfloat16}
    assert {p.main_grad.dtype for p in ddp.module.parameters()} == {torch.float32}
    weight = nn.Parameter(torch.ones(2, 2, dtype=torch.bfloat16))
    assert deliver_grad(weight, torch.ones(2, 2)).dtype == torch.bfloat16
    weight.main_grad = torch.full((2, 2), 256.0)
    assert deliver_grad(weight, torch.full((2, 2), 0.5)) is None
    assert weight.main_grad[0, 0] == 256.5
    assert weight.grad_added_to_main_grad


def test_each_parameter_is_in_one_group_and_vectors_do_not_decay(ranks: Ranks) -> None:
    ddp, optimizer, scheduler = build(make_config(), ranks)
    decay, no_decay = optimizer.param_groups
    assert (decay["weight_decay"], no_decay["weight_decay"]) == (0.1, 0.0)
    matrices = sum(p.numel() for p in ddp.module.parameters() if p.ndim > 1)
    vectors = sum(p.numel() for p in ddp.module.parameters() if p.ndim == 1)
    assert sum(p.numel() for p in decay["params"]) == matrices
    assert sum(p.numel() for p in no_decay["params"]) == vectors
    scheduler.step(5)
    assert (decay["weight_decay"], no_decay["weight_decay"]) == (0.1, 0.0)


def test_nan_gradient_is_reported_and_changes_nothing(ranks: Ranks) -> None:
    ddp, optimizer, scheduler = build(make_config(), ranks)
    train(ddp, optimizer, scheduler, ranks, range(1))
    before = {name: value.clone() for name, value in ddp.module.state_dict().items()}
    backward(ddp, ranks, 1)
    ddp.module.A_log.main_grad[3] = math.nan
    assert math.isnan(step_optimizer(optimizer))
    assert all(torch.equal(value, before[name]) for name, value in ddp.module.state_dict().items())


def test_grad_norm_is_that_of_all_gradients_with_and_without_clipping(ranks: Ranks) -> None:
    for clip in ("none", "1e-3"):
        ddp, optimizer, _ = build(make_config(f"optim.grad_clip={clip}"), ranks)
        backward(ddp, ranks, 0)
        norm = torch.cat([p.main_grad.flatten() for p in ddp.module.parameters()]).norm().item()
        assert step_optimizer(optimizer) == pytest.approx(norm, rel=1e-6)


@pytest.mark.parametrize("kind", ["wsd", "cosine", "constant"])
def test_schedule_is_that_of_the_oracle(ranks: Ranks, kind: str) -> None:
    decay = () if kind == "wsd" else ("schedule.decay_steps=none",)
    lr = ("optim.lr=2.0", f"optim.min_lr={0.0 if kind == 'constant' else 1.0}")
    config = make_config(f"schedule.kind={kind}", *decay, *lr)
    _, optimizer, scheduler = build(config, ranks)
    for n in range(1, config.train.steps + 1):
        expected = lr_oracle(
            n,
            config.schedule,
            max_lr=config.optim.lr,
            min_lr=config.optim.min_lr,
            steps=config.train.steps,
        )
        assert [group["lr"] for group in optimizer.param_groups] == [pytest.approx(expected)] * 2
        scheduler.step(1)


def test_ranks_of_a_plain_process(ranks: Ranks) -> None:
    assert (ranks.rank, ranks.world_size, ranks.dp_rank, ranks.dp_size) == (0, 1, 0, 1)
    assert ranks.device == torch.device("cpu")


def test_wrong_world_size_is_refused_before_any_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match="use a multiple of 3"):
        start_ranks(make_config())
    assert not torch.distributed.is_initialized()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a process without CUDA")
def test_cuda_without_a_gpu_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"run\.device='cuda': this process sees no GPU"):
        start_ranks(make_config("run.device=cuda"))


def test_transformer_config_is_the_golden_one() -> None:
    """To renew the golden file after an upgrade, paste the message of this test into it."""
    actual = transformer_config(make_config("precision.recipe=bf16"))
    changed = {
        f.name: str(value)
        for f in dataclasses.fields(actual)
        if (value := getattr(actual, f.name)) != f.default and not callable(value)
    }
    assert changed == json.loads(GOLDEN.read_text()), json.dumps(changed, indent=2)
