"""PEFT, in the test's process, as the reference for what an adapter does."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from peft.tuners.lora.arrow import ArrowLoraLinearLayer, create_arrow_model
from peft.tuners.lora.config import ArrowConfig
from torch import Tensor, nn
from transformers import AutoModelForCausalLM


class Oracle:
    """Stock transformers, in float32 unless told otherwise, with one adapter or none."""

    def __init__(self, base: Path, adapter: Path | None = None, dtype: torch.dtype = torch.float32) -> None:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, attn_implementation="eager")
        self._model = model if adapter is None else PeftModel.from_pretrained(model, str(adapter))
        self._model.eval()

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        device: torch.device = self._model.device
        return device

    def to(self, device: torch.device) -> None:
        """Compute there from now on."""
        self._model.to(device)

    @torch.no_grad()
    def logprobs(self, token_ids: list[int]) -> Tensor:
        """[len(token_ids), vocab_size], on the CPU: the log-distribution of the token behind each position."""
        logits: Tensor = self._model(torch.tensor([token_ids], device=self.device)).logits[0]
        return logits.float().log_softmax(-1).cpu()

    def worst_error(self, prompt: list[int], generated: list[int], logprobs: list[float]) -> float:
        """The largest |Δ logprob| of generated tokens, teacher-forced."""
        expected = self.logprobs(prompt + generated)[len(prompt) - 1 : -1]
        chosen = expected[torch.arange(len(generated)), torch.tensor(generated)]
        return float((chosen - torch.tensor(logprobs)).abs().max())

    def is_greedy(self, prompt: list[int], generated: list[int], tie: float) -> bool:
        """Whether every generated token was the likeliest, or within `tie` of it."""
        expected = self.logprobs(prompt + generated)[len(prompt) - 1 : -1]
        chosen = expected[torch.arange(len(generated)), torch.tensor(generated)]
        return bool((expected.max(-1).values - chosen <= tie).all())


class ArrowOracle(Oracle):
    """Several adapters mixed by PEFT's Arrow."""

    def __init__(
        self,
        base: Path,
        adapters: Sequence[Path],
        top_k: int,
        temperature: float = 1.0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, attn_implementation="eager")
        config = ArrowConfig(top_k=top_k, router_temperature=temperature, rng_seed=0)
        self._model = create_arrow_model(model, [str(folder) for folder in adapters], config)
        self._model.eval()

    @torch.no_grad()
    def hidden(self, token_ids: list[int]) -> NDArray[np.float32]:
        """[len(token_ids), hidden_size]: behind the last norm."""
        output = self._model(torch.tensor([token_ids]), output_hidden_states=True)
        states: NDArray[np.float32] = output.hidden_states[-1][0].numpy()
        return states

    @torch.no_grad()
    def shares(self, token_ids: list[int]) -> dict[str, Tensor]:
        """By module [num_tokens, num_members]: how much each token takes of each adapter."""
        found: dict[str, Tensor] = {}

        def note(path: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def hook(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                arrow: Any = layer
                likeness = (inputs[0][0] @ arrow.prototypes.T).abs()
                top, chosen = likeness.topk(arrow.top_k, dim=1)
                scores = torch.full_like(likeness, -torch.inf).scatter_(1, chosen, top)
                found[path] = (scores / arrow.temperature).softmax(1)

            return hook

        self.logprobs(token_ids)  # which makes the prototypes
        layers = [(name, layer) for name, layer in self._model.named_modules() if name.endswith("arrow_router")]
        handles = [
            layer.register_forward_pre_hook(note(name.removeprefix("base_model.model.").partition(".lora_arrow")[0]))
            for name, layer in layers
            if isinstance(layer, ArrowLoraLinearLayer)
        ]
        self.logprobs(token_ids)
        for handle in handles:
            handle.remove()
        return found
