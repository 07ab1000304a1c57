"""tools/convert.py: what it writes beside the weights, and what it leaves when it fails."""

import errno
import importlib.util
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch.distributed.checkpoint import DefaultLoadPlanner

import nemomodel
from nemomodel.checkpoint.files import MANIFEST, CheckpointError, describe_file
from nemomodel.checkpoint.huggingface import progress
from nemomodel.checkpoint.huggingface.folder import INDEX, open_folder
from nemomodel.checkpoint.huggingface.side_files import end_token_ids, find_tokenizer
from nemomodel.checkpoint.huggingface.tensor_files import Stored
from nemomodel.config.load import parse_model
from nemomodel.data.tokenizer import train_tokenizer
from tests.conftest import fork_safely
from tests.unit.test_hf_folder import EXPERT, change_json, change_tensors, write_folder

ROOT = Path(__file__).parents[2]
A_LOG = "backbone.layers.0.mixer.A_log"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "hf")


@pytest.fixture
def convert() -> Iterator[Callable[..., int]]:
    """Run the tool in this process; its exit code."""
    handler = signal.getsignal(signal.SIGTERM)
    tool = _tool()

    def run(*arguments: object) -> int:
        return tool.main([str(argument) for argument in arguments])

    yield run
    signal.signal(signal.SIGTERM, handler)


def _tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("convert", ROOT / "tools/convert.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def seal(checkpoint: Path) -> None:
    """Write the manifest anew, after the test has changed a file."""
    change_json(
        checkpoint / MANIFEST,
        lambda raw: raw.update(
            files={
                name: describe_file(checkpoint / name)
                for name in raw["files"]
                if (checkpoint / name).exists()
            }
        ),
    )


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for path in folder.glob("*.safetensors") for n, t in load_file(path).items()}


def make_run(folder: Path, root: Path, convert: Callable[..., int]) -> Tokenizer:
    """A run folder as training leaves it, with the weights of `folder`."""
    step = root / "checkpoints/step_00000003"
    step.parent.mkdir(parents=True)
    assert convert("import", folder, step) == 0
    shutil.rmtree(step / "hf")
    change_json(step / "state.json", lambda raw: raw["config"].update(train={"seq_length": 512}))
    seal(step)
    (root / "config.json").write_text("{}")
    # Byte level takes 257 tokens; the model has 97: cut to what it can say.
    tokenizer = train_tokenizer(["a few words"], vocab_size=300)
    raw = json.loads(tokenizer.to_str())
    raw["model"]["vocab"] = {t: i for t, i in raw["model"]["vocab"].items() if i < 90}
    raw["model"]["merges"] = []
    (root / "tokenizer.json").write_text(json.dumps(raw))
    return Tokenizer.from_str(json.dumps(raw))


