"""The resident base: loaded by transformers, given our attention and wrapped linears, and proven before it serves."""

import gc
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import structlog
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from swaplora_adapters.weights.device_copy import DeviceCopier, told_when_full
from swaplora_adapters.weights.served import AdapterWeights
from swaplora_server.base.adapter_proof import AdapterProof, adapter_proof
from swaplora_server.base.batch_invariant import make_batch_invariant
from swaplora_server.base.compact_embedding import compact_embedding
from swaplora_server.base.fingerprint import Fingerprint, fingerprint_of
from swaplora_server.base.layers import AdaptableLayers
from swaplora_server.base.proof import (
    Expected,
    Proof,
    UnsupportedModelError,
    expected_logits,
    prove,
    short_windows,
    stock_forward,
)
from swaplora_server.base.quantisation import (
    Quantization,
    loading_arguments,
    multiply_bytes_dequantised,
    multiply_dequantised,
)
from swaplora_server.base.task_heads import OF_LAST_TOKEN, TaskHeads
from swaplora_server.base.vocabulary import Vocabulary
from swaplora_server.engine import attention
from swaplora_server.engine.lora.attach import attach
from swaplora_server.engine.lora.joined import join, sharing_inputs
from swaplora_server.engine.lora.modules import LoraEmbedding
from swaplora_server.engine.pooling.kinds import LAST_TOKEN, Pooling
from swaplora_server.engine.runner import Runner
from swaplora_server.engine.step import running
from swaplora_server.kernels.backend import Backend
from swaplora_server.kernels.device_fault import fault_of

_log = structlog.get_logger(__name__)
Proven = TypeVar("Proven")


@dataclass(frozen=True, slots=True)
class BaseModel:
    """A base that is ready to serve, and what is known of it. `layers` are those that adapters may change."""

    model: PreTrainedModel
    backend: Backend
    paths: tuple[str, ...]  # of all wrapped modules, by number
    tokenizer: PreTrainedTokenizerFast
    vocabulary: Vocabulary
    layers: AdaptableLayers
    device: torch.device
    dtype: torch.dtype
    vocab_size: int  # every id below it can be read, sampled and stopped at
    max_positions: int
    eos_token_ids: frozenset[int]
    kv_bytes_per_token: int
    weight_bytes: int
    copier: DeviceCopier | None  # None on a CPU
    fingerprint: Fingerprint  # of all that it computes and reads with
    tolerance: float  # by how much rounding may move a logit, in standard deviations of its row
    pooling: Pooling = LAST_TOKEN  # how a vector is made of an input's hidden states
    score_activation: str | None = None  # what its folder says beside the config that scores of pairs go through

    def runner(self, num_blocks: int, block_size: int) -> Runner:
        return Runner(self.model, self.backend, self.backend.paged_kv(num_blocks, block_size))

    def prepared(self, weights: AdapterWeights) -> AdapterWeights:
        """An adapter as steps take it: on their device, with what kernels read of it. For the thread that loads it."""
        weights = weights if self.copier is None else self.copier.copy(weights)
        with told_when_full(weights):
            return replace(weights, tables=self.backend.tables(weights, self.paths))


def load_base(
    source: str | Path,
    *,
    device: torch.device,
    dtype: torch.dtype,
    backend: Backend,
    otherwise: Backend | None = None,
    quantization: Quantization | None = None,
) -> BaseModel:
    """Load, wrap and prove a base from a folder or hub id. Raises UnsupportedModelError naming the reason.

    `dtype` is that of its rows, what lies between its products. `otherwise` is for a base, a card or a driver that
    `backend` fails.
    """
    try:
        model: PreTrainedModel = _load_model(source, device, dtype, quantization)
        expected = expected_of(model, backend)  # what fails here is no fault of the kernels
        tokenizer = AutoTokenizer.from_pretrained(source)
        prepared = partial(prepare, tokenizer=tokenizer, device=device, dtype=dtype, expected=expected)
        try:
            return prepared(model, backend=backend)
        except Exception as error:  # whatever it is, the other kernels may do without it
            if (fault := fault_of(device)) is not None:
                raise UnsupportedModelError(_told(fault, has_others=otherwise is not None)) from error
            if otherwise is None:
                raise
            reason = str(error)
        del model
        gc.collect()  # which is changed already, and has to be read again
        base = prepared(_load_model(source, device, dtype, quantization), backend=otherwise)
    except torch.OutOfMemoryError as error:
        raise UnsupportedModelError(
            "the base does not fit into the GPU's memory: serve a smaller one, or this one with --quantization nf4"
        ) from error
    _log.warning(f"serving with {otherwise.description}: the GPU's own kernels failed this base", reason=reason)
    return base


def _told(fault: str, *, has_others: bool) -> str:
    remedy = (
        "start again with --kernels torch, which does without the GPU's own kernels"
        if has_others
        else "start again; if it stays, look at what the driver logs, for these are torch's own operations"
    )
    return f"the GPU computes nothing any more in this process ({fault}): {remedy}"


def expected_of(model: PreTrainedModel, backend: Backend) -> Expected:
    """What a model says as transformers made it. Raises UnsupportedModelError for one that no kernels can serve."""
    with short_windows(model):
        expected = expected_logits(model, backend.products)
    vocab_size_of(model.get_input_embeddings(), expected.logits[0].shape[-1])
    return expected


