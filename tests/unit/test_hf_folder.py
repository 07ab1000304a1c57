"""What a damaged, foreign or hostile Hugging Face folder is answered with."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import nemomodel
from nemomodel.checkpoint.files import CheckpointError
from nemomodel.checkpoint.huggingface.config import config_json
from nemomodel.checkpoint.huggingface.exporting import published_dtype
from nemomodel.checkpoint.huggingface.folder import INDEX, SINGLE, is_hf_folder, open_folder
from nemomodel.checkpoint.huggingface.names import plan
from nemomodel.checkpoint.huggingface.tensor_files import Writer, read_header
from nemomodel.checkpoint.weights import load_weights
from nemomodel.config.load import ConfigError
from nemomodel.model.nemotron import Nemotron
from tests.unit.test_hf_names import MODEL

EXPERT = "backbone.layers.1.mixer.experts.3.up_proj.weight"
FILES = ("first.safetensors", "second.safetensors")


def write_folder(folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A random model of every layer kind with two MTP blocks, in two files and an index."""
    folder.mkdir(parents=True)
    raw = config_json(MODEL, vocab_size=97, dtype="bfloat16", carried={"eos_token_id": 7})
    (folder / "config.json").write_text(json.dumps(raw))
    pieces = [piece for entry in plan(MODEL, dtype=dtype) for piece in entry.pieces]
    weight_map = {}
    for file, half in zip(FILES, (pieces[:60], pieces[60:]), strict=True):
        tensors = {
            piece.name: torch.randn(piece.shape).to(published_dtype(piece, dtype)) for piece in half
        }
        save_file(tensors, folder / file)
        weight_map |= dict.fromkeys(tensors, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "hf")


def change_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """In the file that has expert 3 of layer 1; the index follows."""
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    file = weight_map[EXPERT]
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file)
    weight_map = {name: f for name, f in weight_map.items() if f != file}
    weight_map |= dict.fromkeys(tensors, file)
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def refusal(folder: Path) -> str:
    with pytest.raises((CheckpointError, ConfigError)) as error:
        open_folder(folder)
    return str(error.value)


def test_intact_folder_is_read(folder: Path) -> None:
    found = open_folder(folder)
    assert (found.config.vocab_size, found.recipe) == (97, "bf16")
    assert found.config.layer_pattern == MODEL.layer_pattern
    expected = {name: t for file in FILES for name, t in load_file(folder / file).items()}
    assert {name: stored.shape for name, stored in found.tensors.items()} == {
        name: tuple(tensor.shape) for name, tensor in expected.items()
    }
    for name, stored in found.tensors.items():
        assert torch.equal(stored.read(), expected[name]), name


