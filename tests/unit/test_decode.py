"""Cached decoding against the full pass: every layer kind, cut, padding and rollback."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nemomodel.config.schema import ModelConfig
from nemomodel.infer.draft import Drafter
from nemomodel.infer.sampling import Greedy
from nemomodel.model import moe
from nemomodel.model.cache import CachedModel
from nemomodel.model.nemotron import Nemotron
from nemomodel.model.past import STEP_POSITIONS, Past
from nemomodel.ops.ssd import ssd, ssd_from_state
from nemomodel.ops.step import conv_step, ssd_step
from tests.close import assert_close, rms_ratio
from tests.oracles import model as model_oracle
from tests.oracles.conv import conv_oracle
from tests.unit.test_model_oracle import CONFIGS, MODEL, build, draw_batch

LIMITS = {torch.float64: 1e-12, torch.float32: 1e-5}
LENGTH = 41
KINDS = [
    "all-kinds",
    "mamba",
    "attention",
    "moe",
    "mlp",
    "without-latent",
    "group-limited",
    "clamped-steps",
    "kernel-2",
    "one-group",
]
CUTS = {
    "at-once": [LENGTH],
    "one-by-one": [1] * LENGTH,
    "length-1-prompt": [1, STEP_POSITIONS, STEP_POSITIONS, 8],
    "prompt-shorter-than-the-kernel": [2, 1, 1, 1, 36],
    "long-after-long": [STEP_POSITIONS + 1, 24],
    "at-and-over-a-chunk": [18, 3, 20],
}


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def model_of(config: ModelConfig, dtype: torch.dtype = torch.float64) -> Nemotron:
    return build(config, model_oracle.random_params(config, seed=1, dtype=dtype), dtype)


def draw_ids(rows: int = 2, length: int = LENGTH) -> Tensor:
    return torch.randint(MODEL.vocab_size, (rows, length))


def cached(model: Nemotron, *, batch_size: int = 2, padding: list[int] | None = None):
    return CachedModel(model, batch_size=batch_size, max_length=60, padding=padding)


def extend(cache: CachedModel, ids_BS: Tensor) -> Tensor:
    """Logits [B, S, V]."""
    return cache.logits(cache.extend(ids_BS)).transpose(0, 1)


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("name", KINDS)
def test_cached_passes_equal_the_full_pass(name: str, cut: list[int]) -> None:
    for dtype, limit in LIMITS.items():
        model, ids_BS = model_of(CONFIGS[name], dtype), draw_ids()
        cache = cached(model)
        parts = [extend(cache, part_BS) for part_BS in ids_BS.split(cut, dim=1)]
        assert_close(torch.cat(parts, 1), model(ids_BS), limit=limit, name=f"logits, {dtype}")


@pytest.mark.parametrize("cut", [[1] * LENGTH, [18, 3, 20]], ids=["one-by-one", "by-threes"])
@pytest.mark.parametrize("name", ["moe", "without-latent"])
def test_large_experts_are_computed_as_chosen(
    name: str, cut: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moe, "SMALL_EXPERTS", 0)
    model, ids_BS = model_of(CONFIGS[name]), draw_ids()
    cache = cached(model)
    parts = [extend(cache, part_BS) for part_BS in ids_BS.split(cut, dim=1)]
    assert_close(torch.cat(parts, 1), model(ids_BS), limit=1e-12, name="logits")


@pytest.mark.parametrize("rows", [1, 2, 7])
@pytest.mark.parametrize("small", [2**16, 0], ids=["small", "large"])
def test_cached_bf16_experts_are_those_of_training(
    small: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The router sees the same rows in both, in FP32, so that both choose the same experts."""
    monkeypatch.setattr(moe, "SMALL_EXPERTS", small)
    mixer = model_of(CONFIGS["moe"], torch.bfloat16).blocks[0].mixer
    x_TD = torch.randn(rows, MODEL.hidden_size).bfloat16()
    y_TD = moe.CachedMoE(mixer)(x_TD, Past(rows, 1, 0, rows, None, None, None))
    assert_close(y_TD, mixer(x_TD.unsqueeze(1))[0].squeeze(1), limit=2e-2, name="y")


