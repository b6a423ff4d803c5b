"""The Triton kernel of the outlier matmul on the CPU, in the interpreter that comes with Triton."""

import jax
import jax.numpy as jnp
import numpy as np
from triton.runtime import interpreter

from ouromamba_jax.pallas import triton_matmul
from ouromamba_jax.pallas.tiles import MatmulTiles
from ouromamba_jax.pallas.triton_matmul_kernel import matmul

TILES = MatmulTiles(tile_m=128, tile_n=64, stages=3)


class HostTensor:
    """What the interpreter asks of a tensor, around a NumPy array."""

    def __init__(self, array):
        self.array = array
        self.dtype = {"int8": "i8", "int32": "i32", "float32": "fp32"}[array.dtype.name]

    def data_ptr(self):
        return self.array.ctypes.data

    def untyped_storage(self):
        return self

    cpu = untyped_storage

    def new_empty(self, *_, **__):
        return HostTensor(self.array)

    def size(self):
        return self.array.shape

    def stride(self):
        return self.array.strides

    def storage_offset(self):
        return 0

    def set_(self, *_):
        pass

    copy_ = set_


def launch(split, weight, bias=None, dtype=jnp.float32, residual=None):
    """As `triton_matmul._launch`, inside jit as well."""
    B, L, _ = split.shape
    O = weight.shape[1]
    out = jax.ShapeDtypeStruct((B * L, O), jnp.float32)
    operands = triton_matmul.operands(split, weight, bias)
    constants = triton_matmul.constants(split, O, TILES, bias is not None)
    y = jax.pure_callback(lambda *arrays: _launch(arrays, out, constants), out, *operands)
    y = y.reshape(B, L, O).astype(dtype)
    return y if residual is None else residual + y


def _launch(arrays, out, constants):
    y = np.full(out.shape, np.nan, np.float32)
    tensors = [HostTensor(np.array(x)) for x in (*arrays, y)]
    grid = (-(-y.shape[0] // TILES.tile_m), -(-y.shape[1] // TILES.tile_n))
    patch = interpreter._patch_lang_tensor

    def patch_with_index(tensor, scope):  # Triton 3.6 takes int() of an array of one element, which NumPy 2.5 refuses
        patch(tensor, scope)
        tensor.__index__ = lambda self: self.handle.data.item()

    interpreter._patch_lang_tensor = patch_with_index
    try:
        kernel = interpreter.InterpretedFunction(matmul.fn)
        kernel[grid](*tensors, **constants)
    finally:
        interpreter._patch_lang_tensor = patch
    return tensors[-1].array