def test_imported_checkpoint_is_whole_and_says_what_it_is(
    folder: Path, convert: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = folder.parent / "ckpt"
    (folder / "tokenizer.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ x }}")
    (folder / "modeling_nemotron_h.py").write_text("boom")
    (folder / "training_args.bin").write_bytes(b"boom")
    assert convert("import", folder, checkpoint) == 0
    assert names(checkpoint / "hf") == {"config.json", "tokenizer.json", "chat_template.jinja"}
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    written = {str(p.relative_to(checkpoint)) for p in checkpoint.rglob("*") if p.is_file()}
    assert written == {*manifest["files"], MANIFEST}
    output = capsys.readouterr().out
    text = (checkpoint / "model.toml").read_text()
    assert text in output
    model = parse_model(tomllib.loads(text)["model"], where="model.toml")
    assert model == open_folder(folder).config == nemomodel.load_model(checkpoint).config
    state = json.loads((checkpoint / "state.json").read_text())
    assert (state["format"], state["step"], state["tokens"]) == (1, 0, 0)
    assert state["config"].keys() == {"model", "precision"}


def test_side_files_and_unknown_keys_come_back(folder: Path, convert: Callable[..., int]) -> None:
    files = {
        "tokenizer.json": '{"model": {"vocab": {"a": 0}}, "added_tokens": []}',
        "tokenizer_config.json": '{"bos_token": "<s>"}',
        "special_tokens_map.json": "{}",
        "generation_config.json": '{"eos_token_id": [2, 11]}',
        "chat_template.jinja": "{{ messages }}",
    }
    for name, text in files.items():
        (folder / name).write_text(text)
    more = {"rope_theta": 10000, "max_position_embeddings": 262144, "auto_map": {"a": "b.py"}}
    change_json(folder / "config.json", lambda raw: raw.update(more))
    back = folder.parent / "back"
    assert convert("import", folder, folder.parent / "ckpt") == 0
    assert convert("export", folder.parent / "ckpt", back, "--shard-size", "40KB") == 0
    for name, text in files.items():
        assert (back / name).read_text() == text
    config = json.loads((back / "config.json").read_text())
    assert (config["rope_theta"], config["max_position_embeddings"]) == (10000, 262144)
    assert (config["eos_token_id"], config["dtype"]) == (7, "bfloat16")
    assert "auto_map" not in config
    for path in (folder, folder.parent / "ckpt", back):
        assert end_token_ids(path) == [2, 11]
        assert find_tokenizer(path).read_text() == files["tokenizer.json"]


def test_shards_are_no_larger_than_asked(folder: Path, convert: Callable[..., int]) -> None:
    back = folder.parent / "back"
    assert convert("import", folder, folder.parent / "ckpt") == 0
    assert convert("export", folder.parent / "ckpt", back, "--shard-size", "40KB") == 0
    index = json.loads((back / INDEX).read_text())
    shards = sorted(path.name for path in back.glob("*.safetensors"))
    count = len(shards)
    assert count > 5
    assert shards == [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    found = {name: shard for shard in shards for name in load_file(back / shard)}
    assert index["weight_map"] == found
    sizes = [sum(t.nbytes for t in load_file(back / shard).values()) for shard in shards]
    assert index["metadata"]["total_size"] == sum(sizes)
    assert max(sizes) <= 40_000


def test_export_of_a_run_is_a_folder_transformers_can_talk_with(
    folder: Path, convert: Callable[..., int], tmp_path: Path
) -> None:
    from transformers import AutoTokenizer, NemotronHForCausalLM

    run, back = tmp_path / "run", tmp_path / "back"
    tokenizer = make_run(folder, run, convert)
    assert find_tokenizer(run / "checkpoints/step_00000003") == run / "tokenizer.json"
    assert end_token_ids(run) == [0]
    assert convert("export", run, back) == 0
    config = json.loads((back / "config.json").read_text())
    assert (config["eos_token_id"], config["pad_token_id"], config["bos_token_id"]) == (0, 0, None)
    assert config["max_position_embeddings"] == 512
    theirs = AutoTokenizer.from_pretrained(back)
    assert theirs.encode("GET") == tokenizer.encode("GET").ids
    assert (theirs.eos_token_id, theirs.pad_token, theirs.model_max_length) == (
        0,
        "<|endoftext|>",
        512,
    )
    model = NemotronHForCausalLM.from_pretrained(back)
    assert model.generation_config.eos_token_id == 0
    expected = read_all(folder)
    assert all(torch.equal(value, expected[name]) for name, value in read_all(back).items())


def test_export_ships_the_tokenizer_the_run_was_trained_with(
    folder: Path,
    convert: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    make_run(folder, run, convert)
    own = (run / "tokenizer.json").read_text()
    (run / "hf").mkdir()
    shutil.copy(folder / "config.json", run / "hf")
    (run / "hf/LICENSE").write_text("free")
    before = {
        "tokenizer.json": '{"model": {"vocab": {"a": 5, "</s>": 9}}, "added_tokens": []}',
        "tokenizer_config.json": '{"eos_token": "</s>"}',
        "generation_config.json": '{"eos_token_id": 9, "bos_token_id": 5}',
        **dict.fromkeys(("special_tokens_map.json", "vocab.json", "tokenizer.model"), "{}"),
    }
    for name, text in before.items():
        (run / "hf" / name).write_text(text)
    change_json(run / "hf/config.json", lambda raw: raw.update(bos_token_id=5, rope_theta=7))
    assert end_token_ids(run) == [0]
    assert convert("export", run, tmp_path / "own") == 0
    assert "tokenizer, end tokens: those of the run" in capsys.readouterr().out
    found = tmp_path / "own"
    assert {n for n in names(found) if not n.startswith("model")} == {
        *("config.json", "generation_config.json", "LICENSE"),
        *("tokenizer.json", "tokenizer_config.json"),
    }
    assert (found / "tokenizer.json").read_text() == own
    assert json.loads((found / "tokenizer_config.json").read_text())["eos_token"] == "<|endoftext|>"
    config = json.loads((found / "config.json").read_text())
    assert (config["eos_token_id"], config["pad_token_id"], config["bos_token_id"]) == (0, 0, None)
    assert config["rope_theta"] == 7
    assert json.loads((found / "generation_config.json").read_text())["eos_token_id"] == 0

    # The same tokenizer, saved with other spaces: everything else about it holds.
    (run / "hf/tokenizer.json").write_text(json.dumps(json.loads(own), indent=4))
    assert convert("export", run, tmp_path / "same") == 0
    assert "tokenizer, end tokens" not in capsys.readouterr().out
    assert end_token_ids(run) == [9]
    assert (tmp_path / "same/vocab.json").exists()
    text = (tmp_path / "same/generation_config.json").read_text()
    assert text == before["generation_config.json"]


def test_padding_is_removed(folder: Path, convert: Callable[..., int], tmp_path: Path) -> None:
    checkpoint, expected = tmp_path / "ckpt", read_all(folder)
    assert convert("import", folder, checkpoint) == 0
    assert convert("export", checkpoint, tmp_path / "option", "--vocab-size", "90") == 0
    # The embedding has been padded since the import: the folder it came from has fewer rows.
    change_json(checkpoint / "hf/config.json", lambda raw: raw.update(vocab_size=90))
    seal(checkpoint)
    assert convert("export", checkpoint, tmp_path / "carried") == 0
    for name in ("option", "carried"):
        back = read_all(tmp_path / name)
        for key in ("backbone.embeddings.weight", "lm_head.weight"):
            assert torch.equal(back[key], expected[key][:90])
        assert json.loads((tmp_path / name / "config.json").read_text())["vocab_size"] == 90
    assert convert("verify", tmp_path / "carried", checkpoint) == 0
    assert convert("verify", tmp_path / "carried", checkpoint, "--vocab-size", "97") == 1


def test_the_token_that_ends_a_text_keeps_its_row(
    folder: Path, convert: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in (*folder.glob("tokenizer*"), folder / "generation_config.json"):
        file.unlink(missing_ok=True)
    change_json(folder / "config.json", lambda raw: raw.update(eos_token_id=[3, 9]))
    assert convert("import", folder, tmp_path / "ckpt") == 0
    assert convert("export", tmp_path / "ckpt", tmp_path / "back", "--vocab-size", "9") == 2
    assert "vocab_size=9: token 9 ends a text" in capsys.readouterr().err
    assert not (tmp_path / "back").exists()
    assert convert("export", tmp_path / "ckpt", tmp_path / "back", "--vocab-size", "10") == 0
    assert convert("import", tmp_path / "back", tmp_path / "again") == 0


@pytest.mark.parametrize(
    ("rows", "message"),
    [("98", "has 97 rows"), ("0", "has 97 rows"), ("80", "has tokens up to id 89")],
)
def test_rows_that_cannot_be(
    folder: Path,
    convert: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    rows: str,
    message: str,
) -> None:
    make_run(folder, tmp_path / "run", convert)
    assert convert("export", tmp_path / "run", tmp_path / "back", "--vocab-size", rows) == 2
    assert f"vocab_size={rows}: " in (text := capsys.readouterr().err)
    assert message in text


def test_rounding_of_wide_vectors_is_told(
    folder: Path,
    convert: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    exact = torch.rand(8) + 1e-7
    change_tensors(folder, lambda tensors: tensors.update({A_LOG: exact}))
    checkpoint = tmp_path / "ckpt"
    assert convert("import", folder, checkpoint) == 0
    assert convert("verify", folder, checkpoint) == 0, "nothing was lost"
    capsys.readouterr()
    assert convert("export", checkpoint, tmp_path / "back") == 0
    assert "rounded to BF16: 1 FP32 tensors (A_log)" in capsys.readouterr().out
    assert torch.equal(read_all(tmp_path / "back")[A_LOG], exact.bfloat16())
    assert convert("verify", folder, tmp_path / "back") == 1
    assert convert("export", checkpoint, tmp_path / "wide", "--dtype", "float32") == 0
    assert "rounded" not in capsys.readouterr().out
    wide = read_all(tmp_path / "wide")
    assert {tensor.dtype for tensor in wide.values()} == {torch.float32}
    assert torch.equal(wide[A_LOG], exact)
    narrow = read_all(folder)
    assert all(torch.equal(value, narrow[name].float()) for name, value in wide.items())


def test_router_biases_in_bf16_are_the_same_in_fp32(
    folder: Path, convert: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    biases = {n: t.bfloat16() for n, t in read_all(folder).items() if n.endswith("correction_bias")}
    change_tensors(folder, lambda t: t.update({n: biases[n] for n in t.keys() & biases.keys()}))
    count = sum(t.dtype == torch.bfloat16 for n, t in read_all(folder).items() if n in biases)
    assert count >= 1
    assert convert("import", folder, tmp_path / "ckpt") == 0
    assert f"{count} router biases were BF16" in capsys.readouterr().out
    assert convert("verify", folder, tmp_path / "ckpt") == 0
    assert convert("export", tmp_path / "ckpt", tmp_path / "back") == 0
    back = read_all(tmp_path / "back")
    name = next(n for n, t in read_all(folder).items() if n in biases and t.dtype == torch.bfloat16)
    assert torch.equal(back[name], biases[name].float())
    assert convert("verify", folder, tmp_path / "back") == 0
    change_tensors(folder, lambda t: t[name][0].add_(1))
    assert convert("verify", folder, tmp_path / "back") == 1


def test_verify_lists_hashes_and_names_every_difference(
    folder: Path, convert: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = shutil.copytree(folder, tmp_path / "other")
    assert convert("verify", folder, other) == 0
    lines = capsys.readouterr().out.splitlines()
    count = len(read_all(folder))
    assert lines[-1] == f"{count} tensors, 0 different"
    assert len({line.split()[-1] for line in lines[:-1]}) == count
    assert all(len(line.split()[0]) == 64 for line in lines[:-1])
    # One bit of one value, and -0 for 0, which compare equal as numbers.
    change_tensors(other, lambda t: t[EXPERT].view(torch.int16)[3, 5].bitwise_xor_(1))
    change_tensors(folder, lambda t: t[A_LOG].zero_())
    change_tensors(other, lambda t: t[A_LOG].zero_().neg_())
    assert convert("verify", folder, other) == 1
    output = capsys.readouterr().out
    assert f"DIFFERENT {EXPERT}\n  A " in output
    assert f"DIFFERENT {A_LOG}\n  A " in output
    assert f"{count} tensors, 2 different" in output


def test_plan_prints_the_totals(
    convert: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert("plan", ROOT / "configs/super_120b.toml") == 0
    assert capsys.readouterr().out == (
        "42,683 tensors, 123,611,033,088 elements, 247,222,108,160 bytes; "
        "41 router biases are FP32, the others BF16\n"
    )
    lightning = ("model.mtp.num_depths=1", "model.mtp.layer_pattern=*E")
    assert convert("plan", ROOT / "configs/nano_30b.toml", *lightning) == 0
    assert capsys.readouterr().out.startswith("6,513 tensors, 32,913,266,240 elements, ")
    assert convert("plan", ROOT / "configs/tiny.toml", "--names") == 0
    assert "backbone.layers.0.mixer.conv1d.weight F32 [384, 1, 4]" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("import", "{hf}", "{hf}"), "exists; name a folder that does not"),
        (("import", "{tmp}/nowhere", "{tmp}/new"), "No such file or directory"),
        (("import", "{ckpt}", "{tmp}/new"), "No such file or directory"),
        (("export", "{hf}", "{tmp}/new"), "no checkpoint here"),
        (("export", "{ckpt}", "{hf}"), "exists; name a folder that does not"),
        (("verify", "{hf}", "{tmp}/nowhere"), "no such folder"),
        (("verify", "{hf}", "{tmp}"), "no checkpoint here"),
        (("plan", "{tmp}/x.toml"), "No such file"),
    ],
    ids=lambda value: "-".join(value).replace("/", "") if isinstance(value, tuple) else "",
)
def test_bad_input_is_one_message_and_code_2(
    folder: Path,
    convert: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    message: str,
) -> None:
    assert convert("import", folder, tmp_path / "ckpt") == 0
    capsys.readouterr()
    values = {"hf": folder, "ckpt": tmp_path / "ckpt", "tmp": tmp_path}
    assert convert(*(argument.format(**values) for argument in arguments)) == 2
    output = capsys.readouterr()
    assert output.err.startswith("convert: ")
    assert message in output.err
    assert names(tmp_path) == {"hf", "ckpt"}


def test_damaged_checkpoint_is_not_exported(
    folder: Path, convert: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = tmp_path / "ckpt"
    assert convert("import", folder, checkpoint) == 0
    data = bytearray((checkpoint / "__0_0.distcp").read_bytes())
    data[len(data) // 2] ^= 1
    (checkpoint / "__0_0.distcp").write_bytes(data)
    assert convert("export", checkpoint, tmp_path / "back") == 2
    assert "SHA-256 differs from the manifest" in capsys.readouterr().err
    assert names(tmp_path) == {"hf", "ckpt"}


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("state.json", b"{", "Expecting property name"),
        ("state.json", b"[]", "has no config of a model"),
        ("state.json", b'{"config": {"model": {}}}', "has no config of a model"),
        ("state.json", b'{"config": {"model": 1, "precision": {"recipe": "bf16"}}}', "has no con"),
        (".metadata", b"nonsense", "is not readable"),
        (".metadata", b"", "is not readable"),
        (".metadata", pickle.dumps({"a": 1}), "is no index of tensors"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_sealed_nonsense_is_named(
    folder: Path,
    convert: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    file: str,
    content: bytes,
    message: str,
) -> None:
    checkpoint = tmp_path / "ckpt"
    assert convert("import", folder, checkpoint) == 0
    (checkpoint / file).write_bytes(content)
    seal(checkpoint)
    capsys.readouterr()
    for arguments in (("export", checkpoint, tmp_path / "back"), ("verify", checkpoint, folder)):
        assert convert(*arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"convert: {checkpoint / file}: ")
        assert message in error
    assert names(tmp_path) == {"hf", "ckpt"}


def test_checkpoint_of_another_config_lists_all_tensors(
    folder: Path, convert: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = tmp_path / "ckpt"
    assert convert("import", folder, checkpoint) == 0

    def change(raw: dict) -> None:
        raw["config"]["model"]["layer_pattern"] = "ME*-MM"
        raw["config"]["model"]["ffn_size"] = 81

    change_json(checkpoint / "state.json", change)
    seal(checkpoint)
    assert convert("export", checkpoint, tmp_path / "back") == 2
    error = capsys.readouterr().err
    assert "model.blocks.3.mixer.fc1.weight: has [80, 48] bfloat16, the model needs [81" in error
    assert "model.blocks.5.mixer.in_proj.weight: missing, the model needs [200, 48]" in error
    assert "model.blocks.5.mixer.experts.fc1: extra, the model has no such tensor" in error


DIRECTIONS = ["import", "export"]


@pytest.fixture(params=DIRECTIONS)
def job(
    request: pytest.FixtureRequest, folder: Path, convert: Callable[..., int], tmp_path: Path
) -> list[object]:
    """Arguments of a conversion whose input is there; its target is `new`."""
    if request.param == "import":
        return ["import", folder, tmp_path / "new"]
    assert convert("import", folder, tmp_path / "ckpt") == 0
    return ["export", tmp_path / "ckpt", tmp_path / "new", "--shard-size", "40KB"]


def _signal_itself(number: signal.Signals) -> Callable[..., None]:
    """Stands in for the progress bar or a read: the process gets a signal there."""

    def receive(*_: object) -> None:
        signal.raise_signal(number)

    return receive


@pytest.mark.parametrize("where", ["between tensors", "within a read"])
@pytest.mark.parametrize(
    ("number", "words"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")]
)
def test_interrupted_conversion_leaves_nothing(
    job: list[object],
    convert: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
    words: str,
    where: str,
) -> None:
    before = names(tmp_path)
    capsys.readouterr()
    if where == "between tensors":
        monkeypatch.setattr(progress.ByteProgress, "advance", _signal_itself(number))
    elif job[0] == "import":
        monkeypatch.setattr(Stored, "read", _signal_itself(number))
    else:
        monkeypatch.setattr(DefaultLoadPlanner, "resolve_tensor", _signal_itself(number))
    assert convert(*job) == 128 + number
    assert capsys.readouterr().err == f"convert: {words}; nothing was written\n"
    assert names(tmp_path) == before


def test_output_that_nobody_reads_is_no_error(tmp_path: Path) -> None:
    command = f"{sys.executable} tools/convert.py plan configs/nano_30b.toml --names | head -n 1"
    shell = ["bash", "-c", f"{command}; exit ${{PIPESTATUS[0]}}"]
    done = subprocess.run(shell, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")
    assert done.stdout == "backbone.embeddings.weight BF16 [131072, 2688]\n"


def _work_slowly(_: int, arguments: list[str], started: Path) -> None:
    def advance(*_: object) -> None:
        started.touch()
        time.sleep(0.05)

    progress.ByteProgress.advance = advance
    sys.exit(_tool().main(arguments))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=lambda n: n.name)
def test_killed_conversion_leaves_nothing_under_its_name(
    job: list[object], convert: Callable[..., int], tmp_path: Path, number: signal.Signals
) -> None:
    before, started = names(tmp_path), tmp_path / "started"
    with fork_safely():
        arguments = [str(argument) for argument in job]
        context = mp.start_processes(
            _work_slowly, (arguments, started), nprocs=1, join=False, start_method="fork"
        )
    process = context.processes[0]
    deadline = time.monotonic() + 60
    while not started.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, number)
    process.join(30)
    started.unlink()
    if number == signal.SIGTERM:
        assert process.exitcode == 128 + signal.SIGTERM
        assert names(tmp_path) == before
        return
    assert names(tmp_path) == before | {".new.partial"}
    assert convert(*job) == 0, "what was left does not disturb the next one"
    assert names(tmp_path) == before | {"new"}


@pytest.mark.parametrize("kind", ["folder", "link", "dangling link", "file"])
def test_what_has_the_name_of_the_hidden_folder_is_left_alone(
    folder: Path,
    convert: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    kind: str,
) -> None:
    precious, hidden = tmp_path / "precious", tmp_path / ".new.partial"
    precious.mkdir()
    (precious / "config.json").write_text("x")
    match kind:
        case "folder":
            precious.rename(hidden)
        case "link":
            hidden.symlink_to(precious)
        case "dangling link":
            hidden.symlink_to("nowhere")
        case "file":
            hidden.write_text("x")
    before = names(tmp_path)
    assert convert("import", folder, tmp_path / "new") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"convert: {hidden}: ")
    assert error.endswith("move it away\n")
    assert names(tmp_path) == before
    if kind in ("folder", "link"):
        assert (hidden / "config.json").read_text() == "x"


def test_two_conversions_to_one_place(
    job: list[object],
    convert: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    codes = []

    def meanwhile(*_: object) -> None:
        if not codes:
            codes.append(None)
            codes[0] = convert(*job)

    monkeypatch.setattr(progress.ByteProgress, "advance", meanwhile)
    assert convert(*job) == 0
    assert codes == [2]
    assert "another process is writing it" in capsys.readouterr().err


def test_disk_without_room_is_told_before_writing(
    job: list[object],
    convert: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before, usage = names(tmp_path), shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
    assert convert(*job) == 2
    assert "needs 0.050 GB, the disk has 0.001 GB free" in capsys.readouterr().err
    assert names(tmp_path) == before


def _write_beyond_the_limit(_: int, arguments: list[str]) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    output = Path(arguments[2]).with_name("output")
    sys.stderr = output.open("w")
    code = _tool().main(arguments)
    sys.stderr.close()
    assert code == 1
    assert os.strerror(errno.EFBIG) in output.read_text()


def test_full_disk_leaves_nothing(job: list[object], tmp_path: Path) -> None:
    before = names(tmp_path)
    with fork_safely():
        arguments = [str(argument) for argument in job]
        mp.start_processes(_write_beyond_the_limit, (arguments,), nprocs=1, start_method="fork")
    assert names(tmp_path) == before | {"output"}


def test_carried_link_cannot_leave_the_folder(
    folder: Path, convert: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "secret").write_text("x")
    (folder / "tokenizer.json").symlink_to(tmp_path / "secret")
    assert convert("import", folder, tmp_path / "ckpt") == 2
    assert "tokenizer.json: is a link that leads out of the folder" in capsys.readouterr().err
    assert names(tmp_path) == {"hf", "secret"}


@pytest.mark.parametrize("kind", ["folder", "dangling link", "loop"])
def test_carried_files_are_files(
    folder: Path,
    convert: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kind: str,
) -> None:
    path = folder / "tokenizer.json"
    match kind:
        case "folder":
            path.mkdir()
        case "dangling link":
            path.symlink_to("nowhere")
        case "loop":
            path.symlink_to(path.name)
    monkeypatch.setattr(Stored, "read", None)  # nothing is read before the error
    assert convert("import", folder, tmp_path / "ckpt") == 2
    message = {"loop": f"{folder}: 'tokenizer.json' is a loop of links"}.get(kind, f"{path}: is no")
    assert capsys.readouterr().err.startswith(f"convert: {message}")
    assert names(tmp_path) == {"hf"}
    with pytest.raises(CheckpointError, match=message):
        find_tokenizer(folder)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("ids", [-1, 97, True, 1.0, "2", [2, None], [3, 97], {}], ids=str)
def test_end_tokens_are_ids(
    folder: Path,
    convert: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    ids: object,
) -> None:
    if not (folder / name).exists():
        (folder / name).write_text("{}")
    change_json(folder / name, lambda raw: raw.update(eos_token_id=ids))
    assert convert("import", folder, tmp_path / "ckpt") == 2
    error = capsys.readouterr().err
    assert f"{folder / name}: eos_token_id=" in error
    assert "token ids are whole numbers from 0 to 96" in error
    assert names(tmp_path) == {"hf"}
    with pytest.raises(CheckpointError, match="eos_token_id="):
        end_token_ids(folder)


def test_no_transformers_is_needed() -> None:
    tree = [*(ROOT / "nemomodel").rglob("*.py"), ROOT / "tools/convert.py"]
    assert [path for path in tree if "import transformers" in path.read_text()] == []
    assert [path for path in tree if "from transformers" in path.read_text()] == []
