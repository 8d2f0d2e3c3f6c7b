"""litellm, whose prefix `hosted_vllm/` stands for servers like this one."""

import json
from typing import Any

import litellm
import pydantic

from asked import BASE_URL, DOCUMENTS, KEY, MAX_TOKENS, MESSAGES, QUESTION, TOOL, TOOL_NAME, answer

FIELDS: dict[str, Any] = {"api_base": BASE_URL, "api_key": KEY}
ASKED: dict[str, Any] = FIELDS | {"messages": MESSAGES, "temperature": 0, "max_tokens": MAX_TOKENS}
NAMED = {"type": "function", "function": {"name": TOOL_NAME}}


class Answer(pydantic.BaseModel):
    answer: str = pydantic.Field(max_length=20)
    reason: str = pydantic.Field(max_length=20)


def complete(model: str, **fields: Any) -> Any:
    return litellm.completion(model=f"hosted_vllm/{model}", **ASKED, **fields)


def chat(model: str) -> Any:
    return complete(model).choices[0].message.content


def streaming(model: str) -> Any:
    return [chunk.choices[0].delta.content or "" for chunk in complete(model, stream=True)]


def structured(model: str) -> Any:
    return json.loads(complete(model, response_format=Answer).choices[0].message.content)


def tools(model: str) -> Any:
    (call,) = complete(model, tools=[TOOL], tool_choice=NAMED).choices[0].message.tool_calls
    return {call.function.name: json.loads(call.function.arguments)}


def logprobs(model: str) -> Any:
    told = complete(model, logprobs=True, top_logprobs=2).choices[0].logprobs
    return [token.logprob for token in told.content]


def embeddings(model: str) -> Any:
    return litellm.embedding(model=f"hosted_vllm/{model}", input=[QUESTION], **FIELDS).data[0]["embedding"]


def rerank(model: str) -> Any:
    told = litellm.rerank(model=f"hosted_vllm/{model}", query=QUESTION, documents=DOCUMENTS, **FIELDS)
    return [[one["index"], one["relevance_score"]] for one in told.results]


def responses(model: str) -> Any:
    asked = {"input": QUESTION, "temperature": 0, "max_output_tokens": MAX_TOKENS}
    return litellm.responses(model=f"hosted_vllm/{model}", **FIELDS, **asked).output_text


answer(
    chat=chat,
    streaming=streaming,
    structured=structured,
    tools=tools,
    logprobs=logprobs,
    embeddings=embeddings,
    rerank=rerank,
    responses=responses,
)
