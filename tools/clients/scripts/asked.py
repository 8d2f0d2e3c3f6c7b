"""What every script asks, and how it hears what to ask: the same words to every client, so that their answers can be
held against each other. It runs beside one client alone, so it imports nothing but Python's own library.
"""

import json
import sys
from collections.abc import Callable
from typing import Any

URL = sys.argv[1] if len(sys.argv) > 1 else ""  # of the server, without a path
BASE_URL = f"{URL}/v1"
KEY = "none"  # a server without a key takes any
QUESTION = "What is the capital of France?"
DOCUMENTS = ["Lyon is on the Rhone.", "The capital of France is Paris.", "SELECT name FROM cities"]
MESSAGES = [{"role": "user", "content": QUESTION}]
PROMPT = f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"  # to be completed, as the base was trained
MAX_TOKENS = 100
TEXT = {"type": "string", "maxLength": 20}
SCHEMA_NAME = "Answer"
SCHEMA = {
    "type": "object",
    "properties": {"answer": TEXT, "reason": TEXT},
    "required": ["answer", "reason"],
    "additionalProperties": False,
}
TOOL_NAME, TOOL_DESCRIPTION = "look_up", "Look something up."
PARAMETERS = {
    "type": "object",
    "properties": {"query": TEXT},
    "required": ["query"],
    "additionalProperties": False,
    "maxProperties": 1,  # litellm takes the line above out
}
TOOL = {
    "type": "function",
    "function": {"name": TOOL_NAME, "description": TOOL_DESCRIPTION, "parameters": PARAMETERS},
}
Feature = Callable[[str], Any]  # given a model's name, what the client says that it answered


def answer(**features: Feature | str) -> None:
    """Say which features there are, with the reason where one is not, and answer what is asked for, a line each.

    Args:
        features: by name; a text is why the client has none.
    """
    said, sys.stdout = sys.stdout, sys.stderr  # libraries print too
    print(json.dumps({name: each if isinstance(each, str) else None for name, each in features.items()}), file=said)
    said.flush()
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps(_told(features[asked["feature"]], asked["model"])), file=said)
        said.flush()


def _told(feature: Any, model: str) -> dict[str, Any]:
    try:
        return {"told": feature(model)}
    except Exception as error:  # noqa: BLE001 - whatever a client raises is what its user would see
        return {"error": f"{type(error).__name__}: {error}"}
