"""Steps of nobody's prompts: whether the model computes, and what its largest step takes."""

from swaplora_server.engine.kv_cache import BlockPool
from swaplora_server.engine.request import Request, SamplingParams, Sequence
from swaplora_server.engine.runner import Runner, StepRunner
from swaplora_server.engine.scheduling.batch import Batch, rows_of

_ONE_TOKEN = SamplingParams(max_tokens=1)
# what takes the most memory for a token: of each row the filters sort the vocabulary, and all of its scores are taken
_COSTLY_TOKEN = SamplingParams(max_tokens=1, top_p=0.999, num_logprobs=0, num_prompt_logprobs=0)


def run_probe(runner: StepRunner, pool: BlockPool) -> None:
    """Run one step of one row. Raises what the model does."""
    _run(runner, pool, 1, 1, 0, _ONE_TOKEN)


def run_largest(runner: Runner, pool: BlockPool, num_tokens: int, num_sequences: int, num_scored: int) -> None:
    """Run one step of `num_tokens` rows, whose `num_sequences` all sample; `num_scored` rows of the first are scored.

    Raises what the model does.
    """
    _run(runner, pool, num_tokens, num_sequences, num_scored, _COSTLY_TOKEN)


def _run(
    runner: StepRunner, pool: BlockPool, num_tokens: int, num_sequences: int, num_scored: int, params: SamplingParams
) -> None:
    first = _sequence(num_tokens - num_sequences + 1, params)
    pool.grow(first.block_table, first.num_tokens)
    try:
        rows = rows_of(first, 0, first.num_tokens)
        batch = [rows._replace(num_scored=min(rows.num_scored, num_scored))]
        for _ in range(num_sequences - 1):  # of the same token at the same position, so in the same place
            other = _sequence(1, params)
            other.block_table = first.block_table
            batch.append(rows_of(other, 0, 1))
        runner.run(Batch(tuple(batch)))
    finally:
        pool.release(first.block_table)


def _sequence(num_tokens: int, params: SamplingParams) -> Sequence:
    return Sequence(Request("probe", (0,) * num_tokens, params, emit=lambda _event: None), 0)
