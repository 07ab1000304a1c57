"""Tiny random transformers models of `nemotron_h`: oracles of logits, loss and gradients, and the
folders they are saved in. Imports nothing from `nemomodel`.

transformers has no MTP. `MtpBlock` is one out of its blocks; the names on disk are those vLLM,
SGLang and Megatron-Bridge read.
"""

import copy
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import NemotronHConfig, NemotronHForCausalLM
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMamba2Mixer, NemotronHModel

KINDS = {"M": "linear_attention", "*": "full_attention", "E": "moe", "-": "mlp"}
BASE = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "mamba_num_heads": 16,
    "mamba_head_dim": 8,
    "n_groups": 2,
    "ssm_state_size": 16,
    "chunk_size": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 40,
    "moe_latent_size": 20,
    "routed_scaling_factor": 2.5,
}
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class MtpBlock(nn.Module):
    """h' = norm_f(layers(eh_proj [enorm(e), hnorm(h)])), layers and norm_f of transformers."""

    def __init__(self, config: NemotronHConfig):
        super().__init__()
        D, eps = config.hidden_size, config.layer_norm_epsilon
        self.enorm, self.hnorm = nn.RMSNorm(D, eps=eps), nn.RMSNorm(D, eps=eps)
        self.eh_proj = nn.Linear(2 * D, D, bias=False)
        self.body = NemotronHModel(config)
        del self.body.embeddings

    def forward(self, hidden_BSD: Tensor, ahead_BSD: Tensor) -> Tensor:
        halves = [self.enorm(ahead_BSD), self.hnorm(hidden_BSD)]
        x_BSD = self.eh_proj(torch.cat(halves, dim=-1))
        return self.body(inputs_embeds=x_BSD, use_cache=False).last_hidden_state


class HfModel(nn.Module):
    """A transformers model and its MTP blocks, depth k using block k."""

    def __init__(self, trunk: NemotronHForCausalLM, mtp: list[MtpBlock]):
        super().__init__()
        self.trunk, self.mtp = trunk, nn.ModuleList(mtp)

    def forward(self, ids_BS: Tensor) -> list[Tensor]:
        """Logits [B, S, V] of the main head and of every MTP depth.

        h_k = block_k(h_{k-1}, embedding of the token k ahead, 0 past the end)
        """
        embedding_BSD = self.trunk.model.embeddings(ids_BS)
        hidden_BSD = self.trunk.model(ids_BS, use_cache=False).last_hidden_state
        logits = [self.trunk.lm_head(hidden_BSD)]
        for k, block in enumerate(self.mtp, 1):
            ahead_BSD = F.pad(embedding_BSD[:, k:], (0, 0, 0, min(k, ids_BS.shape[1])))
            hidden_BSD = block(hidden_BSD, ahead_BSD)
            logits.append(self.trunk.lm_head(hidden_BSD))
        return logits


class Loading(NamedTuple):
    """What `from_pretrained` made of a folder."""

    model: NemotronHForCausalLM
    complaints: dict[str, object]  # keys missing, unexpected or misshapen; empty when it fits


def make_config(
    pattern: str, *, mtp_blocks: int = 0, mtp_pattern: str = "*E", **changes: object
) -> NemotronHConfig:
    return NemotronHConfig(
        experts_implementation="eager",  # a plain loop, which takes float64 too
        layers_block_type=[KINDS[letter] for letter in pattern],
        num_nextn_predict_layers=mtp_blocks,
        mtp_layers_block_type=[KINDS[letter] for letter in mtp_pattern],
        **(BASE | changes),
    )


def mtp_config(config: NemotronHConfig) -> NemotronHConfig:
    """The config of the same model with the layers of one MTP block."""
    inner = copy.deepcopy(config)
    inner.layer_types = config.mtp_layers_block_type
    return inner


