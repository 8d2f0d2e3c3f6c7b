"""A seed's text is the same alone and in any mix, in one piece or in chunks, after preemptions, and for each of n."""

from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch

import tiny
from repository import KERNEL_CACHE
from swaplora_server.base.base_model import BaseModel, load_base
from swaplora_server.engine.engine import Engine
from swaplora_server.engine.kv_cache import BlockPool
from swaplora_server.engine.request import Request, SamplingParams, TokenEvent
from swaplora_server.engine.scheduling.scheduler import Scheduler
from swaplora_server.kernels.pick import pick_backend

NUM_TOKENS = 24
BLOCK_SIZE = 16
FIELDS: list[dict[str, Any]] = [
    {},
    {"top_p": 0.9, "temperature": 1.5},
    {"top_k": 40, "top_p": 0.95},
    {"min_p": 0.02, "frequency_penalty": 1.0},
    {"repetition_penalty": 1.3, "presence_penalty": -0.5, "num_logprobs": 3},
    {"temperature": 0.0, "repetition_penalty": 1.5},
    {"logit_bias": ((65, 3.0), (66, -50.0)), "stop_token_ids": frozenset({65, 70}), "min_tokens": 20},
    {"allowed_token_ids": frozenset(range(30, 120))},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    folder: Path = tiny.save_tiny_base(tmp_path_factory.mktemp("base"))
    device = torch.device("cpu")
    backend = pick_backend(device, torch.float32, KERNEL_CACHE, lambda _message: None)
    return load_base(folder, device=device, dtype=torch.float32, backend=backend)


class Run:
    """One engine, and all that its requests were told."""

    def __init__(self, model: BaseModel, num_blocks: int, max_batch_tokens: int, prefix_cache: bool) -> None:
        pool = BlockPool(num_blocks, BLOCK_SIZE)
        self.scheduler = Scheduler(
            pool,
            max_batch_tokens=max_batch_tokens,
            max_num_seqs=32,
            max_step_ranks=4096,
            prefix_cache=prefix_cache,
        )
        self._engine = Engine(self.scheduler, model.runner(num_blocks, BLOCK_SIZE))
        self.num_preempted = 0
        preempt = self.scheduler._live.preempt  # noqa: SLF001

        def counted(sequence: Any) -> None:
            self.num_preempted += 1
            preempt(sequence)

        self.scheduler._live.preempt = counted  # type: ignore[method-assign]  # noqa: SLF001

    def said(self, numbers: list[int], num_sequences: int) -> dict[tuple[int, int], list[object]]:
        """Token ids and logprobs of each choice of the requests with these numbers, which begin together."""
        told: dict[tuple[int, int], list[object]] = {}
        ends = [Event() for _ in numbers]
        for number, end in zip(numbers, ends, strict=True):
            self._engine.submit(_request(number, num_sequences, told, end))
        self._engine.start()
        assert all(end.wait(60) for end in ends)
        self._engine.stop()
        return told


def _request(number: int, num_sequences: int, told: dict[tuple[int, int], list[object]], end: Event) -> Request:
    def hear(event: TokenEvent) -> None:
        told.setdefault((number, event.index), []).append((event.token_id, event.logprobs))

    params = SamplingParams(NUM_TOKENS, seed=number, **FIELDS[number])
    prompt = tuple((7 * number + position) % 250 for position in range(5 + 11 * number))
    return Request(str(number), prompt, params, hear, num_sequences=num_sequences, release=end.set)


def test_a_seeds_text_is_the_same_however_it_is_run(model: BaseModel) -> None:
    everyone = [*range(len(FIELDS))]
    alone: dict[tuple[int, int], list[object]] = {}
    for number in everyone:
        alone |= Run(model, 200, 512, prefix_cache=False).said([number], 3)
    assert len(alone) == 3 * len(FIELDS)
    assert all(len({str(alone[number, index]) for index in range(3)}) == 3 for number in everyone if number != 5)
    together = Run(model, 200, 512, prefix_cache=True)
    assert together.said(everyone, 3) == alone
    in_chunks = Run(model, 200, 17, prefix_cache=False)
    assert in_chunks.said(everyone[::-1], 3) == alone
    squeezed = Run(model, 24, 64, prefix_cache=True)
    assert squeezed.said(everyone, 3) == alone
    assert squeezed.num_preempted
    fewer = Run(model, 200, 64, prefix_cache=True).said(everyone, 1)
    assert fewer == {key: tokens for key, tokens in alone.items() if key[1] == 0}
