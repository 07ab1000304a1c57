"""What the adapter of lm-evaluation-harness is made of; none of it needs lm-eval."""

import importlib.util
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from nemomodel.infer.generate import generate
from nemomodel.infer.sampling import Sampling
from nemomodel.infer.scoring import rolling_windows, score_continuations
from nemomodel.infer.until import Settings, cut, generate_until, parse_settings
from nemomodel.model.init import initialize
from nemomodel.model.nemotron import Nemotron
from nemomodel.ops.loss import CHUNK_TOKENS
from tests.ranks.test_train import VOCAB, make_config
from tools.evaluate import main


@pytest.fixture
def model(tmp_path: Path) -> Nemotron:
    config = make_config(tmp_path).model
    model = Nemotron(config, dtype=torch.float64)
    initialize(model, seed=1)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    return model.eval()


def random_ids(length: int, *, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCAB, (length,), generator=generator).tolist()


@torch.no_grad()
def score_alone(model: Nemotron, inputs: list[int], labels: list[int]) -> tuple[float, bool]:
    """From the logits of one sequence; the last ones are those of `labels`."""
    logits_SV = model(torch.tensor([inputs]))[0, len(inputs) - len(labels) :]
    label_S = torch.tensor(labels, dtype=torch.int64)
    loss = F.cross_entropy(logits_SV, label_S, reduction="sum")
    return -loss.item(), bool((logits_SV.argmax(-1) == label_S).all())


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_scores_are_those_of_each_pair_alone(model: Nemotron, batch_size: int) -> None:
    context = random_ids(9, seed=0)
    (greedy,) = generate(model, [context], max_new_tokens=4)
    pairs = [
        (context, greedy.tokens),
        (context, greedy.tokens[:1]),
        (context, [(greedy.tokens[0] + 1) % VOCAB]),
        (context, [*greedy.tokens[:3], (greedy.tokens[3] + 1) % VOCAB]),
        ([5], random_ids(1, seed=1)),
        (random_ids(30, seed=2), random_ids(7, seed=3)),
        (random_ids(2, seed=4), random_ids(20, seed=5)),
        (random_ids(3, seed=6), []),
    ]
    seen = {}
    found = score_continuations(
        model, pairs, batch_size=batch_size, max_length=50, on_pair=seen.__setitem__
    )
    for (before, after), score in zip(pairs, found, strict=True):
        expected, is_greedy = score_alone(model, (before + after)[: -1 if after else None], after)
        assert score.log_probability == pytest.approx(expected, rel=1e-10, abs=1e-12)
        assert score.is_greedy == is_greedy
    assert [score.is_greedy for score in found[:4]] == [True, True, False, False]
    assert [seen[index] for index in range(len(pairs))] == found


def test_long_contexts_lose_their_start(model: Nemotron) -> None:
    context, continuation = random_ids(40, seed=0), random_ids(5, seed=1)
    pairs = [(context, continuation), (context[-12:], continuation)]
    long, short = score_continuations(model, pairs, batch_size=2, max_length=16)
    assert long == short
    assert long.log_probability == pytest.approx(
        score_alone(model, (context + continuation)[-17:-1], continuation)[0], rel=1e-10
    )


def test_many_tokens_are_scored_in_chunks(model: Nemotron, monkeypatch: pytest.MonkeyPatch) -> None:
    context = random_ids(3, seed=0)
    (greedy,) = generate(model, [context], max_new_tokens=40)
    almost = list(greedy.tokens)
    almost[-1] = (almost[-1] + 1) % VOCAB
    pairs = [(context, random_ids(40, seed=1)), (context, greedy.tokens), (context, almost)]
    # In the first chunk alone; what follows is the most likely after it.
    early = [(greedy.tokens[0] + 1) % VOCAB]
    (rest,) = generate(model, [context + early], max_new_tokens=20)
    pairs.append((context, early + rest.tokens))
    whole = score_continuations(model, pairs, batch_size=4, max_length=64)
    assert [score.is_greedy for score in whole] == [False, True, False, False]
    monkeypatch.setitem(CHUNK_TOKENS, "cpu", 7)
    parts = score_continuations(model, pairs, batch_size=4, max_length=64)
    for part, score in zip(parts, whole, strict=True):
        assert part.log_probability == pytest.approx(score.log_probability, rel=1e-12)
        assert part.is_greedy == score.is_greedy


