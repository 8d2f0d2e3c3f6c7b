"""What a front has under way in a replica ends with that front."""

import asyncio
from collections.abc import AsyncGenerator

from starlette.types import Message, Receive, Scope, Send

from swaplora_server.cluster.exchange import MAX_UNHEARD, Exchanges, Forwarded


async def reading(_scope: Scope, receive: Receive, send: Send) -> None:
    """Says what it read last, once there is nothing more to read."""
    while (message := await receive()).get("more_body", False):
        pass
    read.append(message["type"])
    await send({"type": "http.response.start", "status": 200, "headers": []})


read: list[str] = []


async def begun(exchanges: Exchanges, front: str) -> AsyncGenerator[list[Message]]:
    """A request of which the rest is still to come."""
    messages = exchanges.stream(Forwarded({"type": "http"}, b"a part", False, f"of {front}", front))
    assert await anext(messages) == []
    assert [message["type"] for message in await anext(messages)] == ["swaplora.wants_body"]
    return messages


async def test_what_a_front_has_under_way_ends_with_it() -> None:
    """And nothing of one that is heard, or that never says that it lives, as those of a release before."""
    exchanges = Exchanges(reading)
    read.clear()
    killed, living, old = [await begun(exchanges, front) for front in ("killed", "living", "")]
    for _ in range(MAX_UNHEARD):
        exchanges.hear("living")
        exchanges.look_at_fronts()
    await asyncio.sleep(0)
    assert read == []
    exchanges.look_at_fronts()
    async with asyncio.timeout(60):
        assert [sent async for sent in killed] == []
    assert read == ["http.disconnect"]
    for front in ("living", ""):
        assert exchanges.feed(f"of {front}", b"the rest", is_last=True)
    for messages in (living, old):
        assert [message["type"] async for sent in messages for message in sent] == ["http.response.start"]
    assert read == ["http.disconnect", "http.request", "http.request"]


async def test_a_front_that_begins_again_is_heard() -> None:
    exchanges = Exchanges(reading)
    read.clear()
    for _ in range(2):
        messages = await begun(exchanges, "front")
        for _ in range(MAX_UNHEARD):
            exchanges.look_at_fronts()
        assert exchanges.is_unheard("front")
        exchanges.hear("front")
        assert not exchanges.is_unheard("front")
        assert exchanges.feed("of front", b"the rest", is_last=True)
        assert [len(sent) async for sent in messages] == [1]
        exchanges.look_at_fronts()
    assert read == ["http.request"] * 2
    assert not exchanges.is_unheard("")
