"""What threads have the event loop do: every call once and in order, few wake-ups, none of a loop that is gone."""

import asyncio
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from swaplora_server.service.wakeups import Wakeups


@pytest.fixture
def wake_ups(monkeypatch: pytest.MonkeyPatch) -> list[Callable[..., Any]]:
    """Grows by one with every wake-up of a loop that this test's wake-ups ask for."""
    asked: list[Callable[..., Any]] = []

    async def prepare() -> type[asyncio.AbstractEventLoop]:
        return type(asyncio.get_running_loop())

    loop_type = asyncio.run(prepare())
    wake = loop_type.call_soon_threadsafe

    def counted(self: asyncio.AbstractEventLoop, call: Callable[..., Any], *args: Any, **options: Any) -> Any:
        if getattr(call, "__func__", None) is vars(Wakeups)["_deliver"]:
            asked.append(call)
        return wake(self, call, *args, **options)

    monkeypatch.setattr(loop_type, "call_soon_threadsafe", counted)
    return asked


async def test_what_is_posted_together_takes_one_wake_up_and_keeps_its_order(wake_ups: list[Any]) -> None:
    wakeups = Wakeups()
    made: list[int] = []
    for number in range(16):
        wakeups.post(partial(made.append, number))
    assert made == []
    await asyncio.sleep(0)
    assert made == list(range(16))
    assert len(wake_ups) == 1


async def test_what_is_posted_after_a_delivery_wakes_the_loop_again(wake_ups: list[Any]) -> None:
    wakeups = Wakeups()
    made: list[int] = []
    for number in range(3):
        wakeups.post(partial(made.append, number))
        await asyncio.sleep(0)
    assert made == [0, 1, 2]
    assert len(wake_ups) == 3


async def test_what_is_posted_during_a_delivery_is_not_forgotten() -> None:
    wakeups = Wakeups()
    made: list[str] = []
    wakeups.post(lambda: wakeups.post(partial(made.append, "inner")))
    for _ in range(3):
        await asyncio.sleep(0)
    assert made == ["inner"]


async def test_every_call_of_every_thread_is_made_once_and_in_that_threads_order() -> None:
    wakeups, num_threads, num_calls = Wakeups(), 4, 2000
    made: list[tuple[int, int]] = []
    is_all = asyncio.Event()

    def note(thread: int, number: int) -> None:
        made.append((thread, number))
        if len(made) == num_threads * num_calls:
            is_all.set()

    def post(thread: int) -> None:
        for number in range(num_calls):
            wakeups.post(partial(note, thread, number))

    threads = [threading.Thread(target=post, args=(thread,)) for thread in range(num_threads)]
    for thread in threads:
        thread.start()
    async with asyncio.timeout(60):
        await is_all.wait()
    for thread in threads:
        thread.join()
    for number in range(num_threads):
        assert [call for thread, call in made if thread == number] == list(range(num_calls))


def test_a_loop_that_has_closed_is_told_nothing_and_the_poster_goes_on() -> None:
    async def make() -> Wakeups:
        return Wakeups()

    wakeups = asyncio.run(make())
    made: list[int] = []
    for number in range(3):
        wakeups.post(partial(made.append, number))
    assert made == []