def test_pairs_that_cannot_be_scored_are_named(model: Nemotron) -> None:
    with pytest.raises(ValueError, match="a continuation has 17 tokens, more than max_length=16"):
        score_continuations(model, [([1], [2] * 17)], batch_size=1, max_length=16)
    with pytest.raises(ValueError, match="a context is empty"):
        score_continuations(model, [([], [2])], batch_size=1, max_length=16)


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 10, 13])
def test_rolling_windows_score_every_token_once_with_full_windows(length: int) -> None:
    ids = list(range(100, 100 + length))
    found = list(rolling_windows(ids, prefix_id=7, max_length=4))
    assert [token for _, continuation in found for token in continuation] == ids
    whole, stop = [7, *ids], 0
    for context, continuation in found:
        stop += len(continuation)
        inputs = (context + continuation)[:-1]
        assert inputs == whole[stop - len(inputs) : stop]
        assert len(inputs) == min(4, length)
    assert list(rolling_windows([], prefix_id=7, max_length=4)) == []


GIVEN = {
    "greedy": ({"until": ["\n\n"], "do_sample": False, "temperature": 0.7}, (("\n\n",), 64, 0, 1)),
    "nothing": ({}, ((), 64, 0.0, 1.0)),
    "text": ({"until": "Q:", "max_gen_toks": 9}, (("Q:",), 9, 0.0, 1.0)),
    "alias": ({"max_new_tokens": 8, "num_beams": 1}, ((), 8, 0.0, 1.0)),
    "sample": ({"do_sample": True, "until": [""]}, ((), 64, 1.0, 1.0)),
    "no temperature": ({"temperature": 0.0, "top_p": 0.95}, ((), 64, 0.0, 1.0)),
    "temperature": ({"temperature": 0.6, "top_p": 0.95}, ((), 64, 0.6, 0.95)),
}


@pytest.mark.parametrize("name", GIVEN)
def test_generation_arguments_of_tasks(name: str) -> None:
    given, expected = GIVEN[name]
    assert parse_settings(given, default_max_new_tokens=64) == Settings(*expected)


def test_unknown_generation_arguments_are_listed() -> None:
    with pytest.raises(ValueError, match=r"\{'num_beams': 4, 'typical_p': 0.2\} are not supported"):
        parse_settings({"num_beams": 4, "until": [], "typical_p": 0.2}, default_max_new_tokens=64)


def test_text_ends_before_the_first_stop_string() -> None:
    assert cut("one two three", ("three", "two")) == "one "
    assert cut("one", ("x",)) == "one"
    assert cut("one", ()) == "one"


def spell(ids: list[int]) -> str:
    """A decoder: one word per token."""
    return "".join(f"<{i}>" for i in ids)


class Asked(set[int]):
    """Counts how often a token was looked up."""

    times = 0

    def __contains__(self, token: object) -> bool:
        self.times += 1
        return super().__contains__(token)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_generation_stops_at_strings_and_tokens(model: Nemotron, temperature: float) -> None:
    prompts = [random_ids(n, seed=n) for n in (5, 11, 2)]
    plain = generate(
        model, prompts, max_new_tokens=30, sampling=Sampling(temperature=temperature, seed=3)
    )
    free = [g.tokens for g in plain]
    # Each prompt meets another stop; the first has its string in the middle of two tokens.
    until = (f"{free[0][4]}><{free[0][5]}", f"<{free[1][7]}>")
    stop_ids = Asked({free[2][2]})
    settings = Settings(until, 30, temperature, 1.0)
    found = generate_until(model, prompts, settings, decode=spell, stop_ids=stop_ids, seed=3)
    for text, tokens in zip(found, free, strict=True):
        tokens = tokens[: tokens.index(free[2][2])] if free[2][2] in tokens else tokens
        assert text == cut(spell(tokens), until)
    assert found[2] in spell(free[2][:2])
    # All have stopped after 8 tokens, so the batch did not go on to the limit.
    assert stop_ids.times < 2 * 3 * 9


def test_generation_without_stops_reaches_the_limit(model: Nemotron) -> None:
    prompts = [[1, 2, 3], [4]]
    plain = generate(model, prompts, max_new_tokens=6)
    found = generate_until(
        model, prompts, Settings((), 6, 0.0, 1.0), decode=spell, stop_ids=(), seed=0
    )
    assert found == [spell(g.tokens) for g in plain]


@pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is not None, reason="lm-eval is installed here"
)
def test_missing_lm_eval_names_the_extra(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["harness", str(tmp_path), "--tasks", "arc_easy"]) == 2
    assert (
        "harness needs lm-eval; install the extra: pip install -e .[eval]"
        in capsys.readouterr().err
    )
