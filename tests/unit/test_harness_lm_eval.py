"""The adapter inside lm-evaluation-harness, against the harness's own transformers backend."""

import json
from pathlib import Path

import pytest

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval (extra: eval) is not installed")
pytest.importorskip("transformers", reason="transformers (extra: hf) is not installed")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # noqa: E402
from transformers import PreTrainedTokenizerFast  # noqa: E402

from nemomodel.data.tokenizer import train_tokenizer  # noqa: E402
from nemomodel.infer.harness import HarnessModel  # noqa: E402
from nemomodel.infer.scoring import rolling_windows  # noqa: E402
from tests import hf_models  # noqa: E402
from tools.evaluate import main  # noqa: E402

VOCAB = 320
MAX_LENGTH = 40
WORDS = "the model reads what it has been given and learns to say it again, line after line"
TEXTS = [WORDS[i % 29 : 40 + i % 43] + ".\n" for i in range(200)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with all layer kinds, and its tokenizer."""
    path = tmp_path_factory.mktemp("model")
    hf_models.save(hf_models.make_model("ME*-M", vocab_size=VOCAB, eos_token_id=0), path)
    train_tokenizer(TEXTS, vocab_size=VOCAB).save(str(path / "tokenizer.json"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(path / "tokenizer.json"),
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
    )
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def theirs(folder: Path) -> HFLM:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    model = hf_models.load(folder).model
    return HFLM(
        pretrained=model, tokenizer=tokenizer, max_length=MAX_LENGTH, batch_size=1, device="cpu"
    )


@pytest.fixture(scope="module", params=[1, 4])
def ours(folder: Path, request: pytest.FixtureRequest) -> HarnessModel:
    return HarnessModel(folder, max_length=MAX_LENGTH, batch_size=request.param, dtype="float32")


def instances(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(kind, {}, given, index) for index, given in enumerate(arguments)]


def pairs(theirs: HFLM) -> list[tuple[str, str]]:
    """Choices of one context, texts without context, contexts that end in spaces or are long."""
    found = [("the model reads ", choice) for choice in ("it", "what it has", "line")]
    found += [("the model", choice) for choice in (" says", " reads", ",")]
    found += [("", "the model"), ("again,  ", " it"), (" ".join([WORDS] * 3), " after all")]
    context = theirs.tok_encode(WORDS)
    for length in (1, 2):
        request = instances("generate_until", [(WORDS, {"max_gen_toks": length})])
        greedy = theirs.generate_until(request, disable_tqdm=True)[0]
        if theirs.tok_encode(WORDS + greedy)[: len(context)] == context:
            found.append((WORDS, greedy))
    return found


def test_log_likelihoods_are_those_of_the_transformers_backend(
    theirs: HFLM, ours: HarnessModel
) -> None:
    requests = instances("loglikelihood", pairs(theirs))
    expected = theirs.loglikelihood(requests, disable_tqdm=True)
    found = ours.loglikelihood(requests, disable_tqdm=True)
    assert [score for score, _ in found] == pytest.approx([s for s, _ in expected], abs=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert {greedy for _, greedy in found} == {True, False}


def test_rolling_log_likelihoods_are_those_of_the_transformers_backend(
    theirs: HFLM, ours: HarnessModel
) -> None:
    texts = [("one",), (WORDS,), (" ".join([WORDS] * 6),)]
    assert len(theirs.tok_encode(texts[2][0])) > 2 * MAX_LENGTH
    requests = instances("loglikelihood_rolling", texts)
    expected = theirs.loglikelihood_rolling(requests, disable_tqdm=True)
    found = ours.loglikelihood_rolling(requests, disable_tqdm=True)
    assert found == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("length", [1, 4, 5, 11])
def test_windows_are_those_of_the_harness(length: int) -> None:
    ids = list(range(length))
    expected = get_rolling_token_windows(ids, prefix_token=9, max_seq_len=4, context_len=1)
    found = rolling_windows(ids, prefix_id=9, max_length=4)
    assert list(found) == [make_disjoint_window(window) for window in expected]


def test_generated_texts_are_those_of_the_transformers_backend(
    theirs: HFLM, ours: HarnessModel
) -> None:
    free = {"until": [], "max_gen_toks": 12, "do_sample": False}
    contexts = ["the model", WORDS, "again", " ".join([WORDS] * 3)]
    texts = theirs.generate_until(
        instances("generate_until", [(context, free) for context in contexts]), disable_tqdm=True
    )
    stop = {"until": [texts[0][3:6], texts[1][5:7]], "max_gen_toks": 12}
    short = {"until": ["\n"], "max_gen_toks": 3, "temperature": 0.0}
    given = [(context, kwargs) for kwargs in (free, stop, short) for context in contexts]
    requests = instances("generate_until", given)
    expected = theirs.generate_until(requests, disable_tqdm=True)
    assert expected[4] != expected[0]
    assert ours.generate_until(requests, disable_tqdm=True) == expected


def test_sampled_texts_depend_on_the_seed_and_the_repeat(folder: Path) -> None:
    request = ("the model", {"do_sample": True, "temperature": 1.0, "max_gen_toks": 16})
    requests = instances("generate_until", [request] * 3)
    runs = [
        HarnessModel(folder, batch_size=2, max_length=MAX_LENGTH, seed=seed).generate_until(
            requests, disable_tqdm=True
        )
        for seed in (1, 1, 20)
    ]
    assert runs[0] == runs[1]
    assert len(set(runs[0] + runs[2])) == 6


def test_no_room_for_the_prompt_is_an_error(folder: Path) -> None:
    model = HarnessModel(folder, max_length=MAX_LENGTH)
    requests = instances("generate_until", [("the model", {"max_gen_toks": MAX_LENGTH})])
    with pytest.raises(ValueError, match=r"40 new tokens leave no room .* max_length=40"):
        model.generate_until(requests)
    with pytest.raises(ValueError, match="batch_size='auto': must be a number"):
        HarnessModel(folder, batch_size="auto")


CHOICE = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{path}/choice.jsonl"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: ["it", "again", "line"]
doc_to_target: "{{{{answer}}}}"
"""


@pytest.mark.slow  # lm-eval reads the files of all its tasks first
def test_command_runs_tasks(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    lines = [json.dumps({"question": text[:20], "answer": i % 3}) for i, text in enumerate(TEXTS)]
    (tmp_path / "choice.jsonl").write_text("\n".join(lines))
    (tmp_path / "choice.yaml").write_text(CHOICE.format(path=tmp_path))
    command = ["harness", str(folder), "--include-path", str(tmp_path), "--limit", "6"]
    result = tmp_path / "result.json"
    assert main([*command, "--tasks", "tiny_choice", "--json", str(result)]) == 0
    assert "tiny_choice" in capsys.readouterr().out
    accuracy = json.loads(result.read_text())["results"]["tiny_choice"]["acc,none"]
    assert accuracy in [n / 6 for n in range(7)]
    assert main([*command, "--tasks", "tiny_choice,nothing,more"]) == 2
    assert "--tasks: lm-eval has no nothing, more" in capsys.readouterr().err
