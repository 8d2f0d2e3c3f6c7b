"""What PEFT makes of all that the proof of isolation asks."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import tiny
from isolation_asking import SCALE
from oracle import ArrowOracle, Oracle
from serving import Streamed

PROMPT: list[int] = tiny.byte_tokenizer().encode("<user>hello\n<assistant>", add_special_tokens=False)


class SumOracle(Oracle):
    """An adapter, and SCALE times another, added to the base."""

    def __init__(self, base: Path, first: Path, second: Path) -> None:
        super().__init__(base, first)
        self._model.load_adapter(str(second), "second")
        self._model.add_weighted_adapter(["default", "second"], [1.0, SCALE], "sum", "cat")
        self._model.set_adapter("sum")


class Truth:
    """By what answers are headed with: digests, all of a sum or a mixture in order, nothing for the base."""

    def __init__(self, base: Path, folders: Mapping[str, Path], top_k: int) -> None:
        """`folders` by digest."""
        self._base, self._folders, self._top_k = base, folders, top_k

    def worst_error(self, kind: str, said: Streamed) -> float:
        """The largest |Δ log-probability| of what was said."""
        oracle = self._oracle(kind, said.headers.get("x-swaplora-digest", ""))
        return oracle.worst_error(PROMPT, said.token_ids, said.logprobs)

    def _oracle(self, kind: str, digests: str) -> Oracle:
        folders: Sequence[Path] = [self._folders[digest] for digest in digests.split(", ") if digest]
        match kind:
            case "base":
                return Oracle(self._base)
            case "sums":
                return SumOracle(self._base, *folders)
            case "mixtures":
                return ArrowOracle(self._base, folders, self._top_k)
            case _:
                return Oracle(self._base, folders[0])
