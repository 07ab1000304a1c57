"""Generation: drafts change no output, sampling has the right distribution, errors, the tool."""

import warnings
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from nemomodel.config.schema import ModelConfig
from nemomodel.infer.generate import MAX_DRAFT_LENGTH, Generation, Sampling, generate
from nemomodel.infer.sampling import Drawn, Greedy, probabilities, residual
from nemomodel.model.nemotron import Nemotron
from tests.close import assert_close
from tests.oracles import model as model_oracle
from tests.unit.test_model_oracle import CONFIGS, MODEL, build

PROMPT_LENGTHS = (1, 2, 3, 9, 17, 30)


def model_of(config: ModelConfig) -> Nemotron:
    return build(config, model_oracle.random_params(config, seed=1), torch.float64)


def draw_prompts() -> list[list[int]]:
    return [torch.randint(MODEL.vocab_size, (n,)).tolist() for n in PROMPT_LENGTHS]


def greedy_by_full_passes(model: Nemotron, prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("name", ["mtp-1", "all-kinds", "mtp-3-separate", "mtp-of-all-kinds"])
def test_greedy_output_is_that_of_full_passes_with_and_without_drafts(name: str) -> None:
    model, prompts = model_of(CONFIGS[name]), draw_prompts()
    expected = [greedy_by_full_passes(model, prompt, 20) for prompt in prompts]
    depths = CONFIGS[name].mtp.num_depths
    for draft_length in (0, 1, depths):
        results = generate(model, prompts, max_new_tokens=20, draft_length=draft_length)
        assert [r.tokens for r in results] == expected, draft_length


def test_more_drafts_than_depths_are_announced_and_lossless() -> None:
    model, prompts = model_of(MODEL), draw_prompts()
    plain = generate(model, prompts, max_new_tokens=25)
    for draft_length in (4, MAX_DRAFT_LENGTH):
        with pytest.warns(UserWarning, match=f"draft_length={draft_length} is more than"):
            drafted = generate(model, prompts, max_new_tokens=25, draft_length=draft_length)
        assert [r.tokens for r in drafted] == [r.tokens for r in plain]


def test_counts_add_up() -> None:
    model = copying_model()
    (result,) = generate(model, [[3, 4]], max_new_tokens=20, draft_length=2)
    assert len(result.tokens) - 1 == result.passes + sum(result.accepted)
    assert result.drafted[0] >= result.drafted[1] >= result.accepted[1]
    assert result.accepted[0] >= result.accepted[1]
    assert result.acceptance_length == (len(result.tokens) - 1) / result.passes
    (plain,) = generate(model, [[3, 4]], max_new_tokens=20)
    assert (plain.passes, plain.acceptance_length, plain.drafted) == (19, 1.0, [])


def copying_model() -> Nemotron:
    """Always the same token, from the main head and all depths: every draft is accepted."""
    model = model_of(MODEL)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    return model


def test_all_drafts_of_a_model_that_agrees_with_itself_are_accepted() -> None:
    (result,) = generate(copying_model(), [[1, 2, 3]], max_new_tokens=10, draft_length=2)
    assert (result.passes, result.drafted, result.accepted) == (3, [3, 3], [3, 3])
    assert result.acceptance_length == 3
    assert Generation(tokens=[1]).acceptance_length == 1


@pytest.mark.parametrize("draft_length", [0, 2])
def test_stop_token_ends_its_sequence_alone(draft_length: int) -> None:
    model, prompts = model_of(MODEL), draw_prompts()
    free = [r.tokens for r in generate(model, prompts, max_new_tokens=20)]
    stop = free[3][4]
    seen: list[list[int]] = [[] for _ in prompts]
    results = generate(
        model,
        prompts,
        max_new_tokens=20,
        stop_ids=[stop],
        draft_length=draft_length,
        on_token=lambda index, token: seen[index].append(token),
    )
    for result, tokens, reported in zip(results, free, seen, strict=True):
        stopped = stop in tokens
        expected = tokens[: tokens.index(stop) + 1] if stopped else tokens
        assert (result.tokens, result.stopped, reported) == (expected, stopped, expected)


@pytest.mark.parametrize("draft_length", [0, 2])
def test_draws_depend_on_seed_and_place_alone(draft_length: int) -> None:
    model, prompts = model_of(MODEL), draw_prompts()

    def draw(prompts: list[list[int]], seed: int) -> list[list[int]]:
        sampling = Sampling(1.0, 0.95, seed)
        results = generate(
            model, prompts, max_new_tokens=12, sampling=sampling, draft_length=draft_length
        )
        return [result.tokens for result in results]

    assert draw(prompts, 1) == draw(prompts, 1)
    assert draw(prompts, 1) != draw(prompts, 2)
    assert draw(prompts[:2], 1) == draw(prompts, 1)[:2]
    same = draw([prompts[3]] * 2, 1)
    assert same[0] != same[1]


# --- distributions -------------------------------------------------------------------------

SETTINGS = {
    "plain": Sampling(1.0),
    "cold": Sampling(0.5),
    "nucleus": Sampling(1.3, 0.7),
    "narrow": Sampling(1.0, 1e-6),
}


@pytest.mark.parametrize("sampling", SETTINGS.values(), ids=SETTINGS)
def test_one_verified_draft_has_exactly_the_distribution_of_the_model(sampling: Sampling) -> None:
    """Summed over all drafts: accepted, or replaced by a draw from the residual."""
    for _ in range(20):
        p_V, q_V = (probabilities(2 * torch.randn(11), sampling) for _ in range(2))
        accepted_V = torch.minimum(p_V, q_V)  # q min(1, p / q)
        output_V = accepted_V + (1 - accepted_V.sum()) * residual(p_V, q_V)
        assert_close(output_V, p_V, limit=1e-12, name="distribution")


def test_residual_of_equal_distributions_is_the_distribution() -> None:
    p_V = torch.tensor([0.25, 0.75], dtype=torch.float64)
    assert torch.equal(residual(p_V, p_V), p_V)


def test_top_p_keeps_the_fewest_likely_tokens() -> None:
    logits_V = torch.tensor([0.1, 0.5, 0.15, 0.25]).log()
    for top_p, kept in ((0.4, [1]), (0.6, [1, 3]), (0.8, [1, 2, 3]), (1.0, [0, 1, 2, 3])):
        p_V = probabilities(logits_V, Sampling(1.0, top_p))
        expected_V = torch.zeros(4, dtype=torch.float64)
        expected_V[kept] = logits_V.double().exp()[kept]
        assert_close(p_V, expected_V / expected_V.sum(), limit=1e-6, name=f"top_p={top_p}")


def chi_square(counts: Tensor, p: Tensor) -> float:
    expected = counts.sum() * p
    likely = expected > 0
    assert counts[~likely].sum() == 0
    return float(((counts - expected).square()[likely] / expected[likely]).sum())


def bound(p: Tensor) -> float:
    """Mean and five standard deviations of chi-square."""
    freedom = int((p > 0).sum()) - 1
    return freedom + 5 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("sampling", SETTINGS.values(), ids=SETTINGS)
def test_verified_drafts_are_distributed_as_the_model(sampling: Sampling) -> None:
    """The pair of first two tokens, with drafts from other distributions."""
    V, rounds = 4, 4000
    p_SV = torch.stack([probabilities(torch.randn(V), sampling) for _ in range(2)])
    logits_SV = p_SV.log() * sampling.temperature
    q_V = probabilities(torch.randn(V), Sampling(1.0))
    drawn = Drawn(replace(sampling, top_p=1.0), stream=0)
    first, second = torch.zeros(V), torch.zeros(V)
    for _ in range(rounds):
        draft = drawn._draw(q_V)
        tokens = drawn.verify(logits_SV, [draft], [q_V])
        first[tokens[0]] += 1
        if len(tokens) == 2:
            assert tokens[0] == draft
            second[tokens[1]] += 1
    assert chi_square(first, p_SV[0]) <= bound(p_SV[0])
    assert chi_square(second, p_SV[1]) <= bound(p_SV[1])


def test_sampled_text_has_the_distribution_of_the_model_with_and_without_drafts() -> None:
    """Three new tokens over many seeds, against exact probabilities."""
    config = replace(MODEL, vocab_size=3, layer_pattern="M*", mtp=replace(MODEL.mtp, num_depths=2))
    model, prompt, rounds = model_of(config), [0, 2, 1], 1200
    p = torch.ones(1, dtype=torch.float64)
    with torch.no_grad():
        for place in range(3):
            ids = torch.tensor([[*prompt, *new] for new in product(range(3), repeat=place)])
            p = (p.unsqueeze(1) * model(ids)[:, -1].softmax(-1)).flatten()
    for draft_length in (0, 2):
        counts = torch.zeros(27)
        for seed in range(rounds // 4):
            results = generate(
                model,
                [prompt] * 4,
                max_new_tokens=3,
                sampling=Sampling(1.0, 1.0, seed),
                draft_length=draft_length,
            )
            for a, b, c in (result.tokens for result in results):
                counts[9 * a + 3 * b + c] += 1
        assert chi_square(counts, p) <= bound(p), draft_length


def test_greedy_accepts_up_to_the_first_difference() -> None:
    logits_SV = torch.eye(5)[[2, 4, 1]]
    greedy = Greedy()
    assert greedy.verify(logits_SV, [2, 4], [None, None]) == [2, 4, 1]
    assert greedy.verify(logits_SV, [2, 3], [None, None]) == [2, 4]
    assert greedy.verify(logits_SV, [0, 4], [None, None]) == [2]
    assert greedy.draft(logits_SV[1]) == (4, None)


# --- errors --------------------------------------------------------------------------------

FAULTS = {
    "no-prompt": ({"prompts": []}, r"prompts: there is none"),
    "empty-prompt": ({"prompts": [[1], []]}, r"prompts\[1\] is empty"),
    "id-too-high": ({"prompts": [[1, 23]]}, r"prompts\[0\]: token 23 is outside the vocabulary"),
    "negative-id": ({"prompts": [[-1]]}, r"prompts\[0\]: token -1 is outside"),
    "stop-id": ({"stop_ids": [99]}, r"stop_ids: token 99 is outside"),
    "no-tokens": ({"max_new_tokens": 0}, r"max_new_tokens=0: must be at least 1"),
    "negative-draft": ({"draft_length": -1}, r"draft_length=-1: must be in 0 \.\. 15"),
    "long-draft": ({"draft_length": 16}, r"draft_length=16: must be in 0 \.\. 15"),
}


@pytest.mark.parametrize(("change", "message"), FAULTS.values(), ids=FAULTS)
def test_bad_input_is_refused(change: dict, message: str) -> None:
    arguments = {"prompts": [[1]], "max_new_tokens": 2} | change
    with pytest.raises(ValueError, match=message):
        generate(model_of(MODEL), **arguments)


def test_drafts_without_mtp_are_refused() -> None:
    model = model_of(CONFIGS["without-mtp"])
    with pytest.raises(ValueError, match="draft_length=1: this model has no MTP heads"):
        generate(model, [[1]], max_new_tokens=2, draft_length=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate(model, [[1]], max_new_tokens=2)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -0.1}, "temperature=-0.1: must be at least 0"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_p": 0.0}, "top_p=0.0: must be above 0"),
        ({"top_p": 1.1}, "top_p=1.1"),
        ({"top_p": 0.9}, "top_p=0.9 has no effect with temperature=0"),
    ],
)
def test_sampling_out_of_range_is_refused(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**values)


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e300])
def test_temperatures_at_the_ends_of_the_range(temperature: float) -> None:
    """Towards 0 the most likely tokens remain, towards infinity all are as likely."""
    logits_V = torch.tensor([3.0, -2.0, 3.0, 1.0])
    p_V = probabilities(logits_V, Sampling(temperature))
    expected = [0.5, 0, 0.5, 0] if temperature < 1 else [0.25] * 4
    assert p_V.tolist() == pytest.approx(expected)
