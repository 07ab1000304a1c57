"""What Transformer Engine executes for the formats of a recipe, and whether it can here.

A format that it has no switch for is an error, never another format - with one exception, which
the log at start says: on Hopper, which has no MXFP8, `mxfp8` is FP8 in blocks of 128.
"""

import importlib.metadata
import importlib.util
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from nemomodel.quant.linear import LinearFormat
from nemomodel.quant.recipe import mxfp8_format, nvfp4_format

EXECUTOR = 'precision.executor="transformer_engine"'
INSTEAD = 'use precision.executor="emulated"'
MIN_VERSION = (2, 20)
BLACKWELL, HOPPER = 10, 9
"""Major compute capabilities. 12.x is not enough: it has no MXFP8 products of all layouts, and its
stochastic rounding returned zeros, silently, until NVIDIA/TransformerEngine#3281."""

NVFP4, MXFP8, FP8_BLOCKS = "NVFP4BlockScaling", "MXFP8BlockScaling", "Float8BlockScaling"

SWITCHES = {
    nvfp4_format(hadamard=rht, stochastic=sr, square=square): {
        "disable_rht": not rht,
        "disable_stochastic_rounding": not sr,
        "disable_2d_quantization": not square,
    }
    for rht, sr, square in itertools.product((True, False), repeat=3)
}
"""Of `NVFP4BlockScaling`, for every format that they can say."""


@dataclass(frozen=True)
class Execution:
    """What Transformer Engine does for a format on a device."""

    scheme: str
    """Name of its recipe."""
    switches: tuple[tuple[str, bool], ...]
    row_multiple: int
    """Tokens, of every expert too, are padded with zeros to a multiple of this."""
    width_multiple: int
    """Both widths of a weight have to be multiples."""

    def __str__(self) -> str:
        off = [name.removeprefix("disable_") for name, disabled in self.switches if disabled]
        without = f" without {', '.join(off)}" if off else ""
        note = ": FP8 E4M3, 1x128 and weights 128x128" if self.scheme == FP8_BLOCKS else ""
        return f"Transformer Engine {self.scheme}{without}{note}"


def execution(format: LinearFormat, capability: tuple[int, int]) -> Execution:
    """
    Raises:
        ValueError: Transformer Engine, or this GPU, cannot execute the format.
    """
    found = f"this GPU has {capability[0]}.{capability[1]}; {INSTEAD}"
    if format in SWITCHES:
        if capability[0] != BLACKWELL:
            raise ValueError(f"{EXECUTOR}: NVFP4 needs compute capability 10.x, {found}")
        switches = tuple(SWITCHES[format].items())
        return Execution(NVFP4, switches, row_multiple=128, width_multiple=32)
    if format != mxfp8_format():
        raise ValueError(f"{EXECUTOR} has no switch for the format {format}; {INSTEAD}")
    if capability[0] == BLACKWELL:
        return Execution(MXFP8, (), row_multiple=32, width_multiple=32)
    if capability[0] == HOPPER:
        return Execution(FP8_BLOCKS, (), row_multiple=16, width_multiple=16)
    raise ValueError(f"{EXECUTOR}: MXFP8 needs compute capability 10.x, FP8 9.x, {found}")


def require(formats: Iterable[LinearFormat], *, environment: Mapping[str, str]) -> None:
    """Call before a run that uses these formats starts.

    Args:
        environment: of the process, `os.environ`.

    Raises:
        ValueError: Transformer Engine is not there, or there is no GPU, or it cannot execute a
            format; or a variable changes its numerics where no option can say otherwise.
        ImportError, RuntimeError: of Transformer Engine, whose core or PyTorch part is missing.
    """
    if importlib.util.find_spec("transformer_engine") is None:
        raise ValueError(f"{EXECUTOR}: transformer_engine is not installed; {INSTEAD}")
    version = importlib.metadata.version("transformer_engine")
    if tuple(int(part) for part in version.split(".")[:2]) < MIN_VERSION:
        wanted = ".".join(map(str, MIN_VERSION))
        raise ValueError(f"{EXECUTOR} needs version {wanted}, {version} is installed; {INSTEAD}")
    if not torch.cuda.is_available():
        raise ValueError(f"{EXECUTOR} needs a GPU, there is none; {INSTEAD}")
    importlib.import_module("transformer_engine.pytorch")
    if environment.get("NVTE_USE_FAST_MATH", "0") != "0":
        raise ValueError(
            "NVTE_USE_FAST_MATH is set, which rounds NVFP4 otherwise than the recipe says; "
            f"unset it, or {INSTEAD}"
        )
    for format in formats:
        execution(format, torch.cuda.get_device_capability())


def make_recipe(execution: Execution) -> Any:
    """The recipe object, with every field given: their defaults are read from the environment."""
    from transformer_engine.common import recipe

    everywhere = {"fp8_dpa": False, "fp8_mha": False, "backward_override": None}
    if execution.scheme == NVFP4:
        return recipe.NVFP4BlockScaling(
            **dict(execution.switches),
            **everywhere,
            row_scaled_activation=False,
            nvfp4_4over6="none",
            nvfp4_4over6_e4m3_use_256="none",
            nvfp4_4over6_err_mode="MAE",
            fp4_format=recipe.Format.E2M1,
            fp8_format=recipe.Format.E4M3,
        )
    if execution.scheme == MXFP8:
        return recipe.MXFP8BlockScaling(
            **everywhere,
            margin=0,
            fp8_format=recipe.Format.E4M3,
            enable_2d_quantization=False,
        )
    product = recipe.MMParams(use_split_accumulator=True)
    made = recipe.Float8BlockScaling(
        **everywhere,
        use_f32_scales=False,
        fp8_format=recipe.Format.E4M3,
        x_block_scaling_dim=1,
        w_block_scaling_dim=2,
        grad_block_scaling_dim=1,
        fp8_gemm_fprop=product,
        fp8_gemm_dgrad=product,
        fp8_gemm_wgrad=product,
    )
    # Made from the environment when the class is, whatever `use_f32_scales` says.
    scale = recipe.QParams(power_2_scale=True, amax_epsilon=0.0)
    made.fp8_quant_fwd_inp = made.fp8_quant_fwd_weight = made.fp8_quant_bwd_grad = scale
    return made