def test_missing_extra_and_misshapen_tensors_are_all_listed(folder: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors[EXPERT]
        tensors["backbone.layers.0.mixer.A_log"] = torch.zeros(9).bfloat16()
        tensors["backbone.layers.0.mixer.gamma"] = torch.zeros(2).bfloat16()

    change_tensors(folder, change)
    assert refusal(folder).split("\n  ") == [
        f"{folder}: the tensors are not those of config.json: 3 problems",
        "backbone.layers.0.mixer.A_log: has [9], the model needs [8]",
        f"{EXPERT}: missing, the model needs [24, 20]",
        "backbone.layers.0.mixer.gamma: extra, the model has no such tensor",
    ]


def test_a_config_of_another_model_lists_every_tensor(folder: Path) -> None:
    change_json(folder / "config.json", lambda raw: raw.update(hidden_size=64))
    lines = refusal(folder).split("\n  ")
    assert lines[1] == "backbone.embeddings.weight: has [97, 48], the model needs [97, 64]"
    # 48 is the width of the model and of nothing else.
    found = open_tensors(folder)
    wrong = {name for name, shape in found.items() if 48 in shape}
    assert f": {len(wrong)} problems" in lines[0]
    assert {line.split(":")[0] for line in lines[1:]} == wrong


def open_tensors(folder: Path) -> dict[str, tuple[int, ...]]:
    return {n: tuple(t.shape) for file in FILES for n, t in load_file(folder / file).items()}


def test_experts_share_a_line_and_nothing_else_is_left_out(folder: Path) -> None:
    experts = "backbone.layers.1.mixer.experts"

    def change(tensors: dict[str, Tensor]) -> None:
        for number in (0, 1, 2, 5):
            del tensors[f"{experts}.{number}.up_proj.weight"]
        tensors[f"{experts}.3.up_proj.weight"] = torch.zeros(2).bfloat16()
        for number in range(8, 58):
            tensors[f"{experts}.{number}.up_proj.weight"] = torch.zeros(2).bfloat16()
        tensors |= {f"backbone.x{i}": torch.zeros(1).bfloat16() for i in range(30)}

    change_tensors(folder, change)
    lines = refusal(folder).split("\n  ")
    assert lines[0].endswith(": 85 problems")
    assert lines[1:4] == [
        f"{experts}.{{0..2,5}}.up_proj.weight: missing, the model needs [24, 20] (4 tensors)",
        f"{experts}.3.up_proj.weight: has [2], the model needs [24, 20]",
        f"{experts}.{{8..57}}.up_proj.weight: extra, the model has no such tensor (50 tensors)",
    ]
    assert len(lines) == 4 + 30


def test_mtp_that_transformers_dropped_is_explained(folder: Path) -> None:
    for file in FILES:
        tensors = {n: t for n, t in load_file(folder / file).items() if not n.startswith("mtp.")}
        save_file(tensors, folder / file)
    change_json(
        folder / INDEX,
        lambda raw: raw.update(
            weight_map={n: f for n, f in raw["weight_map"].items() if not n.startswith("mtp.")}
        ),
    )
    assert "set num_nextn_predict_layers to 0 in config.json" in refusal(folder)
    change_json(folder / "config.json", lambda raw: raw.update(num_nextn_predict_layers=0))
    assert open_folder(folder).config.mtp is None


def test_weights_wider_than_the_others_would_be_rounded(folder: Path) -> None:
    name = "backbone.layers.0.norm.weight"
    change_tensors(folder, lambda tensors: tensors.update({name: tensors[name].float()}))
    assert f"{name}: is FP32, the other weights are BF16; it would be rounded" in refusal(folder)


def test_vectors_kept_in_fp32_stay_exact(folder: Path) -> None:
    name = "backbone.layers.0.mixer.A_log"
    exact = torch.rand(8) + 1e-7
    change_tensors(folder, lambda tensors: tensors.update({name: exact}))
    assert open_folder(folder).recipe == "bf16"
    assert torch.equal(nemomodel.load_model(folder).blocks[0].mixer.A_log, exact)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.uint8], ids=str)
def test_packed_tensors_are_refused(folder: Path, dtype: torch.dtype) -> None:
    change_tensors(folder, lambda t: t.update({EXPERT: torch.zeros(24, 10, dtype=dtype)}))
    assert "a packed (NVFP4, FP8 or INT) checkpoint cannot be converted" in refusal(folder)


def test_packed_checkpoints_are_refused_by_their_config(folder: Path) -> None:
    change_json(folder / "config.json", lambda raw: raw.update(quantization_config={"bits": 4}))
    assert "the weights are packed (quantization_config)" in refusal(folder)


def test_other_formats_of_numbers_are_refused(folder: Path) -> None:
    change_tensors(folder, lambda t: t.update({EXPERT: t[EXPERT].half()}))
    assert f"{EXPERT} is F16; tensors are BF16 or F32" in refusal(folder)


def test_pickled_weights_are_refused_unread(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "hf")
    for file in (*FILES, INDEX):
        (folder / file).unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(_Evil()))
    assert is_hf_folder(folder)
    assert "pickled weights are not read" in refusal(folder)
    with pytest.raises(CheckpointError, match="pickled weights are not read"):
        nemomodel.load_model(folder)


class _Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os._exit, (3,)


def cut(folder: Path) -> None:
    os.truncate(folder / FILES[1], (folder / FILES[1]).stat().st_size - 1)


def grow(folder: Path) -> None:
    with (folder / FILES[1]).open("ab") as file:
        file.write(b"\0")


def cut_header(folder: Path) -> None:
    os.truncate(folder / FILES[1], 100)


def empty(folder: Path) -> None:
    os.truncate(folder / FILES[1], 0)


def huge_header(folder: Path) -> None:
    with (folder / FILES[1]).open("r+b") as file:
        file.write((2**63).to_bytes(8, "little"))


def header_of(text: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        header = text.encode()
        (folder / FILES[1]).write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))

    return write


ENTRY = '{"dtype":"F32","shape":[%s],"data_offsets":[%s]}'


