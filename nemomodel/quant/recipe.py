"""What the formats of a recipe are, product by product and operand by operand, as plain data.

Which layers have them is in config/recipe.py.
"""

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from nemomodel.quant.linear import LinearFormat, ProductFormat
from nemomodel.quant.operand import OperandFormat


def nvfp4_format(
    *,
    stochastic: bool = True,
    hadamard: bool = True,
    square: bool = True,
) -> LinearFormat:
    """All three products in NVFP4 (arXiv:2509.25149 section 4; TransformerEngine @ d0067d0d).

    Args:
        stochastic: round gradients stochastically.
        hadamard: transform both operands of wgrad along the tokens.
        square: blocks of 16 x 16 for weights, so that both their uses see the same values.
    """
    rows = OperandFormat("nvfp4", "rows", hadamard=hadamard)
    gradient = OperandFormat("nvfp4", "columns", stochastic=stochastic)
    weight, weight_t = (
        OperandFormat("nvfp4", "both" if square else along) for along in ("columns", "rows")
    )
    return LinearFormat(
        fprop=ProductFormat(OperandFormat("nvfp4", "columns"), weight),
        dgrad=ProductFormat(gradient, weight_t),
        wgrad=ProductFormat(replace(rows, stochastic=stochastic), rows),
    )


def mxfp8_format() -> LinearFormat:
    """All three products in MXFP8: E4M3 everywhere, blocks along the summed dimension."""
    columns, rows = OperandFormat("mxfp8", "columns"), OperandFormat("mxfp8", "rows")
    return LinearFormat(
        fprop=ProductFormat(columns, columns),
        dgrad=ProductFormat(columns, rows),
        wgrad=ProductFormat(rows, rows),
    )


def weights_only(format: LinearFormat) -> LinearFormat:
    """Activations and gradients stay BF16."""
    assert format.fprop
    assert format.dgrad
    return LinearFormat(
        fprop=replace(format.fprop, left=None), dgrad=replace(format.dgrad, left=None), wgrad=None
    )


def forward_only(format: LinearFormat) -> LinearFormat:
    """Only fprop is quantised."""
    return replace(format, dgrad=None, wgrad=None)


def backward_only(format: LinearFormat) -> LinearFormat:
    """Only dgrad and wgrad are quantised."""
    return replace(format, fprop=None)


def _sr_activations() -> LinearFormat:
    """Activations round stochastically too, in fprop and wgrad."""
    format = nvfp4_format()
    assert format.fprop
    assert format.wgrad
    return replace(
        format,
        fprop=replace(format.fprop, left=replace(format.fprop.left, stochastic=True)),
        wgrad=replace(format.wgrad, right=replace(format.wgrad.right, stochastic=True)),
    )


FORMATS: Mapping[str, LinearFormat] = MappingProxyType(
    {
        "nvfp4": nvfp4_format(),
        "mxfp8": mxfp8_format(),
        "nvfp4_no_rht": nvfp4_format(hadamard=False),
        "nvfp4_no_sr": nvfp4_format(stochastic=False),
        "nvfp4_no_2d": nvfp4_format(square=False),
        "nvfp4_weights_only": weights_only(nvfp4_format()),
        "mxfp8_weights_only": weights_only(mxfp8_format()),
        # Without a quantised dgrad nothing has to agree with fprop's weight, so it has narrow
        # blocks: arXiv:2509.25149, on the switch to a BF16 backward pass.
        "nvfp4_forward_only": forward_only(nvfp4_format(square=False)),
        "mxfp8_forward_only": forward_only(mxfp8_format()),
        "nvfp4_backward_only": backward_only(nvfp4_format()),
        "mxfp8_backward_only": backward_only(mxfp8_format()),
        "nvfp4_sr_activations": _sr_activations(),
        "nvfp4_sr_dgrad": replace(nvfp4_format(), wgrad=nvfp4_format(stochastic=False).wgrad),
        "nvfp4_sr_wgrad": replace(nvfp4_format(), dgrad=nvfp4_format(stochastic=False).dgrad),
    }
)
"""By the names that config/recipe.py gives them."""
