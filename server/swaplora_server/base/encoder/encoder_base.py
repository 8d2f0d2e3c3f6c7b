"""An encoder as a base: loaded by transformers, given our attention and wrapped linears, proven before it serves."""

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from swaplora_adapters.weights.device_copy import DeviceCopier
from swaplora_server.base.base_model import BaseModel
from swaplora_server.base.batch_invariant import make_batch_invariant
from swaplora_server.base.encoder.proof import InputTrial, expected_states
from swaplora_server.base.encoder.sentence_config import SentenceConfig, read_sentence_config
from swaplora_server.base.fingerprint import fingerprint_of
from swaplora_server.base.layers import AdaptableLayers
from swaplora_server.base.proof import UnsupportedModelError
from swaplora_server.base.vocabulary import Vocabulary
from swaplora_server.engine.lora.attach import attach
from swaplora_server.engine.pooling import attention
from swaplora_server.engine.pooling.encoder_runner import EncoderRunner, padding_id_of
from swaplora_server.kernels.backend import Backend


@dataclass(frozen=True, slots=True)
class EncoderBase(BaseModel):
    """A base that reads whole inputs and generates nothing."""

    def input_runner(self) -> EncoderRunner:
        """What runs its steps."""
        return EncoderRunner(self.model, self.backend, self.max_positions, self.device)


def is_encoder(config: Any) -> bool:
    """Whether a model of this configuration was made to read whole inputs, and not to go on with them."""
    is_decoding = getattr(config, "is_decoder", False) or config.is_encoder_decoder
    return config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not is_decoding


def load_encoder(source: str | Path, *, device: torch.device, dtype: torch.dtype, backend: Backend) -> EncoderBase:
    """Load, wrap and prove an encoder from a folder or hub id. Raises UnsupportedModelError naming the reason."""
    sentence_config = read_sentence_config(source)
    try:
        model: PreTrainedModel = AutoModel.from_pretrained(source, dtype=dtype, attn_implementation="eager")
        model.requires_grad_(False).eval()
        tokenizer = AutoTokenizer.from_pretrained(source)
        return prepare_encoder(
            model.to(device), tokenizer, sentence_config, device=device, dtype=dtype, backend=backend
        )
    except torch.OutOfMemoryError as error:
        raise UnsupportedModelError("the base does not fit into the GPU's memory: serve a smaller one") from error


def prepare_encoder(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    sentence_config: SentenceConfig,
    *,
    device: torch.device,
    dtype: torch.dtype,
    backend: Backend,
) -> EncoderBase:
    """Wrap and prove an encoder that lies on `device`, in place. Raises UnsupportedModelError naming the reason."""
    _check_attention(model)
    if hasattr(model, "pooler"):
        model.pooler = None  # which reads the first row of all
    fingerprint = fingerprint_of(model, tokenizer)
    max_positions = _max_positions(model, sentence_config)
    expected = expected_states(model, max_positions, backend.products)
    attention.register()
    model.set_attn_implementation(attention.IMPLEMENTATION)
    memory = backend.memory()
    # paths as in the models that have a head behind it, which most adapters are trained on
    rooted = nn.ModuleDict({model.base_model_prefix: model})
    wrapped = attach(
        rooted,
        embedding=model.get_input_embeddings(),
        head=None,
        prepare=lambda linear: backend.linear(linear, memory),
    )
    if device.type == "cpu":
        make_batch_invariant(model, None)
    trial = InputTrial(model, backend, max_positions, expected)
    addressable = trial.prove(wrapped)
    root = model.base_model_prefix
    layers = AdaptableLayers(wrapped, addressable, {}, backend, dtype, model.config.model_type, root)
    trial.prove_adapters(wrapped, layers)
    return EncoderBase(
        model=model,
        backend=backend,
        paths=tuple(wrapped),
        tokenizer=tokenizer,
        vocabulary=Vocabulary(tokenizer.backend_tokenizer),
        layers=layers,
        device=device,
        dtype=dtype,
        vocab_size=model.config.vocab_size,
        max_positions=max_positions,
        eos_token_ids=frozenset(),
        kv_bytes_per_token=0,
        weight_bytes=sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers())),
        copier=None if device.type == "cpu" else DeviceCopier(device),
        fingerprint=fingerprint,
        tolerance=expected.tolerance,
        pooling=sentence_config.pooling,
    )


def _check_attention(model: PreTrainedModel) -> None:
    """Raise UnsupportedModelError for a model that keeps its attention to itself, such as DeBERTa's."""
    takes_positions = "position_ids" in inspect.signature(model.forward).parameters
    if not (model._supports_attention_backend and takes_positions):  # noqa: SLF001 - what transformers itself asks
        raise UnsupportedModelError(
            f"{model.config.model_type} computes its attention in its own code, where inputs cannot be packed: serve "
            "BERT, RoBERTa, XLM-R, DistilBERT or ModernBERT"
        )


def _max_positions(model: PreTrainedModel, sentence_config: SentenceConfig) -> int:
    padding_id = padding_id_of(model)
    num_positions: int = model.config.max_position_embeddings - (0 if padding_id is None else padding_id + 1)
    return min(num_positions, sentence_config.max_tokens or num_positions)
