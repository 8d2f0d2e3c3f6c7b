"""Attention of whole inputs in torch's own operations, on any device."""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from swaplora_server.kernels.backend import LayerAttention
from swaplora_server.kernels.step import Runs


class TorchWhole:
    """See `WholeAttention`."""

    def step(self, runs: Runs) -> "WholeInputs":
        """See `WholeAttention`."""
        return WholeInputs(runs)


class WholeInputs:
    """One step: each input attends by itself, so its numbers do not depend on what lies beside it."""

    def __init__(self, runs: Runs) -> None:
        self._bounds = list(zip(runs.starts.tolist(), runs.stops.tolist(), strict=True))
        self._masks: dict[tuple[int, int], Tensor] = {}

    def attend(self, layer: LayerAttention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See `PagedStep`."""
        out = query.new_empty(*query.shape[:2], value.shape[-1])
        for start, stop in self._bounds:
            q, k, v = (part[start:stop].transpose(0, 1)[None] for part in (query, key, value))
            mask = self._mask(stop - start, layer.window, query.device)
            attended = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=layer.scaling)
            out[start:stop] = attended[0].transpose(0, 1)
        return out

    def _mask(self, length: int, window: int | None, device: torch.device) -> Tensor | None:
        if window is None or length <= window:
            return None
        if (length, window) not in self._masks:
            positions = torch.arange(length, device=device)
            self._masks[length, window] = (positions[:, None] - positions).abs() < window
        return self._masks[length, window]
