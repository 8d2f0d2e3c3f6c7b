"""An encoder as a base: loaded by transformers, given our attention and wrapped linears, proven before it serves."""

import inspect
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from swaplora_adapters.weights.device_copy import DeviceCopier
from swaplora_server.base.base_model import BaseModel
from swaplora_server.base.batch_invariant import make_batch_invariant
from swaplora_server.base.encoder.proof import UNFIT, InputTrial, expected_states
from swaplora_server.base.encoder.sentence_config import SentenceConfig, read_sentence_config
from swaplora_server.base.fingerprint import fingerprint_of
from swaplora_server.base.layers import AdaptableLayers
from swaplora_server.base.proof import UnsupportedModelError
from swaplora_server.base.task_heads import TaskHeads
from swaplora_server.base.vocabulary import Vocabulary
from swaplora_server.engine.lora.attach import attach
from swaplora_server.engine.pooling.attention import InterfaceLayers
from swaplora_server.engine.pooling.deberta_like import encoder_of
from swaplora_server.engine.pooling.disentangled import DisentangledLayers
from swaplora_server.engine.pooling.encoder_runner import EncoderRunner, padding_id_of
from swaplora_server.engine.step import running
from swaplora_server.kernels.backend import Backend

_log = structlog.get_logger(__name__)
_NAMED = 3  # tensors of a refusal or a warning, before it counts the others


@dataclass(frozen=True, slots=True)
class EncoderBase(BaseModel):
    """A base that reads whole inputs and generates nothing."""

    pooler: nn.Module | None = None  # of the first state of each, which heads of some architectures read

    def input_runner(self) -> EncoderRunner:
        """What runs its steps."""
        return EncoderRunner(self.model, self.pooler, self.backend, self.max_positions, self.device)


def is_encoder(config: Any) -> bool:
    """Whether a model of this configuration was made to read whole inputs, and not to go on with them."""
    is_decoding = getattr(config, "is_decoder", False) or config.is_encoder_decoder
    return config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not is_decoding


def load_encoder(source: str | Path, *, device: torch.device, dtype: torch.dtype, backend: Backend) -> EncoderBase:
    """Load, wrap and prove an encoder from a folder or hub id. Raises UnsupportedModelError naming the reason."""
    sentence_config = read_sentence_config(source)
    try:
        model, given = _load(source, dtype)
        model.requires_grad_(False).eval().to(device)
        tokenizer = AutoTokenizer.from_pretrained(source)
        return prepare_encoder(model, given, tokenizer, sentence_config, device=device, dtype=dtype, backend=backend)
    except torch.OutOfMemoryError as error:
        raise UnsupportedModelError("the base does not fit into the GPU's memory: serve a smaller one") from error


def _load(source: str | Path, dtype: torch.dtype) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """The encoder, and what its files have of a classifier's head behind it.

    A pooler of which the files have nothing is left out. Raises UnsupportedModelError where they lack what is the
    encoder's own.
    """
    with _held_report():
        model, loaded = AutoModelForSequenceClassification.from_pretrained(
            source, dtype=dtype, attn_implementation="eager", output_loading_info=True
        )
    root = model.base_model_prefix
    missing = set(loaded["missing_keys"])
    if any(name.startswith(f"{root}.pooler.") for name in missing):
        model.base_model.pooler = None
    absent = sorted(name for name in missing if name.startswith(f"{root}.") and ".pooler." not in name)
    if absent:
        raise UnsupportedModelError(f"its files have no {_named(absent)}: this is no whole {model.config.model_type}")
    if unread := sorted(loaded["unexpected_keys"]):
        _log.warning("the base's files have tensors that nothing reads", tensors=_named(unread))
    own = {name: tensor for name, tensor in model.named_parameters() if not name.startswith(f"{root}.")}
    return model.base_model, {name: tensor.detach() for name, tensor in own.items() if name not in missing}


@contextmanager
def _held_report() -> Iterator[None]:
    """Within it transformers' report of a load is not logged, unless the load fails.

    It lists a missing classifier's head as if something were wrong with the base: heads come with adapters here.
    """
    logger = logging.getLogger("transformers.modeling_utils")
    held: list[logging.LogRecord] = []

    def is_other(record: logging.LogRecord) -> bool:
        is_report = "LOAD REPORT" in record.getMessage()
        held.extend([record] * is_report)
        return not is_report

    logger.addFilter(is_other)
    try:
        yield
        held.clear()
    finally:
        logger.removeFilter(is_other)
        for record in held:
            logger.handle(record)


