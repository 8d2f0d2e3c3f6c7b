"""Modules of an adapter's own in place of the base's: saved whole, with a bias of its own, or with trained experts."""

import torch
from torch import Tensor, nn

from swaplora_adapters.config.spec import HEAD_TASKS
from swaplora_adapters.files.complaints import quoted
from swaplora_adapters.fit.slots import expert_sizes
from swaplora_adapters.fit.targets import TargetParameter
from swaplora_adapters.weights.parts import Parts
from swaplora_adapters.weights.values import converted, is_finite


def build_replacement(parts: Parts) -> nn.Module | None:
    """None where all that the file has is the base's own bias."""
    parameters = {}
    for part in parts.tensors:
        kind, _, name = part.partition(".")
        if kind == "parameter":
            parameters[name] = parts.exact(part, parts.dtype)
        elif kind == "lora_A" and parts.path in HEAD_TASKS:
            parameters[f"{name}.weight"] = _adapted_head(parts, name)
        elif kind == "lora_A":
            parameters[name] = _adapted(parts, TargetParameter(parts.path, name))
    _check_twin(parts)
    if parameters.keys() == {"bias"} and _is_base_bias(parts, parameters["bias"]):
        return None
    parts.has_effect = True
    return parts.layout.layers.rebuild(parts.path, parameters)


def _adapted_head(parts: Parts, path: str) -> Tensor:
    """W + B A of a linear in a head, W being the base's own."""
    slot, tensor = parts.tensors[f"lora_A.{path}"]
    lora_A = parts.checked(slot, tensor, dtype=torch.float32)
    lora_B = parts.scaled(f"lora_B.{path}", parts.tensors[f"lora_B.{path}"].slot.scaling, torch.float32)
    return converted(parts.layout.layers.read(f"{path}.weight").addmm_(lora_B, lora_A), parts.dtype)


def _is_base_bias(parts: Parts, bias: Tensor) -> bool:
    base = parts.base("bias")
    return base is not None and torch.equal(base.to(bias.dtype), bias)


def _check_twin(parts: Parts) -> None:
    twin, own = parts.tensors.get("twin"), parts.tensors.get("parameter.bias")
    if twin is not None and (own is None or not torch.equal(twin.tensor, own.tensor)):
        parts.complaints.append(f"{quoted(twin.slot.name)} is not the bias that the file has for {quoted(parts.path)}")


def _adapted(parts: Parts, target: TargetParameter) -> Tensor:
    """W + B A of every expert (`peft.tuners.lora.layer.ParamWrapper.get_delta_weight`)."""
    layers = parts.layout.layers
    num_experts, in_features, out_features = expert_sizes(layers, target)
    slot, tensor = parts.tensors[f"lora_A.{target.name}"]
    lora_A = parts.checked(slot, tensor, dtype=torch.float32).float().view(num_experts, -1, in_features)
    scaling = parts.tensors[f"lora_B.{target.name}"].slot.scaling
    lora_B = parts.scaled(f"lora_B.{target.name}", scaling, torch.float32).float().view(out_features, -1, num_experts)
    weight = layers.read(target.full_name)
    experts = weight.view(num_experts, *weight.shape[-2:])
    is_transposed = weight.dim() == 3 and target.path in layers.transposed
    for expert, own_A, own_B in zip(experts, lora_A, lora_B.unbind(2), strict=True):
        (expert.t() if is_transposed else expert).addmm_(own_B, own_A)
    adapted = converted(weight, parts.dtype)
    if not is_finite(adapted) and not parts.complaints:
        parts.complaints.append(f"{quoted(target.full_name)} is not finite once it is adapted")
    return adapted
