"""The engine of an encoder: the same steps over whole inputs, without a KV cache."""

from swaplora_server.base.encoder.encoder_base import EncoderBase
from swaplora_server.base.proof import UnsupportedModelError
from swaplora_server.config import Settings
from swaplora_server.engine.engine import Engine
from swaplora_server.engine.kv_cache import BlockPool
from swaplora_server.engine.scheduling.scheduler import Scheduler

_OF_DECODERS = ("kv_cache_bytes", "gpu_memory_fraction", "cuda_graphs")


def check_settings(settings: Settings) -> None:
    """Raise UnsupportedModelError for a setting that says nothing of a base without a KV cache."""
    for name in _OF_DECODERS:
        if getattr(settings, name) is not None:
            flag = f"--{name.replace('_', '-')}"
            raise UnsupportedModelError(f"{flag} is for bases that generate: leave it out for an encoder")


def max_input_len(base: EncoderBase, settings: Settings) -> int:
    """Tokens of the longest input. Raises UnsupportedModelError for more than the base has positions for."""
    wanted = settings.max_model_len or base.max_positions
    if not 2 <= wanted <= base.max_positions:
        raise UnsupportedModelError(f"inputs of {wanted} tokens cannot be had: the base takes {base.max_positions}")
    return wanted


def encoder_engine(base: EncoderBase, settings: Settings, max_rows: int, max_len: int) -> Engine:
    """Each sequence that runs has one block, of as many tokens as the longest input: nothing is kept in it."""
    scheduler = Scheduler(
        BlockPool(2 * max_rows + 1, max_len),  # beside those that run one is free for each, lest it be preempted
        max_batch_tokens=max(settings.max_batch_tokens, max_len),
        max_num_seqs=max_rows,
        max_step_ranks=settings.max_step_ranks,
        prefix_cache=False,
        takes_whole=True,
    )
    return Engine(scheduler, base.input_runner(), settings.max_step_seconds)
