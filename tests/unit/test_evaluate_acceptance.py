"""Reports of accepted drafts: from given counts, and from a model."""

import json
from pathlib import Path

import pytest
import torch

from nemomodel.infer.acceptance import Measured, Prompt, measure, read_prompts, summarize
from nemomodel.infer.generate import Generation, generate
from nemomodel.infer.sampling import Sampling
from nemomodel.model.init import initialize
from nemomodel.model.nemotron import Nemotron
from tests.ranks.test_train import make_config


def counted(
    category: str, tokens: int, passes: int, drafted: list[int], accepted: list[int]
) -> Measured:
    generation = Generation([7] * tokens, False, passes, drafted, accepted)
    return Measured(category, generation, seconds=0.5)


def test_means_and_rates_are_those_of_the_counts() -> None:
    summary = summarize(
        [
            counted("code", 13, 4, [4, 4], [5 - 1, 4]),  # 12 tokens in 4 passes: 3
            counted("text", 11, 8, [8, 7], [2, 0]),  # 10 in 8: 1.25
            counted("text", 8, 4, [4, 4], [2, 1]),  # 7 in 4: 1.75
            counted("text", 1, 0, [0, 0], [0, 0]),  # ended at once
        ]
    )
    text, every = summary["categories"]["text"], summary["all"]
    assert list(summary["categories"]) == ["code", "text"]
    assert summary["categories"]["code"]["acceptance_length"] == 3
    assert text["acceptance_length"] == 1.5
    assert every["acceptance_length"] == 2
    assert summary["macro_average"] == 2.25
    assert text["acceptance_rate"] == [4 / 12, 1 / 4]
    assert text["joint_acceptance_rate"] == [4 / 12, 1 / 11]
    assert every["acceptance_rate"] == [8 / 16, 5 / 8]
    assert (every["drafted"], every["accepted"]) == ([16, 15], [8, 5])
    assert (every["prompts"], every["tokens"], every["passes"]) == (4, 33, 16)
    assert every["tokens_per_s"] == 33 / 2


def test_what_never_happened_has_no_mean() -> None:
    summary = summarize([counted("a", 1, 0, [0], [0])])
    assert summary["macro_average"] is None
    assert summary["all"]["acceptance_length"] is None
    assert summary["all"]["acceptance_rate"] == [None]


@pytest.fixture
def model(tmp_path: Path) -> Nemotron:
    config = make_config(tmp_path).model
    model = Nemotron(config, dtype=torch.float64)
    initialize(model, seed=1)
    return model.eval()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_counts_add_up_to_the_tokens(model: Nemotron, temperature: float) -> None:
    prompts = [("a", [1, 2, 3]), ("b", [4]), ("a", [5, 6])]
    options = {"max_new_tokens": 20, "stop_ids": [9]}
    done = []
    measured = measure(
        model,
        prompts,
        **options,
        sampling=Sampling(temperature=temperature),
        draft_length=2,
        on_prompt=lambda: done.append(1),
    )
    assert len(done) == 3
    for m in measured:
        g = m.generation
        assert g.stopped or len(g.tokens) == 1 + g.passes + sum(g.accepted)
    summary = summarize(measured)
    # The last pass of a prompt has nothing to draft where one token is left.
    assert 0 <= summary["all"]["passes"] - summary["all"]["drafted"][0] <= 3
    if not temperature:
        plain = [generate(model, [ids], **options)[0].tokens for _, ids in prompts]
        assert [m.generation.tokens for m in measured] == plain


def test_without_drafts_a_pass_gives_a_token(model: Nemotron) -> None:
    options = {"max_new_tokens": 5, "stop_ids": [], "sampling": Sampling(), "draft_length": 0}
    summary = summarize(measure(model, [("a", [1, 2])], **options))
    assert summary["all"]["acceptance_length"] == 1
    assert summary["all"]["acceptance_rate"] == []


def test_equal_prompts_are_continued_differently_and_again_the_same(model: Nemotron) -> None:
    options = {"max_new_tokens": 12, "stop_ids": [], "draft_length": 2}
    runs = [
        [
            m.generation.tokens
            for m in measure(
                model, [("a", [1, 2])] * 2, sampling=Sampling(temperature=1.0, seed=seed), **options
            )
        ]
        for seed in (5, 5, 8)
    ]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]
    assert runs[0][0] != runs[0][1]


def test_prompts_are_read(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    lines = [
        {"prompt": "one\u2028line", "category": "code", "id": 3},
        {"prompt": "two"},
        {"prompt": "three", "category": None},
    ]
    text = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    path.write_text(text + "\n\n", encoding="utf-8")
    expected = [Prompt("one\u2028line", "code"), Prompt("two", "none"), Prompt("three", "none")]
    assert read_prompts(path) == expected


def test_every_bad_line_is_listed(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": ""}\n{"prompt": "good"}\n{"prompt":\n\n[1]\n{"text": "x"}\n')
    with pytest.raises(ValueError, match="4 lines are wrong") as caught:
        read_prompts(path)
    lines = str(caught.value).splitlines()
    assert [line.split(":")[1] for line in lines[1:]] == ["1", "3", "5", "6"]
    assert "has no 'prompt', only ['text']" in lines[4]

    path.write_text("\n")
    with pytest.raises(ValueError, match="has no prompts"):
        read_prompts(path)
    path.write_bytes(b'{"prompt": "\xff"}')
    with pytest.raises(ValueError, match="not UTF-8"):
        read_prompts(path)