@pytest.mark.parametrize("length", [3, STEP_POSITIONS, 25])
@pytest.mark.parametrize("name", ["all-kinds", "mamba", "attention", "kernel-2"])
def test_padding_changes_nothing(name: str, length: int) -> None:
    """Prompts of unequal lengths, then one token at a time, then several."""
    model, padding = model_of(CONFIGS[name]), [0, 2, length - 1]
    ids_BS = draw_ids(3)
    cuts = [length, 1, 3, LENGTH - length - 4]
    cache = cached(model, batch_size=3, padding=padding)
    logits = torch.cat([extend(cache, part) for part in ids_BS.split(cuts, dim=1)], 1)
    for row, start in enumerate(padding):
        alone = model(ids_BS[row : row + 1, start:])[0]
        assert_close(logits[row, start:], alone, limit=1e-12, name=f"logits of row {row}")


def test_padding_can_hold_any_token() -> None:
    """To the last bit; no MoE, where other tokens move the rows of an expert's product."""
    model, ids_BS = model_of(replace(MODEL, layer_pattern="M*-M")), draw_ids()
    results = []
    for filler in (0, 7):
        ids_BS[1, :5] = filler
        cache = cached(model, padding=[0, 5])
        results.append(torch.cat([extend(cache, ids_BS[:, :30]), extend(cache, ids_BS[:, 30:])], 1))
    assert torch.equal(results[0][1, 5:], results[1][1, 5:])


@pytest.mark.parametrize("kept", [1, 2, 3, 5])
@pytest.mark.parametrize("before", [0, 1, 20])
@pytest.mark.parametrize("padding", [None, [0, 1]], ids=["equal", "padded"])
def test_a_rolled_back_cache_goes_on_as_if_nothing_had_been(
    before: int, kept: int, padding: list[int] | None
) -> None:
    """To the last bit: the same passes follow."""
    model, ids_BS = model_of(MODEL), draw_ids()
    results = []
    for wrong in (False, True):
        cache = cached(model, padding=padding)
        if before:
            extend(cache, ids_BS[:, :before])
        drafts_BS = ids_BS[:, before : before + 5].clone()
        if wrong:
            drafts_BS[:, kept:] += 1
            drafts_BS %= MODEL.vocab_size
        extend(cache, drafts_BS)
        cache.crop(before + kept)
        assert cache.length == before + kept
        rest = ids_BS[:, before + kept : before + kept + 3], ids_BS[:, before + kept + 3 : 40]
        results.append([extend(cache, part) for part in rest])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    full = model(ids_BS[:1, :40])[0]
    assert_close(results[0][1][0], full[before + kept + 3 :], limit=1e-12, name="logits")


def test_an_emptied_cache_is_like_a_new_one() -> None:
    model, ids_BS = model_of(MODEL), draw_ids()
    cache = cached(model)
    extend(cache, draw_ids(length=20))
    extend(cache, draw_ids(length=3))
    cache.crop(0)
    assert torch.equal(extend(cache, ids_BS), extend(cached(model), ids_BS))


def test_bf16_cache_is_as_near_as_the_bf16_full_pass() -> None:
    """No MoE: BF16 may flip a token's routing."""
    config = replace(MODEL, layer_pattern="M*-M", mtp=None)
    params = model_oracle.random_params(config, seed=1, dtype=torch.bfloat16)
    model, ids_BS = build(config, params, torch.bfloat16), draw_ids()
    exact = build(config, {n: p.double() for n, p in params.items()}, torch.float64)(ids_BS)
    cache = cached(model)
    parts = [extend(cache, part) for part in ids_BS.split([20, 1, 4, 16], dim=1)]
    error = rms_ratio(torch.cat(parts, 1), exact)
    assert error <= 2 * rms_ratio(model(ids_BS), exact) + 1e-6


# --- operations ----------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 2, 7])
def test_conv_step_equals_the_oracle(length: int) -> None:
    x_SBC, weight, bias = torch.randn(3 + length, 2, 6), torch.randn(6, 4), torch.randn(6)
    x_SBC, weight, bias = x_SBC.double(), weight.double(), bias.double()
    y_SBC = conv_step(x_SBC, weight.T.contiguous(), bias)
    expected_BSC = conv_oracle(x_SBC.transpose(0, 1), weight, bias)[:, 3:]
    assert_close(y_SBC.transpose(0, 1), expected_BSC, limit=1e-12, name="y")


