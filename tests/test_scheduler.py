"""The scheduler under every order of events: nothing is lost, nothing runs twice, blocks always add up."""

from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swaplora_server.engine.kv_cache import BlockPool
from swaplora_server.engine.request import FinishReason, Request, SamplingParams, TokenEvent
from swaplora_server.engine.scheduler import Batch, Sampled, Scheduler

EOS = 9


@dataclass
class Client:
    """Everything that one request was told."""

    request: Request = field(init=False)
    events: list[TokenEvent] = field(default_factory=list)
    num_released: int = 0

    def released(self) -> None:
        self.num_released += 1


def submit(scheduler: Scheduler, prompt_len: int = 5, max_tokens: int = 4, n: int = 1, **params: object) -> Client:
    client = Client()
    client.request = Request(
        "r",
        tuple(range(prompt_len)),
        SamplingParams(max_tokens=max_tokens, **params),  # type: ignore[arg-type]
        emit=client.events.append,
        num_sequences=n,
        release=client.released,
    )
    scheduler.add(client.request)
    return client


def run_step(scheduler: Scheduler, token_id: int | None = 1) -> Batch:
    batch = scheduler.schedule()
    scheduler.commit(batch, [Sampled(token_id) for _ in batch.sampling])
    scheduler.check_integrity()
    return batch


def make(num_blocks: int = 50, block_size: int = 4, max_batch_tokens: int = 16, max_num_seqs: int = 8) -> Scheduler:
    return Scheduler(BlockPool(num_blocks, block_size), max_batch_tokens=max_batch_tokens, max_num_seqs=max_num_seqs)


def test_a_prompt_longer_than_the_budget_is_computed_in_chunks_and_samples_once() -> None:
    scheduler = make(max_batch_tokens=4)
    client = submit(scheduler, prompt_len=10, max_tokens=1)
    chunks = [[(rows.start, rows.stop) for rows in run_step(scheduler).rows] for _ in range(3)]
    assert chunks == [[(0, 4)], [(4, 8)], [(8, 10)]]
    assert [event.finish_reason for event in client.events] == [FinishReason.LENGTH]


def test_decoding_sequences_go_before_prompts() -> None:
    scheduler = make(max_batch_tokens=6)
    submit(scheduler, prompt_len=3)
    submit(scheduler, prompt_len=20)
    run_step(scheduler)
    rows = {rows.sequence.request.prompt_ids: rows.num_rows for rows in run_step(scheduler).rows}
    assert rows == {(0, 1, 2): 1, tuple(range(20)): 5}


def test_every_sequence_of_a_request_is_released_together_and_once() -> None:
    scheduler = make()
    client = submit(scheduler, n=3, stop_token_ids=frozenset({EOS}))
    run_step(scheduler, EOS)
    assert client.num_released == 1
    assert Counter(event.index for event in client.events) == Counter({0: 1, 1: 1, 2: 1})


def test_a_stop_token_before_min_tokens_does_not_stop() -> None:
    scheduler = make()
    client = submit(scheduler, stop_token_ids=frozenset({EOS}), min_tokens=3)
    for _ in range(3):
        run_step(scheduler, EOS)
    assert [event.finish_reason for event in client.events] == [None, None, FinishReason.STOP]


def test_a_row_whose_logits_are_not_finite_fails_alone() -> None:
    scheduler = make()
    clients = [submit(scheduler), submit(scheduler)]
    batch = scheduler.schedule()
    scheduler.commit(batch, [Sampled(None), Sampled(3)])
    assert [client.events[-1].finish_reason for client in clients] == [FinishReason.ERROR, None]
    scheduler.check_integrity()


def test_sequences_of_one_adapter_lie_side_by_side() -> None:
    from swaplora_server.engine.request import AdapterUse

    scheduler = make(max_batch_tokens=100)
    for name in ["b", "", "a", "b", "", "a"]:
        client = submit(scheduler)
        client.request.adapters = (AdapterUse(None, 1.0, name),) if name else ()  # type: ignore[arg-type]
    order = [rows.sequence.request.adapter_key for rows in scheduler.schedule().rows]
    assert [key[0][0] if key else "" for key in order] == ["", "", "a", "a", "b", "b"]


def test_when_blocks_run_out_the_youngest_is_computed_again_and_all_finish() -> None:
    scheduler = make(num_blocks=6, block_size=2)
    clients = [submit(scheduler, prompt_len=4, max_tokens=7) for _ in range(2)]
    num_rows = 0
    for _ in range(60):
        num_rows += sum(rows.num_rows for rows in run_step(scheduler).rows)
    assert [len(client.events) for client in clients] == [7, 7]
    assert num_rows > 2 * (4 + 6), "nothing was preempted, so this shows nothing"


def test_a_broken_pool_is_noticed() -> None:
    scheduler = make()
    submit(scheduler)
    scheduler.schedule().rows[0].sequence.block_table.pop()
    with pytest.raises(RuntimeError):
        scheduler.check_integrity()


def test_a_block_cannot_be_released_twice() -> None:
    pool = BlockPool(4, 4)
    table: list[int] = []
    pool.grow(table, 8)
    copy = list(table)
    pool.release(table)
    with pytest.raises(KeyError):
        pool.release(copy)


def test_block_zero_is_never_handed_out() -> None:
    pool = BlockPool(4, 4)
    table: list[int] = []
    pool.grow(table, 16)
    assert sorted(table) == [1, 2, 3, 4]


steps = st.one_of(
    st.tuples(st.just("submit"), st.integers(1, 30), st.integers(1, 8), st.integers(1, 3)),
    st.tuples(st.just("step"), st.sampled_from([1, EOS])),
    st.tuples(st.just("abort"), st.integers(0, 20)),
    st.tuples(st.just("abort one"), st.integers(0, 20), st.integers(0, 2)),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(steps, max_size=60), st.integers(10, 30), st.integers(1, 12), st.integers(1, 5))
def test_whatever_happens_every_sequence_ends_exactly_once(
    events: list[tuple[object, ...]], num_blocks: int, max_batch_tokens: int, max_num_seqs: int
) -> None:
    scheduler = make(num_blocks, 4, max_batch_tokens, max_num_seqs)
    clients: list[Client] = []
    for event in events:
        match event:
            case ("submit", int(prompt_len), int(max_tokens), int(n)):
                clients.append(submit(scheduler, prompt_len, max_tokens, n, stop_token_ids=frozenset({EOS})))
            case ("step", int(token_id)):
                batch = run_step(scheduler, token_id)
                assert sum(rows.num_rows for rows in batch.rows) <= max_batch_tokens
                assert scheduler.num_running <= max_num_seqs
            case ("abort", int(number)) if clients:
                scheduler.abort(clients[number % len(clients)].request)
            case ("abort one", int(number), int(index)) if clients:
                scheduler.abort(clients[number % len(clients)].request, index)
    for _ in range(3000):
        if not scheduler.has_work:
            break
        run_step(scheduler)
    assert not scheduler.has_work
    assert scheduler.pool.num_free == num_blocks
    for client in clients:
        ends = Counter(event.index for event in client.events if event.finish_reason)
        assert ends == Counter(range(client.request.num_sequences))
        assert client.num_released == 1
        for index in range(client.request.num_sequences):
            tokens = [event for event in client.events if event.index == index and event.token_id is not None]
            assert len(tokens) <= client.request.params.max_tokens