def prepare(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    *,
    device: torch.device,
    dtype: torch.dtype,
    backend: Backend,
    expected: Expected | None = None,
) -> BaseModel:
    """Wrap and prove a model that lies on `device`, in place. Raises UnsupportedModelError naming the reason.

    `expected`: what `expected_of` says of it, where that is known.
    """
    fingerprint = fingerprint_of(model, tokenizer)  # before its linears are laid out anew
    expected = expected or expected_of(model, backend)
    with short_windows(model):
        groups = sharing_inputs(model, lambda: stock_forward(model)) if backend.joins else []
        vocab_size = vocab_size_of(model.get_input_embeddings(), expected.logits[0].shape[-1])
        attention.register()
        model.set_attn_implementation(attention.IMPLEMENTATION)
        tied, memory = _tied(model), backend.memory()
        wrapped = attach(
            model,
            embedding=model.get_input_embeddings(),
            head=model.get_output_embeddings(),
            prepare=lambda linear: backend.linear(linear, memory),
        )
        for path, module in wrapped.items():
            if isinstance(module, LoraEmbedding):
                tied_head = next((wrapped[head].base for head in tied if tied[head] == path), None)
                module.base = compact_embedding(module.base, tied_head)
        if device.type == "cpu":
            make_batch_invariant(model, model.get_output_embeddings())
        weight_bytes = sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))

        def proven() -> tuple[Proof, AdaptableLayers, AdapterProof]:
            proof = prove(model, backend, wrapped, expected)
            config, root = model.config, model.base_model_prefix
            heads = TaskHeads(config, root, lambda linear: backend.linear(linear, backend.memory(0)), OF_LAST_TOKEN)
            layers = AdaptableLayers(wrapped, proof.addressable, tied, backend, dtype, config.model_type, root, heads)
            adapters = adapter_proof(model, backend, wrapped, layers, expected.tolerance)
            adapters.run(model, backend)
            return proof, layers, adapters

        proof, layers, adapters = _with_or_without(join(groups, wrapped), proven)
        _wrap(model, expected, adapters, backend)
    return BaseModel(
        model=model,
        backend=backend,
        paths=tuple(wrapped),
        tokenizer=tokenizer,
        vocabulary=Vocabulary(tokenizer.backend_tokenizer),
        layers=layers,
        device=device,
        dtype=dtype,
        vocab_size=vocab_size,
        max_positions=model.config.get_text_config().max_position_embeddings,
        eos_token_ids=_eos_token_ids(model, tokenizer, vocab_size),
        kv_bytes_per_token=proof.kv_bytes_per_token,
        weight_bytes=weight_bytes,
        copier=None if device.type == "cpu" else DeviceCopier(device),
        fingerprint=fingerprint,
        tolerance=expected.tolerance,
    )


def _tied(model: PreTrainedModel) -> dict[str, str]:
    """The path of each output head that shares its weight with an input embedding, and the embedding's path."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or getattr(head, "weight", None) is not embedding.weight:
        return {}
    paths = {module: path for path, module in model.named_modules()}
    return {paths[head]: paths[embedding]}


def _with_or_without(undo: Callable[[], None] | None, proven: Callable[[], Proven]) -> Proven:
    """What is proven of linears that are multiplied at once, or of each by itself where that fails."""
    try:
        return proven()
    except UnsupportedModelError as error:
        if undo is None:
            raise
        reason = str(error)
    undo()
    found = proven()
    _log.warning("linears that share their input are multiplied one by one", reason=reason)
    return found


def _wrap(model: PreTrainedModel, expected: Expected, adapters: AdapterProof, backend: Backend) -> None:
    """Have all layers run in one native call, where there is one for their kind and it passes the proof as well."""
    undo = backend.wrap(model, running)
    if undo is None:
        return
    try:
        prove(model, backend, {}, expected)
        adapters.run(model, backend)
    except UnsupportedModelError as error:
        undo()
        _log.warning("layers run one operation at a time", reason=str(error))


def _load_model(
    source: str | Path, device: torch.device, dtype: torch.dtype, quantization: Quantization | None
) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(source)
    _check_layer_types(config.get_text_config())
    arguments = loading_arguments(config, quantization, device, dtype)
    try:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, attn_implementation="eager", **arguments)
    except ValueError as error:
        raise UnsupportedModelError(
            f"{config.model_type} cannot be loaded as a causal language model: {error}"
        ) from error
    model.requires_grad_(False).eval()
    if not arguments:
        return model.to(device)
    if device.type == "cpu":
        multiply_dequantised(model)
    else:
        multiply_bytes_dequantised(model)
    return model


def _check_layer_types(config: Any) -> None:
    """Other kinds than full and sliding would be computed as full, beyond what the proof's length shows."""
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        raise UnsupportedModelError(f"{config.model_type} has layers of kind {', '.join(sorted(kinds))}")


def vocab_size_of(embedding: torch.nn.Module, num_logits: int) -> int:
    """The number of ids that a base says. Raises UnsupportedModelError if it could not read one of them back."""
    num_embeddings = embedding.get_parameter("weight").shape[0]
    if num_logits > num_embeddings:
        raise UnsupportedModelError(f"the base says {num_logits} tokens, and has embeddings for {num_embeddings}")
    return num_logits


def _eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, vocab_size: int) -> frozenset[int]:
    """What ends a sequence. An id beyond the vocabulary, which is never said, is left out with a warning."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    ids = configured if isinstance(configured, list) else [configured]
    wanted = {token for token in [*ids, tokenizer.eos_token_id] if token is not None}
    said = frozenset(token for token in wanted if 0 <= token < vocab_size)
    if said != wanted:
        _log.warning(
            "end tokens beyond the vocabulary are never said", ids=sorted(wanted - said), vocabulary=vocab_size
        )
    return said
