"""The configuration tree: one frozen dataclass per TOML section, `Config` at the root.

The string under a field is its documentation; `train.py --help` prints it. Ranges of single
values stand here as types; rules that join several values stand in `checks.py`.
"""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Lt, MinLen
from pydantic import AllowInfNan

from nemomodel.config.pattern import CUT, LayerKind, parse_pattern
from nemomodel.config.recipe import RecipeName

Count = Annotated[int, Gt(0)]
"""A whole number of at least 1."""

Fraction = Annotated[float, Ge(0), Lt(1)]
"""At least 0, below 1."""

Positive = Annotated[float, Gt(0), AllowInfNan(False)]
NotNegative = Annotated[float, Ge(0), AllowInfNan(False)]


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    dir: Annotated[str, MinLen(1)]
    """Folder of the run: resolved config, environment, metrics, checkpoints. Created if missing."""
    seed: Annotated[int, Ge(0)] = 1234
    """Seed of every random stream (initial weights, data order)."""
    deterministic: bool = False
    """Use deterministic kernels only; slower on a GPU, no change on a CPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run: `auto` takes the GPUs when there are any."""


@dataclass(frozen=True, kw_only=True)
class MambaConfig:
    """Mamba-2 mixer. Its inner width is num_heads * head_dim, whatever the model width."""

    num_heads: Count
    """Heads of the state-space model."""
    head_dim: Count
    """Width of one head."""
    num_groups: Count
    """Groups of heads that share B and C; also the groups of the gated norm."""
    state_size: Count
    """State per head and channel (N)."""
    conv_kernel: Count = 4
    """Width of the causal depthwise convolution, in tokens."""
    chunk_size: Count = 128
    """Tokens per chunk of the scan. Changes speed and memory, not the result."""
    dt_min: NotNegative = 0.0
    """Lower clamp of the time step after softplus; 0 is the published model (no clamp)."""


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Grouped-query attention without positional embedding."""

    num_heads: Count
    """Query heads."""
    num_kv_heads: Count
    """Key/value heads; each serves num_heads / num_kv_heads query heads."""
    head_dim: Count
    """Width of one head."""


@dataclass(frozen=True, kw_only=True)
class MoeConfig:
    """Mixture of experts; with latent_size the routed experts work at that narrow width."""

    num_experts: Count
    """Routed experts per layer."""
    top_k: Count
    """Experts chosen per token."""
    ffn_size: Count
    """Inner width of one routed expert."""
    shared_ffn_size: Count
    """Inner width of the shared expert, which every token passes at full model width."""
    latent_size: Count | None = None
    """Width of the routed experts' input and output (LatentMoE); none is the plain MoE."""
    num_groups: Count = 1
    """Groups of experts for group-limited routing; 1 is no limit."""
    top_groups: Count = 1
    """Groups a token may choose its experts from."""
    routed_scaling_factor: Positive = 1.0
    """Factor on the normalised weights of the chosen experts."""
    normalize_gates: bool = True
    """Divide the chosen experts' sigmoid scores by their sum."""
    bias_update_rate: NotNegative = 1e-3
    """Step of the selection bias towards balanced load, once per global batch; 0 is off."""
    aux_loss_coeff: NotNegative = 1e-4
    """Weight of the sequence-level load-balancing loss; 0 is off."""


