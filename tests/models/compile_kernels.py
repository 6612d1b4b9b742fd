"""Compile the kernels of `models.favor_kernels` for an H100 without having one; prints which use its tensor cores.

python -m tests.models.compile_kernels
"""

import inspect

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from models import favor_kernels
from models.favor import FEATURE_EPS, TINY
from models.favor_kernels import FEATURES, TOKENS

KERNELS = ("_key_sums", "_attend", "_query_gradients", "_query_sums", "_key_gradients")
PRECISE = {"sums", "ones", "tops", "c_ones", "c_total", "ones_total", "du_ones", "dc_ones", "dc_total"}
"""Arguments that are float32 whatever the precision."""
INTEGERS = {"length", "n_features", "heads", "stride_cell", "stride", "stretch"}
CONSTANTS = {"D": 64, "M": FEATURES, "T": TOKENS, "PRECISION": "tf32", "EPS": FEATURE_EPS, "TINY": TINY}


def compiled(name: str, dtype: str, has_padding: bool):
    kernel = getattr(favor_kernels, name)
    names = list(inspect.signature(kernel.fn).parameters)
    constants = CONSTANTS | {"HAS_PADDING": has_padding}
    kinds = {"half_scale": "fp32", "valid": "*u8"} | dict.fromkeys(INTEGERS, "i32") | dict.fromkeys(PRECISE, "*fp32")
    kinds |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(
        fn=kernel,
        signature={argument: kinds.get(argument, f"*{dtype}") for argument in names},
        constexprs={(i,): constants[argument] for i, argument in enumerate(names) if argument in constants},
    )
    return compile(source, target=GPUTarget("cuda", 90, 32))


if __name__ == "__main__":
    for name in KERNELS:
        for dtype in ("bf16", "fp32"):
            for has_padding in (False, True):
                found = compiled(name, dtype, has_padding)
                cores = "tensor cores" if "wgmma" in found.asm["ptx"] else "no tensor cores"
                print(name, dtype, has_padding, cores, found.metadata.shared, flush=True)