def make_model(pattern: str, *, seed: int = 0, **settings: object) -> HfModel:
    """A model whose every tensor is random: nothing is left at 0 or 1, where mistakes hide.

    Args:
        seed: with some others the norm of a narrow group (one head of few channels) meets values
            near 0, and magnifies the FP32 rounding of both programs.
        settings: those of `make_config`.
    """
    config = make_config(pattern, **settings)
    blocks = [MtpBlock(mtp_config(config)) for _ in range(config.num_nextn_predict_layers)]
    model = HfModel(NemotronHForCausalLM(config), blocks)
    draw(model, torch.Generator().manual_seed(seed))
    lift_clamp(model)
    return model.eval()


@torch.no_grad()
def draw(model: nn.Module, generator: torch.Generator) -> None:
    """Activations stay near 1, and many time steps lie below transformers' clamp of 0.001.

    A head whose D is near 0 puts out next to nothing, which the norm then magnifies with its
    rounding; so D is spread around its initial value.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        value = torch.randn(tensor.shape, generator=generator)
        match name.rsplit(".", 1)[-1]:
            case "A_log":
                value = torch.rand(tensor.shape, generator=generator) * math.log(16)
            case "dt_bias":
                value = value * 2 - 5
            case "D":
                value = 1 + 0.3 * value
            case "e_score_correction_bias":
                value = value * 0.2
            case _ if "norm" in name:
                value = 1 + 0.2 * value
            case _ if tensor.dim() > 1 and "embeddings" not in name:
                value = value / math.sqrt(tensor.shape[-1])
        tensor.copy_(value)


def lift_clamp(model: nn.Module) -> None:
    """transformers 5.23 clamps dt at time_step_min in training and prefill alone (their #48989)."""
    for module in model.modules():
        if isinstance(module, NemotronHMamba2Mixer):
            module.time_step_limit = (0.0, math.inf)


def save(
    model: HfModel,
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "1GB",
) -> Path:
    """Write config and weights as `save_pretrained` does, and the MTP tensors beside them.

    Args:
        dtype: of the parameters; the router biases are FP32 always.
    """
    trunk = copy.deepcopy(model.trunk)
    for parameter in trunk.parameters():
        parameter.data = parameter.data.to(dtype)
    trunk.save_pretrained(folder, max_shard_size=max_shard_size)
    tensors = {
        name: value.to(torch.float32 if "e_score" in name else dtype, copy=True)
        for name, value in mtp_tensors(model).items()
    }
    if tensors and (folder / INDEX).exists():
        add_shard(folder, tensors)
    elif tensors:
        write_tensors(folder, read_tensors(folder) | tensors)
    return folder


def add_shard(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Put tensors into one more file of a folder that has an index."""
    save_file(tensors, folder / "mtp.safetensors", metadata={"format": "pt"})
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] |= dict.fromkeys(tensors, "mtp.safetensors")
    index["metadata"]["total_size"] += sum(t.nbytes for t in tensors.values())
    (folder / INDEX).write_text(json.dumps(index))


def write_tensors(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """All tensors of the folder, in one file."""
    tensors = {name: value.contiguous() for name, value in tensors.items()}
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of every safetensors file; a name in two files is an error."""
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no mapping
                assert name not in tensors, f"{name} is in two files of {folder}"
                tensors[name] = file.get_tensor(name)
    return tensors


def mtp_tensors(model: HfModel) -> dict[str, Tensor]:
    """Views of the tensors of the MTP blocks by their published names, block after block."""
    tensors = {}
    for number, block in enumerate(model.mtp):
        length = len(block.body.layers)
        first, last = number * length, (number + 1) * length - 1
        for name in ("enorm", "hnorm", "eh_proj"):
            tensors[f"mtp.layers.{first}.{name}.weight"] = getattr(block, name).weight
        tensors[f"mtp.layers.{last}.final_layernorm.weight"] = block.body.norm_f.weight
        for i, layer in enumerate(block.body.layers):
            for name, value in layer.state_dict().items():
                for leaf, piece in unstack(name, value):
                    tensors[f"mtp.layers.{first + i}.{leaf}"] = piece
    return {name: value.detach() for name, value in tensors.items()}


def unstack(name: str, value: Tensor) -> Iterator[tuple[str, Tensor]]:
    """One tensor per expert, as on disk; anything else as it is."""
    if ".experts." not in name:
        yield name, value
        return
    stem, projection = name.rsplit(".", 1)
    for expert, matrix in enumerate(value):
        yield f"{stem}.{expert}.{projection}.weight", matrix


def load(folder: Path, *, dtype: torch.dtype = torch.float32) -> Loading:
    """The trunk of a folder in transformers, without the clamp."""
    model, info = NemotronHForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        experts_implementation="eager",
        output_loading_info=True,
        local_files_only=True,
    )
    lift_clamp(model)
    return Loading(model.eval(), {key: value for key, value in info.items() if value})


def load_with_mtp(folder: Path, *, depths: int) -> HfModel:
    """The model of a folder; all depths use its one physical MTP block."""
    trunk = load(folder).model
    model = HfModel(trunk, [MtpBlock(mtp_config(trunk.config))])
    tensors = read_tensors(folder)
    views = mtp_tensors(model)
    assert views.keys() == {name for name in tensors if name.startswith("mtp.")}
    for name, view in views.items():
        view.copy_(tensors[name])
    lift_clamp(model)
    return HfModel(trunk, list(model.mtp) * depths).eval()


RENAMED = {
    "conv1d.bias": "conv_bias",
    "o_proj.weight": "out_proj.weight",
    "gate.weight": "router.weight",
    "gate.e_score_correction_bias": "router.expert_bias",
    "fc1_latent_proj.weight": "latent_down.weight",
    "fc2_latent_proj.weight": "latent_up.weight",
    "experts.up_proj": "experts.fc1",
    "experts.down_proj": "experts.fc2",
    "shared_experts.up_proj.weight": "shared_expert.fc1.weight",
    "shared_experts.down_proj.weight": "shared_expert.fc2.weight",
    "up_proj.weight": "fc1.weight",
    "down_proj.weight": "fc2.weight",
}
"""Names in a mixer of transformers and of ours; the others are the same or joined."""


def as_ours(model: HfModel, *, gradients: bool = False) -> dict[str, Tensor]:
    """Every parameter and router bias, or the gradient of every parameter, under our names."""
    trunk = model.trunk
    ours = {
        "embedding.weight": trunk.model.embeddings.weight,
        "final_norm.weight": trunk.model.norm_f.weight,
        "lm_head.weight": trunk.lm_head.weight,
    }
    stacks = [("blocks", trunk.model.layers)]
    for j, block in enumerate(model.mtp):
        ours[f"mtp.blocks.{j}.embedding_norm.weight"] = block.enorm.weight
        ours[f"mtp.blocks.{j}.hidden_norm.weight"] = block.hnorm.weight
        ours[f"mtp.blocks.{j}.eh_proj.weight"] = block.eh_proj.weight
        ours[f"mtp.blocks.{j}.final_norm.weight"] = block.body.norm_f.weight
        stacks.append((f"mtp.blocks.{j}.layers", block.body.layers))
    if gradients:
        ours = {name: parameter.grad for name, parameter in ours.items()}
    for prefix, layers in stacks:
        for i, layer in enumerate(layers):
            tensors = dict(layer.named_parameters())
            if gradients:
                tensors = {name: parameter.grad for name, parameter in tensors.items()}
            else:
                tensors |= dict(layer.named_buffers())
            for name, value in mixer_as_ours(tensors):
                ours[f"{prefix}.{i}.{name}"] = value
    return {name: value.detach() for name, value in ours.items()}


def mixer_as_ours(tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of one layer: norm and mixer."""
    yield "norm.weight", tensors.pop("norm.weight")
    mixer = {name.removeprefix("mixer."): value for name, value in tensors.items()}
    if "conv1d.weight" in mixer:
        yield "mixer.conv_weight", mixer.pop("conv1d.weight").squeeze(1)
    for name, value in mixer.items():
        yield f"mixer.{RENAMED.get(name, name)}", value