@dataclass(frozen=True, kw_only=True)
class MtpConfig:
    """Multi-token prediction: depth k predicts the token k further than the main head."""

    num_depths: Count
    """How many further tokens are predicted."""
    layer_pattern: str = "*E"
    """Layers of one MTP block."""
    shared: bool = True
    """One physical block applied at every depth; false is one block per depth."""
    loss_scale: Positive = 0.3
    """The mean MTP loss over depths enters the total with this factor."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    layer_pattern: str
    """One letter per block: M Mamba-2, * attention, E LatentMoE, - dense MLP. A | cuts pipeline
    stages; without any the cut is balanced by FLOPs."""
    hidden_size: Count
    """Model width (D)."""
    vocab_size: Count
    """Rows of the embedding and of the (untied) head."""
    norm_eps: Positive = 1e-5
    """Added to the mean square in every RMSNorm."""
    init_std: Positive = 0.02
    """Standard deviation of initial weights; output projections use init_std / sqrt(layers)."""
    ffn_size: Count | None = None
    """Inner width of the dense MLP; required when a pattern has `-`."""
    mamba: MambaConfig | None = None
    attention: AttentionConfig | None = None
    moe: MoeConfig | None = None
    mtp: MtpConfig | None = None

    @property
    def letters(self) -> str:
        """`layer_pattern` without the cuts between pipeline stages."""
        return self.layer_pattern.replace(CUT, "")

    @property
    def layers(self) -> tuple[LayerKind, ...]:
        return parse_pattern(self.layer_pattern)

    @property
    def mtp_layers(self) -> tuple[LayerKind, ...]:
        """Layers of one MTP block; empty without MTP."""
        return parse_pattern(self.mtp.layer_pattern) if self.mtp else ()

    @property
    def num_mtp_blocks(self) -> int:
        """Physical MTP blocks."""
        if self.mtp is None:
            return 0
        return 1 if self.mtp.shared else self.mtp.num_depths


Dispatcher = Literal["alltoall", "deepep", "hybridep"]


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    tp: Count = 1
    """Tensor-parallel ranks."""
    pp: Count = 1
    """Pipeline-parallel ranks."""
    vpp: Count = 1
    """Pipeline stages of each rank: more than one interleaves them, for a smaller bubble."""
    cp: Count = 1
    """Context-parallel ranks."""
    ep: Count = 1
    """Expert-parallel ranks."""
    etp: Count = 1
    """Tensor-parallel ranks inside one expert."""
    dispatcher: Dispatcher = "alltoall"
    """What carries tokens to the ranks of their experts: plain all-to-all, or the fused kernels of
    DeepEP or of its branch hybrid-ep, which need GPUs and a BF16 recipe."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward pass runs."""
    overlap_param_gather: bool = False
    """Gather updated weights while the next forward pass runs; needs overlap_grad_reduce."""


Executor = Literal["emulated", "transformer_engine"]


def weight_format(recipe: str) -> Literal["bf16", "fp32"]:
    """Format of the weights in memory by precision.recipe."""
    return "fp32" if recipe == "fp32" else "bf16"


@dataclass(frozen=True, kw_only=True)
class PhaseConfig:
    from_tokens: Count
    """Tokens before the phase: it begins with the first step whose first token is that far."""
    recipe: RecipeName
    """As precision.recipe. fp32 cannot be mixed with others: weights have one format."""
    bf16_last_layers: Annotated[int, Ge(0)] | None = None
    """As precision.bf16_last_layers, for this phase alone; none: that number, if it is given."""


@dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
    recipe: RecipeName = "bf16"
    """Format of weights and activations. Those after fp32 multiply quantised operands in linear
    layers: as Nemotron 3 Super (NVFP4 but for the last layers, attention, latent projections and
    MTP; Mamba's out_proj in MXFP8), as the 12B model of the NVFP4 paper (all but the first two and
    last eight blocks), every linear of the backbone in one format, and nvfp4_super with one thing
    changed (docs/numerics.md); all else is BF16. Master weights, gradient accumulation and
    optimizer state are FP32 in every recipe."""
    bf16_last_layers: Annotated[int, Ge(0)] | None = None
    """Blocks at the end of the backbone that are not quantised; none: what the recipe says, 15 %
    of them for nvfp4_super."""
    executor: Executor = "emulated"
    """What multiplies quantised operands: exact emulation on any device, or Transformer Engine on
    a GPU that has the formats."""
    phases: tuple[PhaseConfig, ...] = ()
    """Later recipes, in their order: from a number of tokens on, each until the next."""

    @property
    def weights(self) -> Literal["bf16", "fp32"]:
        """Format of the weights in memory."""
        return weight_format(self.recipe)


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    path: Annotated[str, MinLen(1)]
    """Prefix of PREFIX.bin and PREFIX.idx, as tools/prepare_data.py writes them."""
    weight: Positive = 1.0
    """Share of the samples relative to the other sources."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    train: tuple[SourceConfig, ...] = ()
    """Token files to train on. Empty: the source code of the Python standard library."""
    validation: tuple[SourceConfig, ...] = ()
    """Token files of the validation loss; none switches it off when data.train is given."""
    tokenizer: str | None = None
    """tokenizer.json the files were made with; allows bits per byte."""
    cache_dir: Annotated[str, MinLen(1)] = "data"
    """Where the embedded corpus is built, once."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    steps: Count
    """Optimizer steps of the whole schedule."""
    stop_after: Count | None = None
    """Stop with a checkpoint after this step, as if interrupted; the schedule does not change."""
    micro_batch_size: Count = 1
    """Sequences per forward and backward pass on one rank."""
    global_batch_size: Count = 1
    """Sequences per optimizer step over all ranks."""
    seq_length: Count
    """Tokens per sequence."""
    recompute: tuple[Literal["mamba", "attention", "moe", "mlp"], ...] = ()
    """Layer kinds whose activations are recomputed in the backward pass instead of kept."""
    compile: bool = False
    """Compile what lies between matrix products (torch.compile): faster steps, most of all in BF16,
    after a first one that waits up to a minute for the compiler."""
    validation_interval: Count | None = None
    """Steps between validation losses; none: only after the last step."""
    validation_sequences: Count = 64
    """Sequences of one validation loss, the same ones every time."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW."""

    lr: Positive
    """Peak learning rate."""
    min_lr: NotNegative = 0.0
    """Learning rate after the decay."""
    beta1: Fraction = 0.9
    """Decay of the mean gradient per step; 0 is no momentum."""
    beta2: Fraction = 0.95
    """Decay of the mean squared gradient per step."""
    eps: Positive = 1e-8
    """Added to the root of the mean squared gradient; large values turn AdamW towards momentum."""
    weight_decay: NotNegative = 0.1
    """Decoupled; matrices, embeddings and the conv weight only (vectors never decay)."""
    grad_clip: Positive | None = 1.0
    """Largest global gradient norm; none is no clipping."""


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    kind: Literal["wsd", "cosine", "constant"] = "wsd"
    """wsd: warm-up, stable, decay by one minus the square root; cosine; constant."""
    warmup_steps: Annotated[int, Ge(0)] = 0
    """Steps of linear warm-up from 0."""
    decay_steps: Count | None = None
    """Last steps of wsd that decay; required for wsd, not allowed otherwise."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    interval: Count | None = None
    """Steps between checkpoints; none: only at the end, at train.stop_after and on a signal."""
    keep: Count = 2
    """Complete checkpoints kept; older ones are removed after a new one is published."""
    async_save: bool = True
    """Write in the background while training goes on."""
    init_from: Annotated[str, MinLen(1)] | None = None
    """Run folder, checkpoint or Hugging Face folder whose weights a new run starts from, with a
    fresh optimizer, schedule and data order. A run that has a checkpoint itself resumes that."""


@dataclass(frozen=True, kw_only=True)
class ObserveConfig:
    log_interval: Count = 10
    """Steps between console lines and metrics records."""
    quantization_interval: Count | None = None
    """Steps between statistics of quantisation in the metrics, quant/..: noise, underflow,
    saturation and scales of every operand. Such a step takes 1.7 times as long; none: never."""
    tensorboard: bool = True
    """Write TensorBoard events into the run folder."""
    wandb_project: str | None = None
    """Weights & Biases project; needs the wandb package."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything one training run needs."""

    run: RunConfig
    model: ModelConfig
    train: TrainConfig
    optim: OptimConfig
    schedule: ScheduleConfig
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    data: DataConfig = field(default_factory=DataConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    observe: ObserveConfig = field(default_factory=ObserveConfig)