def _named(names: list[str]) -> str:
    rest = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {rest} more" if rest > 0 else "")


def prepare_encoder(
    model: PreTrainedModel,
    given: Mapping[str, Tensor],
    tokenizer: PreTrainedTokenizerFast,
    sentence_config: SentenceConfig,
    *,
    device: torch.device,
    dtype: torch.dtype,
    backend: Backend,
) -> EncoderBase:
    """Wrap and prove an encoder that lies on `device`, in place. Raises UnsupportedModelError naming the reason."""
    fingerprint = fingerprint_of(model, tokenizer)
    max_positions = _max_positions(model, sentence_config)
    seam = _seam(model, backend, max_positions)
    expected = expected_states(model, max_positions, backend.products)
    seam.put_in()
    memory = backend.memory()
    # paths as in the models that have a head behind it, which most adapters are trained on
    root = model.base_model_prefix
    pooler: nn.Module | None = getattr(model, "pooler", None)
    wrapped = attach(
        nn.ModuleDict({root: model}),
        embedding=model.get_input_embeddings(),
        head=None if pooler is None else next(part for part in pooler.modules() if isinstance(part, nn.Linear)),
        prepare=lambda linear: backend.linear(linear, memory),
    )
    if device.type == "cpu":
        make_batch_invariant(model, None)
    weights = [*model.parameters(), *model.buffers()]
    if pooler is not None:
        model.pooler = None  # which would read the first row of all
    trial = InputTrial(model, pooler, backend, max_positions, expected)
    addressable = trial.prove(wrapped) | seam.of_distances
    heads = TaskHeads(
        model.config,
        root,
        lambda linear: backend.linear(linear, backend.memory(0)),
        given=given,
        pooler=[path for path in wrapped if path.startswith(f"{root}.pooler.")],
        device=device,
    )
    layers = AdaptableLayers(
        wrapped, addressable, {}, backend, dtype, model.config.model_type, root, heads, seam.of_distances
    )
    trial.prove_adapters(wrapped, layers, seam.left_out())
    _fuse(model, backend, trial)
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
        weight_bytes=sum(tensor.nbytes for tensor in (*weights, *seam.kept)),
        copier=None if device.type == "cpu" else DeviceCopier(device),
        fingerprint=fingerprint,
        tolerance=expected.tolerance,
        pooling=sentence_config.pooling,
        score_activation=sentence_config.score_activation,
        pooler=pooler,
    )


def _fuse(model: PreTrainedModel, backend: Backend, trial: InputTrial) -> None:
    """Have all layers run in one native call, where there is one for their kind and it passes the proof as well."""
    undo = None
    try:
        undo = backend.wrap(model, running)
        if undo is not None:
            trial.prove_again()
    except UNFIT as error:
        if undo is not None:
            undo()
        _log.warning("layers run one operation at a time", reason=str(error))


def _seam(model: PreTrainedModel, backend: Backend, max_positions: int) -> InterfaceLayers | DisentangledLayers:
    """How the model is brought to read packed steps: by transformers' interface for attention, or DeBERTa's layers.

    Raises UnsupportedModelError for a model that keeps its attention to itself.
    """
    takes_positions = "position_ids" in inspect.signature(model.forward).parameters
    if takes_positions and model._supports_attention_backend:  # noqa: SLF001 - what transformers itself asks
        return InterfaceLayers(model)
    if encoder_of(model) is None:
        raise UnsupportedModelError(
            f"{model.config.model_type} computes its attention in its own code, where inputs cannot be packed: serve "
            "BERT, RoBERTa, XLM-R, DistilBERT, ModernBERT or DeBERTa"
        )
    try:
        return DisentangledLayers(model, backend, max_positions)
    except UNFIT as error:
        raise UnsupportedModelError(f"{model.config.model_type} cannot be packed: {error}") from error


def _max_positions(model: PreTrainedModel, sentence_config: SentenceConfig) -> int:
    padding_id = padding_id_of(model)
    num_positions: int = model.config.max_position_embeddings - (0 if padding_id is None else padding_id + 1)
    return min(num_positions, sentence_config.max_tokens or num_positions)
