"""Whether an evaluation over HTTP is what PEFT in this process would have given."""

from collections.abc import Mapping
from typing import Any

import httpx
import torch
from transformers import AutoTokenizer

from judge import WrongError, send_by_hand
from oracle import Oracle
from repository import ROOT
from swaplora_server.config import Settings
from swaplora_server.embedded import ensure_embedded_base
from wiretap import Heard

DEMO = ROOT / "demo"
TOLERANCE = 1e-4  # of each token's log-probability, in float32


class Peft:
    """The embedded base, with a demo adapter if it has the model's name."""

    def __init__(self, model: str) -> None:
        base = ensure_embedded_base(Settings().cache_dir, lambda _message: None)
        self._tokenizer = AutoTokenizer.from_pretrained(base)
        self._oracle = Oracle(base, DEMO / model if (DEMO / model).is_dir() else None)

    def logprobs(self, context: str, choice: str) -> tuple[list[float], bool]:
        """Of each token of `choice` behind `context`, and whether all of them were the likeliest.

        White space that ends the context is the choice's, as lm-eval has it.
        """
        ids = self._encode(context + choice)
        num_context = len(self._encode(context.rstrip()))
        expected = self._oracle.logprobs(ids)[num_context - 1 : -1]
        chosen = expected.gather(1, torch.tensor(ids[num_context:])[:, None])[:, 0]
        return chosen.tolist(), bool((chosen == expected.max(-1).values).all())

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return ids


def judge_evaluation(
    server: httpx.Client, feature: str, model: str, told: Mapping[str, Any], heard: list[Heard], statuses: list[int]
) -> Any:
    """As `judge_answer`, of many requests. Log-probabilities are held against PEFT's, texts against those by hand."""
    if "told" not in told:
        raise WrongError(told["error"])
    if set(statuses) != {200} or {request.body.get("model", model) for request in heard} != {model}:
        raise WrongError(f"answered {statuses}")
    said = told["told"]
    if feature == "logprobs":
        _hold_against_peft(said, model)
        return said
    asked = [request for request in heard if request.path.startswith("/v1/")]
    choices = [choice for request in asked for choice in send_by_hand(server, request).json()["choices"]]
    expected = [choice["text"] if "text" in choice else choice["message"]["content"] for choice in choices]
    if sorted(expected) != sorted(said):  # rows are asked longest first
        raise WrongError(f"said {said}, by hand {expected}")
    return said


def _hold_against_peft(said: Mapping[str, Any], model: str) -> None:
    """Every log-likelihood, whether its tokens were the likeliest, and the share of rows that were right."""
    peft, labels, expected = Peft(model), said["labels"], []
    for context, choice, likelihood, is_greedy in said["likelihoods"]:
        logprobs, was_greedy = peft.logprobs(context, choice)
        expected.append(sum(logprobs))
        if abs(sum(logprobs) - likelihood) > TOLERANCE * len(logprobs) or was_greedy != is_greedy:
            peft_said = f"PEFT {sum(logprobs)} {was_greedy}, of {len(logprobs)} tokens"
            raise WrongError(f"{choice!r}: said {likelihood} {is_greedy}, {peft_said}, behind {context!r}")
    width = len(expected) // len(labels)
    rows = [expected[first : first + width] for first in range(0, len(expected), width)]
    accuracy = sum(row.index(max(row)) == label for row, label in zip(rows, labels, strict=True)) / len(rows)
    if accuracy != said["accuracy"]:
        raise WrongError(f"said that {said['accuracy']} are right, PEFT {accuracy}")
