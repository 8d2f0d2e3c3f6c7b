"""Bases of 8 and 4 bits, through bitsandbytes: what is asked of transformers, and what is refused."""

from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear as product
from transformers import BitsAndBytesConfig, PretrainedConfig
from transformers.utils import is_bitsandbytes_available

from swaplora_server.base.proof import UnsupportedModelError
from swaplora_server.kernels.quantised_codes import codes_of, has_blocks_across_rows, is_nibbles, is_quantised

Quantization = Literal["int8", "nf4"]
_REMEDY = "pip install 'swaplora[quantized]'"


def loading_arguments(
    config: PretrainedConfig, wanted: Quantization | None, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """What `from_pretrained` is given beyond the usual; nothing for a plain base. Raises UnsupportedModelError.

    A base that was saved quantised stays as it is.
    """
    saved = _saved(config)
    if saved is None and wanted is None:
        return {}
    if not is_bitsandbytes_available():
        asked = "quantization_config in the base's config.json" if saved else f"quantization {wanted}"
        raise UnsupportedModelError(f"{asked} needs bitsandbytes, which is not installed or too old: {_REMEDY}")
    if saved is None:
        return {"device_map": {"": device}, "quantization_config": _made(wanted, dtype)}
    if wanted not in (None, saved):
        raise UnsupportedModelError(
            f"quantization {wanted} cannot be had: the base was saved as {saved}; leave --quantization out"
        )
    return {"device_map": {"": device}}


def _made(wanted: Quantization | None, dtype: torch.dtype) -> BitsAndBytesConfig:
    if wanted == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def _saved(config: PretrainedConfig) -> str | None:
    """int8, nf4 or fp4, as the base's files have it. Raises UnsupportedModelError for what cannot be served."""
    fields = getattr(config, "quantization_config", None)
    if fields is None:
        return None
    # the oldest files name no method, only the bits
    is_unnamed = fields.get("load_in_8bit") or fields.get("load_in_4bit")
    method = fields.get("quant_method", "bitsandbytes" if is_unnamed else None)
    if method != "bitsandbytes":
        raise UnsupportedModelError(
            f"the base's config.json has a quantization_config of quant_method {method}, which is not served: "
            "take the base as it was before, with --quantization if it is to be small, or one saved by bitsandbytes"
        )
    if fields.get("llm_int8_has_fp16_weight"):
        raise UnsupportedModelError(
            "the base's quantization_config has llm_int8_has_fp16_weight, which is for training and not served: "
            "save the base without it"
        )
    return "int8" if fields.get("load_in_8bit") else str(fields.get("bnb_4bit_quant_type", "fp4"))


def multiply_dequantised(model: nn.Module) -> None:
    """Have bitsandbytes' linears on a CPU compute x Wᵀ in float32 with the dequantised W, as they do in training.

    Their other product of 8 bits is none for rows of many requests: see `multiply_bytes_dequantised`. The one of 4 bits
    would compute in whatever type the files name, and on some processors lay the weight out anew. Its dequantisation
    for processors with AVX512 takes wrong scales where a block goes on from one row to the next, so those linears get
    ours.
    """
    for linear in filter(is_quantised, model.modules()):
        linear.train()
        if is_nibbles(linear):
            linear.compute_dtype = torch.float32  # type: ignore[assignment]
            if has_blocks_across_rows(linear):
                linear.forward = partial(_multiply_wide, linear)


def multiply_bytes_dequantised(model: nn.Module) -> None:
    """Have bitsandbytes' linears of 8 bits on a GPU compute x Wᵀ with the dequantised W, in x's number format.

    Their own product rounds x to 8 bits as well and treats columns with outliers apart, those of all rows as soon as
    one row has them: what a request is answered would depend on its neighbours.
    """
    for linear in filter(is_quantised, model.modules()):
        if not is_nibbles(linear):
            linear.forward = partial(_multiply, linear)


def _multiply(linear: Any, x: Tensor) -> Tensor:
    bias = None if linear.bias is None else linear.bias.to(x.dtype)
    return product(x, codes_of(linear).dense().to(x.dtype), bias)


def _multiply_wide(linear: Any, x: Tensor) -> Tensor:
    return _multiply(linear, x.float()).to(x.dtype)
