"""How MatMulNBits rounds the input of a linear layer at accuracy level 4, on each kind of processor.

`make test-arm` runs each kind (docs/validation.md#on-arm). ARM processors without dot products round nothing.
"""

from functools import cache, partial

from export.onnx.layers import block_size
from quant.activations import Round, fake_quantize_per_block, fake_quantize_per_token
from quant.integers import IntegerWeight


def per_block(name: str, weight: IntegerWeight) -> Round:
    """ONNX Runtime's own kernels: all on x86, and on ARM those that KleidiAI does not replace. They round by block."""
    return _per_block(block_size(name, weight))


def kleidiai(name: str, weight: IntegerWeight) -> Round:
    """On ARM with dot products. 4 bits in whole blocks of a multiple of 32 columns: KleidiAI rounds as XNNPACK does.

    Source: onnxruntime/core/mlas/lib/kleidiai/qnbitgemm_kleidiai.cpp (kai_lhs_quant_pack_qai8dxp_f32).
    """
    block = block_size(name, weight)
    whole = block % 32 == 0 and weight.codes.shape[1] % block == 0
    return fake_quantize_per_token if weight.bits == 4 and whole else per_block(name, weight)


@cache
def _per_block(size: int) -> Round:
    """One object for each size, by which others see that two roundings are the same."""
    return partial(fake_quantize_per_block, size=size)