@pytest.mark.parametrize(
    ("hurt", "message"),
    [
        (cut, "bytes, its header says"),
        (grow, "bytes, its header says"),
        (cut_header, "is cut off, or no safetensors file"),
        (empty, "is cut off, or no safetensors file"),
        (huge_header, "is cut off, or no safetensors file"),
        (lambda folder: (folder / FILES[1]).unlink(), "No such file"),
        (header_of("nonsense"), "the header is not readable"),
        (header_of("[1]"), "no object of names"),
        (header_of("[" * 100_000), "the header is not readable"),
        (header_of('{"a":1}'), "the header entry of a is not readable"),
        (header_of('{"a":' + ENTRY % ("2", "0,8") + ',"a":1}'), "'a' stands twice"),
        (header_of('{"a":' + ENTRY % ("3", "0,8") + "}"), "a has 8 bytes, F32 [3] needs 12"),
        (header_of('{"a":' + ENTRY % ("-2", "0,-8") + "}"), "the header entry of a is not"),
        (header_of('{"a":' + ENTRY % ("1", "4,8") + "}"), "tensors overlap or leave holes"),
        (
            header_of('{"a":' + ENTRY % ("2", "0,8") + ',"b":' + ENTRY % ("1", "4,8") + "}"),
            "tensors overlap or leave holes",
        ),
    ],
)
def test_damaged_files_are_named(folder: Path, hurt: Callable[[Path], None], message: str) -> None:
    hurt(folder)
    text = refusal(folder)
    assert message in text
    assert str(folder / FILES[1]) in text


def test_a_file_that_shrinks_while_it_is_read_is_noticed(folder: Path) -> None:
    found = open_folder(folder)
    cut_header(folder)
    with pytest.raises(CheckpointError, match="ends within a tensor"):
        [stored.read() for stored in found.tensors.values()]


@pytest.mark.parametrize(
    "name", ["../hf/first.safetensors", "/etc/passwd", "sub/x", "..", "", "a\0b", "..\\x"]
)
def test_an_index_cannot_leave_the_folder(folder: Path, name: str) -> None:
    change_json(folder / INDEX, lambda raw: raw["weight_map"].update({EXPERT: name}))
    assert f"{name!r} is not the name of a file in this folder" in refusal(folder)


def test_names_that_no_file_can_have_and_loops_of_links(folder: Path) -> None:
    change_json(folder / INDEX, lambda raw: raw["weight_map"].update({EXPERT: "\ud800"}))
    assert f"{folder}: '\\ud800' is a loop of links, or no file name" in refusal(folder)
    (folder / FILES[1]).unlink()
    (folder / FILES[1]).symlink_to(FILES[1])
    change_json(folder / INDEX, lambda raw: raw["weight_map"].update({EXPERT: FILES[0]}))
    assert f"{folder}: '{FILES[1]}' is a loop of links" in refusal(folder)