@pytest.mark.parametrize("chunk_size", [1, 3, 64])
@pytest.mark.parametrize("cut", [1, 3, 6])
def test_scan_from_a_state_goes_on_where_it_was_left(cut: int, chunk_size: int) -> None:
    S, B, H, P, G, N = 8, 2, 4, 3, 2, 5
    shapes = (S, B, H, P), (S, B, H), (H,), (S, B, G, N), (S, B, G, N), (H,)
    x, dt, A, B_, C, D = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    dt, A = dt.exp(), -A.exp()
    whole = ssd(x, dt, A, B_, C, D, chunk_size=chunk_size)
    state = torch.zeros(B, H, P, N, dtype=torch.float64)
    parts = []
    for rows in (slice(0, cut), slice(cut, S)):
        part = x[rows], dt[rows], A, B_[rows], C[rows], D, state
        y, after = ssd_from_state(*part, chunk_size=chunk_size)
        states = torch.empty(len(y), *state.shape, dtype=torch.float64)
        stepped = ssd_step(*part, states)
        assert_close(stepped, y, limit=1e-12, name="y step by step")
        assert_close(states[-1], after, limit=1e-12, name="state step by step")
        parts.append(y)
        state = after
    assert_close(torch.cat(parts), whole, limit=1e-12, name="y")


# --- drafts --------------------------------------------------------------------------------

DRAFTERS = {
    "shared": (CONFIGS["mtp-3-shared"], 3),
    "separate": (CONFIGS["mtp-3-separate"], 3),
    "all-kinds": (CONFIGS["mtp-of-all-kinds"], 2),
    "one": (CONFIGS["mtp-1"], 1),
}


class Recorder(Greedy):
    """Greedy, and remembers the logits it drafted from."""

    def __init__(self) -> None:
        self.logits: list[Tensor] = []

    def draft(self, logits_V: Tensor) -> tuple[int, None]:
        self.logits.append(logits_V)
        return super().draft(logits_V)


@pytest.mark.parametrize("length", [1, 2, 3, STEP_POSITIONS + 1, 30])
@pytest.mark.parametrize(("config", "depths"), DRAFTERS.values(), ids=DRAFTERS)
def test_drafts_come_from_the_logits_of_training(
    config: ModelConfig, depths: int, length: int
) -> None:
    """Over rounds in which 0, 1, ... all drafts are accepted."""
    model = model_of(config)
    cache = cached(model, batch_size=1)
    drafter = Drafter(model, cache, length=depths, max_length=60)
    ids = draw_ids(1, length)[0].tolist()
    hidden_SBD = cache.extend(torch.tensor([ids]))
    ids.append(5)
    for accepted in (0, depths, 1, 0, depths, depths):
        recorder = Recorder()
        drafts, _ = drafter.draft(hidden_SBD, ids, depths, recorder)
        for k, logits_V in enumerate(recorder.logits, 1):
            known = torch.tensor([ids + drafts[: k - 1]])
            expected = model.mtp_logits(known)[k - 1][0, len(ids) - 2]
            assert_close(logits_V, expected, limit=1e-12, name=f"logits of depth {k}")
        hidden_SBD = cache.extend(torch.tensor([[ids[-1], *drafts]]))[: accepted + 1]
        ids += drafts[:accepted]
        cache.crop(len(ids))
        drafter.accept(ids)
        ids.append(accepted)


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "separate"])
def test_depths_beyond_the_model_apply_its_last_block(shared: bool) -> None:
    """As a model does that was built with more depths and the same weights."""
    mtp = replace(MODEL.mtp, shared=shared)
    model = model_of(replace(MODEL, mtp=mtp))
    deeper = model_of(replace(MODEL, mtp=replace(mtp, num_depths=4)))
    weights = model.state_dict()
    if not shared:
        last = {n: w for n, w in weights.items() if n.startswith("mtp.blocks.1.")}
        for block in ("2", "3"):
            weights |= {n.replace("blocks.1.", f"blocks.{block}."): w for n, w in last.items()}
    deeper.load_state_dict(weights)
    ids = draw_batch(MODEL)[0][0].tolist()
    drafted = []
    for each in (model, deeper):
        cache, recorder = cached(each, batch_size=1), Recorder()
        drafter = Drafter(each, cache, length=4, max_length=60)
        drafter.draft(cache.extend(torch.tensor([ids[:-1]])), ids, 4, recorder)
        drafted.append(torch.stack(recorder.logits))
    assert torch.equal(*drafted)
