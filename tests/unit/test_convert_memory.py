"""Conversions are streamed: their memory does not grow with the model.

As a script this measures one of any size:

    python tests/unit/test_convert_memory.py FOLDER [GB]
"""

import re
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch

from nemomodel.checkpoint.files import write_json
from nemomodel.checkpoint.huggingface import importing
from nemomodel.checkpoint.huggingface.config import config_json
from nemomodel.checkpoint.huggingface.exporting import (
    export_checkpoint,
    plan_shards,
    published_dtype,
)
from nemomodel.checkpoint.huggingface.names import plan
from nemomodel.checkpoint.huggingface.tensor_files import Writer
from nemomodel.checkpoint.huggingface.verify import verify
from nemomodel.config.schema import AttentionConfig, MambaConfig, ModelConfig, MoeConfig, MtpConfig

MB = 10**6
DTYPE = torch.bfloat16


def make_config(size: int, layers: int) -> ModelConfig:
    """Proportions of Super: inner width 2 x hidden, latent width a quarter of it."""
    return ModelConfig(
        layer_pattern="ME" * (layers // 2),
        hidden_size=size,
        vocab_size=16 * size,
        mamba=MambaConfig(num_heads=size // 32, head_dim=64, num_groups=8, state_size=128),
        attention=AttentionConfig(num_heads=size // 128, num_kv_heads=2, head_dim=128),
        moe=MoeConfig(
            num_experts=64,
            top_k=8,
            ffn_size=size * 21 // 32,
            shared_ffn_size=size * 21 // 16,
            latent_size=size // 4,
        ),
        mtp=MtpConfig(num_depths=1),
    )


def write_folder(folder: Path, model: ModelConfig, *, shard_bytes: int) -> None:
    """A folder of random BF16 bits with all parts of a published one but a tokenizer."""
    folder.mkdir()
    shards = list(plan_shards(plan(model, dtype=DTYPE), dtype=DTYPE, shard_bytes=shard_bytes))
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {piece.name: (published_dtype(piece, DTYPE), piece.shape) for piece in shard}
        with Writer(folder / name, tensors) as writer:
            for piece in shard:
                noise = torch.randn(piece.shape).to(published_dtype(piece, DTYPE))
                writer.write(piece.name, noise)
                weight_map[piece.name] = name
    write_json(folder / "model.safetensors.index.json", {"weight_map": weight_map})
    config = config_json(model, vocab_size=model.vocab_size, dtype="bfloat16", carried={})
    write_json(folder / "config.json", config)


def measure(root: Path, shard_bytes: int) -> dict[str, tuple[float, float, int]]:
    """Seconds, peak growth of memory in bytes, and bytes of each direction."""
    folder, checkpoint, again = root / "hf", root / "ckpt", root / "again"
    convert = {
        "import": lambda: importing.import_folder(folder, checkpoint),
        "export": lambda: export_checkpoint(checkpoint, again, shard_bytes=shard_bytes),
    }
    size = sum(path.stat().st_size for path in folder.iterdir())
    found = {}
    for name, run in convert.items():
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before, start = _peak(), time.perf_counter()
        run()
        found[name] = (time.perf_counter() - start, _peak() - before, size)
    return found


def _peak() -> int:
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024


def test_memory_is_below_two_shards_and_a_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard, layer = 16 * MB, 18 * MB
    monkeypatch.setattr(importing, "FILE_BYTES", shard)
    # The first conversion loads and allocates what stays for all later ones.
    for name, layers in (("warm", 2), ("real", 12)):
        root = tmp_path / name
        root.mkdir()
        write_folder(root / "hf", make_config(512, layers), shard_bytes=shard)
        figures = measure(root, shard)
    for name, (_, peak, size) in figures.items():
        assert size > 2.5 * (2 * shard + layer), "or the test says nothing"
        assert peak < 2 * shard + layer, name
    assert all(line.equal for line in verify(root / "hf", root / "again"))


def main() -> None:
    root, gigabytes = Path(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else 5.0
    root.mkdir()
    per_pair = sum(e.num_bytes for e in plan(make_config(2048, 4), dtype=DTYPE)) - sum(
        e.num_bytes for e in plan(make_config(2048, 2), dtype=DTYPE)
    )
    layers = 2 * max(1, round(gigabytes * 1e9 / per_pair))
    write_folder(root / "hf", make_config(2048, layers), shard_bytes=10**9)
    for name, (seconds, peak, size) in measure(root, 10**9).items():
        print(f"{name}: {size / 1e9:.2f} GB in {seconds:.1f} s, {size / seconds / 1e6:.0f} MB/s, ")
        print(f"  peak memory {peak / 1e6:.0f} MB over what the process had before")
    shutil.rmtree(root)


if __name__ == "__main__":
    main()