@pytest.mark.parametrize("name", [FILES[0], INDEX, "config.json"])
def test_a_link_cannot_leave_the_folder(folder: Path, name: str, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    (folder / name).rename(outside)
    (folder / name).symlink_to(outside)
    assert f"{folder / name}: is a link that leads out of the folder" in refusal(folder)


def test_snapshots_of_the_hub_cache_are_read(tmp_path: Path) -> None:
    """There every file is a link to a blob two folders up."""
    snapshot = write_folder(tmp_path / "models--a--b/snapshots/0123")
    blobs = tmp_path / "models--a--b/blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(snapshot.iterdir())):
        path.rename(blobs / str(number))
        path.symlink_to(f"../../blobs/{number}")
    assert open_folder(snapshot).config == open_folder(write_folder(tmp_path / "hf")).config
    secret = tmp_path / "secret"
    shutil.copy(snapshot / "config.json", secret)
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(secret)
    assert "is a link that leads out of the folder" in refusal(snapshot)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw.pop("weight_map"), "weight_map is not a table of file names"),
        (lambda raw: raw.update(weight_map={"a": 1}), "weight_map is not a table of file names"),
        (lambda raw: raw["weight_map"].pop(EXPERT), f"{EXPERT}: is in first.safetensors"),
        (lambda raw: raw["weight_map"].update(x=FILES[0]), "x: is not in first.safetensors"),
        (
            lambda raw: raw["weight_map"].update({EXPERT: FILES[1]}),
            f"{EXPERT}: is in first.safetensors, the index says second.safetensors",
        ),
    ],
)
def test_an_index_that_disagrees_with_the_files(
    folder: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    change_json(folder / INDEX, change)
    assert message in refusal(folder)


@pytest.mark.parametrize("name", [INDEX, "config.json"])
def test_keys_that_stand_twice(folder: Path, name: str) -> None:
    text = (folder / name).read_text()
    key = next(iter(json.loads(text)))
    (folder / name).write_text(text.replace("{", f'{{"{key}": 1, ', 1))
    assert f"{folder / name}: is not JSON: '{key}' stands twice" in refusal(folder)


def test_a_file_that_the_index_does_not_name(folder: Path) -> None:
    shutil.copy(folder / FILES[0], folder / "third.safetensors")
    assert "third.safetensors: extra, the index does not name this file" in refusal(folder)


def test_tensors_win_over_the_dtype_of_the_config(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert open_folder(folder).recipe == "bf16"
    assert caplog.text == ""
    change_json(folder / "config.json", lambda raw: raw.update(dtype="float32"))
    assert open_folder(folder).recipe == "bf16"
    assert "config.json: dtype=float32, but the tensors are bfloat16" in caplog.text


def test_two_spellings_of_one_tensor(folder: Path) -> None:
    name = "backbone.embeddings.weight"
    change_tensors(
        folder, lambda t: t.update({"backbone.embedding.weight": torch.zeros_like(t[name])})
    )
    assert f"{name} is there twice" in refusal(folder)


def test_file_and_index_at_once(folder: Path) -> None:
    shutil.copy(folder / FILES[0], folder / SINGLE)
    assert f"has {SINGLE} and {INDEX}" in refusal(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "is not JSON"), ("[]", "is not a JSON object"), (None, "No such file")],
)
def test_config_that_is_no_config(folder: Path, content: str | None, message: str) -> None:
    (folder / "config.json").unlink()
    if content:
        (folder / "config.json").write_text(content)
    text = refusal(folder)
    assert message in text
    assert str(folder / "config.json") in text


def test_folders_without_weights(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "hf")
    (folder / INDEX).unlink()
    assert f"has neither {SINGLE} nor {INDEX}" in refusal(folder)
    assert "No such file" in refusal(tmp_path / "nowhere")


def test_weights_go_into_a_model_of_any_dtype(folder: Path) -> None:
    expected = nemomodel.load_model(folder).state_dict()
    for dtype in (torch.float32, torch.float64):
        model = Nemotron(open_folder(folder).config, dtype=dtype)
        assert load_weights(folder, model) == folder
        for name, value in model.state_dict().items():
            assert torch.equal(value, expected[name].to(value.dtype)), name


def test_weights_of_another_model_are_refused_with_every_difference(folder: Path) -> None:
    moe = replace(MODEL.moe, top_k=2, aux_loss_coeff=0.0)
    model = Nemotron(
        replace(MODEL, norm_eps=1e-6, init_std=0.5, moe=moe, mtp=None), dtype=torch.bfloat16
    )
    with pytest.raises(CheckpointError) as error:
        load_weights(folder, model)
    assert str(error.value).split("\n  ") == [
        f"checkpoint {folder}: the models differ",
        "model.norm_eps: the checkpoint has 1e-05, the model 1e-06",
        "model.moe.top_k: the checkpoint has 3, the model 2",
        "model.mtp: the checkpoint has such a section, the model null",
    ]
    shared = replace(MODEL, mtp=replace(MODEL.mtp, shared=True))
    message = "shared=true with num_depths=2: the checkpoint has 2 MTP blocks, the model 1"
    with pytest.raises(CheckpointError, match=message):
        load_weights(folder, Nemotron(shared, dtype=torch.bfloat16))


def test_files_of_the_writer_are_read_by_the_library(tmp_path: Path) -> None:
    tensors = {
        "odd": torch.randn(3, 5).bfloat16(),
        "wide": torch.randn(7),
        "none": torch.randn(0, 4),
        "more": torch.randn(2, 1, 4).bfloat16(),
    }
    with Writer(tmp_path / "x", {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()}) as file:
        for name in reversed(tensors):
            file.write(name, tensors[name])
    found = load_file(tmp_path / "x")
    assert found.keys() == tensors.keys()
    for name, stored in read_header(tmp_path / "x").items():
        assert stored.offset % stored.dtype.itemsize == 0
        assert torch.equal(found[name], tensors[name])
        assert torch.equal(stored.read(), tensors[name])
