"""Block formats of few bits: NVFP4, MX and shared microexponents, in plain PyTorch.

q = quantize_nvfp4(x, block=(1, 16), rounding="nearest")
q.packed, q.scales, q.amax, q.dequantize(torch.bfloat16)
"""

from nemomodel.quant.mx import SharedExponentTensor, quantize_bdr, quantize_mx
from nemomodel.quant.nvfp4 import NVFP4Tensor, quantize_nvfp4

__all__ = [
    "NVFP4Tensor",
    "SharedExponentTensor",
    "quantize_bdr",
    "quantize_mx",
    "quantize_nvfp4",
]
