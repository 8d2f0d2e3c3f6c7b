"""A conversation with one model, turn by turn."""

from collections.abc import Iterator

from swaplora_server.client.client import Client, Message


class Conversation:
    """What was said so far to `model`, which may change between two turns."""

    def __init__(self, client: Client, model: str) -> None:
        self.model = model
        self._client = client
        self._messages: list[Message] = []

    def say(self, text: str) -> Iterator[str]:
        """The answer to `text`, piece by piece. A turn that is not heard to its end leaves no trace."""
        turn = [*self._messages, {"role": "user", "content": text}]
        pieces = []
        for piece in self._client.chat(self.model, turn):
            pieces.append(piece)
            yield piece
        self._messages = [*turn, {"role": "assistant", "content": "".join(pieces)}]

    def reset(self) -> None:
        """Forget what was said."""
        self._messages = []
