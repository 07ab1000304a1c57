"""What of a model and of a batch one rank has, from the config alone."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from nemomodel.config.pattern import LayerKind
from nemomodel.config.schema import Config
from nemomodel.model.count import parameter_shapes
from nemomodel.model.stages import cut_stages
from nemomodel.parallel.stage import Stage

FP32, FP64, INT64 = 4, 8, 8
"""Bytes of an element."""

WIDE = ("A_log", "D", "dt_bias")
"""Parameters that are FP32 in every precision."""

UNCUT = ("router.weight", "latent_down.weight", "latent_up.weight")
"""Matrices of mixers that every tensor-parallel rank has whole."""


@dataclass(frozen=True)
class Held:
    """One parameter as a rank has it."""

    elements: int
    bytes_each: int
    expert: bool
    cut: bool
    """Whether other tensor-parallel ranks have other parts of it."""


@dataclass(frozen=True)
class Portion:
    """One rank among `ranks`, all of which have the same amount of work but for their stage."""

    config: Config
    ranks: int

    @property
    def width(self) -> int:
        """Bytes of an element of weights and activations."""
        return 2 if self.config.precision.weights == "bf16" else FP32

    def degree(self, axis: str) -> int:
        """Ranks along an axis, as `traffic.step_traffic` names them."""
        p = self.config.parallel
        return {
            "tp": p.tp,
            "cp": p.cp,
            "tp_cp": p.tp * p.cp,
            "ep": p.ep,
            "etp": p.etp,
            "dp": self.dp * p.cp,
            "expert_dp": self.ranks // (p.etp * p.ep * p.pp),
            "all": self.ranks,
        }[axis]

    @property
    def dp(self) -> int:
        """Parts that the sequences of a step are cut into."""
        p = self.config.parallel
        return self.ranks // (p.tp * p.cp * p.pp)

    @property
    def micro_batches(self) -> int:
        """Forward and backward passes of a step."""
        train = self.config.train
        return train.global_batch_size // (train.micro_batch_size * self.dp)

    @property
    def tokens(self) -> int:
        """Of a micro-batch, those whose residual stream this rank has: S B / (tp cp)."""
        train, p = self.config.train, self.config.parallel
        return train.micro_batch_size * train.seq_length // (p.tp * p.cp)

    @property
    def gathered(self) -> int:
        """Those of all tensor-parallel ranks together: S B / cp."""
        return self.tokens * self.config.parallel.tp

    @property
    def heads(self) -> int:
        """Prediction heads: the main one and the MTP depths."""
        return 1 + (self.config.model.mtp.num_depths if self.config.model.mtp else 0)

    @property
    def stages(self) -> list[list[Stage]]:
        """Of every pipeline rank."""
        stages, p = cut_stages(self.config), self.config.parallel
        return [stages[rank :: p.pp] for rank in range(p.pp)]

    def passes(self, stage: Stage) -> list[LayerKind]:
        """Every mixer that a micro-batch passes on a stage, those of all MTP depths included."""
        model = self.config.model
        kinds = [model.layers[i] for i in stage.blocks]
        return kinds + list(model.mtp_layers) * (self.heads - 1) * stage.last

    def mamba_widths(self) -> tuple[int, int, int]:
        """Of one tp and cp rank: channels of x, of B and C together, heads."""
        mamba = self.config.model.mamba
        assert mamba is not None
        ranks = self.config.parallel.tp * self.config.parallel.cp
        heads, groups = mamba.num_heads // ranks, max(1, mamba.num_groups // ranks)
        return heads * mamba.head_dim, 2 * groups * mamba.state_size, heads

    def attention_widths(self) -> tuple[int, int]:
        """Of one tp and cp rank: channels of q, of k and v together."""
        attention = self.config.model.attention
        assert attention is not None
        ranks = self.config.parallel.tp * self.config.parallel.cp
        groups = max(1, attention.num_kv_heads // ranks)
        return attention.num_heads // ranks * attention.head_dim, 2 * groups * attention.head_dim

    @property
    def kv_cut(self) -> bool:
        """Whether there are enough key/value heads for tp to cut."""
        attention = self.config.model.attention
        return attention is None or attention.num_kv_heads % self.config.parallel.tp == 0

    def parameters(self, stage: Stage) -> Iterator[Held]:
        """Those of `stage`."""
        p = self.config.parallel
        for name, shape in parameter_shapes(self.config.model).items():
            if not _is_on(stage, name):
                continue
            expert, cut = ".experts." in name, self._is_cut(name)
            ranks = p.ep * p.etp if expert else p.tp if cut else 1
            width = FP32 if name.endswith(WIDE) else self.width
            yield Held(math.prod(shape) // ranks, width, expert, cut)

    def _is_cut(self, name: str) -> bool:
        if ".mixer." not in name:
            return name.startswith(("embedding.", "lm_head."))
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            return self.kv_cut
        return not name.endswith(UNCUT)


def _is_on(stage: Stage, name: str) -> bool:
    part, index, *_ = name.split(".")
    if part == "blocks":
        return int(index) in stage.blocks
    return stage.first if part == "embedding" else stage.last
