"""A plugin of pytest: Triton's interpreter puts its own operations into the language once, not at every call.

Otherwise a third of all time goes into that. They stay there: this is for a process that compiles nothing. Of the rest
half goes into making types and shapes that are there already, and into a dozen operations that look for one overflow.
"""

from functools import cache
from typing import Any

import numpy as np
from triton import language
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

_EXACTLY = {"add": np.add, "sub": np.subtract, "mul": np.multiply}


def of_all() -> Any:
    """What the interpreter takes for a kernel: its globals say which modules are changed."""
    raise NotImplementedError


class _Block(language.block_type):  # type: ignore[misc]
    __init__ = language.block_type.__init__  # as it is before this plugin


class _Tensor(language.tensor):  # type: ignore[misc]
    __init__ = language.tensor.__init__  # likewise


@cache
def _block(*shape: int) -> Any:
    return _Block(language.int1, list(shape))


@cache
def _sizes(*shape: int) -> tuple[Any, Any]:
    like = _Tensor(None, _block(*shape) if shape else language.int1)
    return like.shape, like.numel


def _init_block(block: Any, element_ty: Any, shape: Any) -> None:
    like = _block(*(getattr(size, "value", size) for size in shape))
    block.element_ty, block.shape, block.numel = element_ty, like.shape, like.numel
    block.name = f"{like.name}{element_ty}"


def _init_tensor(tensor: Any, handle: Any, dtype: Any) -> None:
    tensor.handle, tensor.type, tensor.dtype = handle, dtype, dtype.scalar
    tensor.shape, tensor.numel = _sizes(*(dtype.shape.values if dtype.is_block() else ()))


_np_dtypes: dict[str, np.dtype[Any]] = {}
_find_np_dtype = interpreter._get_np_dtype  # noqa: SLF001


def _np_dtype_of(dtype: Any) -> np.dtype[Any]:
    name = dtype.scalar.name
    if name not in _np_dtypes:
        _np_dtypes[name] = _find_np_dtype(dtype)
    return _np_dtypes[name]


def _refuse_overflow(_semantic: Any, left: Any, right: Any, operation: Any) -> None:
    """As the interpreter does, of integers of fewer than 64 bits."""
    dtype = left.type.scalar
    if dtype.int_bitwidth < 64:
        exact = _EXACTLY[operation.__name__](left.handle.data, right.handle.data, dtype=np.int64)
        assert dtype.get_int_min_value() <= exact.min() <= exact.max() <= dtype.get_int_max_value(), dtype


_patch, _nothing = interpreter._patch_lang, interpreter._LangPatchScope()  # noqa: SLF001
of_all.__globals__.update(tl=language, core=language.core)
_patch(of_all)
interpreter._patch_lang = lambda _function: _nothing  # noqa: SLF001
language.block_type.__init__, language.tensor.__init__ = _init_block, _init_tensor
interpreter._get_np_dtype = _np_dtype_of  # noqa: SLF001
TritonSemantic.binary_op_sanitize_overflow_impl = _refuse_overflow
