"""openai-python, as OpenAI documents it."""

import json
from typing import Any

import openai
import pydantic

from asked import BASE_URL, KEY, MAX_TOKENS, MESSAGES, PROMPT, QUESTION, TOOL, TOOL_NAME, answer

client: Any = openai.OpenAI(base_url=BASE_URL, api_key=KEY)  # whose types are other ones in each major version
FIELDS: dict[str, Any] = {"messages": MESSAGES, "temperature": 0, "max_tokens": MAX_TOKENS}
NAMED = {"type": "function", "function": {"name": TOOL_NAME}}


class Answer(pydantic.BaseModel):
    answer: str = pydantic.Field(max_length=20)
    reason: str = pydantic.Field(max_length=20)


def chat(model: str) -> Any:
    return client.chat.completions.create(model=model, **FIELDS).choices[0].message.content


def streaming(model: str) -> Any:
    chunks = client.chat.completions.create(model=model, stream=True, stream_options={"include_usage": True}, **FIELDS)
    return [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]


def structured(model: str) -> Any:
    # under `beta` up to the first major version
    parse = getattr(client.chat.completions, "parse", None) or client.beta.chat.completions.parse
    parsed = parse(model=model, response_format=Answer, **FIELDS).choices[0].message.parsed
    return parsed.model_dump() if parsed else None


def tools(model: str) -> Any:
    choice = client.chat.completions.create(model=model, tools=[TOOL], tool_choice=NAMED, **FIELDS).choices[0]
    (call,) = choice.message.tool_calls
    return {call.function.name: json.loads(call.function.arguments)}


def logprobs(model: str) -> Any:
    choice = client.chat.completions.create(model=model, logprobs=True, top_logprobs=2, **FIELDS).choices[0]
    return [token.logprob for token in choice.logprobs.content]


def embeddings(model: str) -> Any:
    return client.embeddings.create(model=model, input=QUESTION).data[0].embedding


def responses(model: str) -> Any:
    asked = client.responses.create(model=model, input=QUESTION, temperature=0, max_output_tokens=MAX_TOKENS)
    return asked.output_text


def completion(model: str) -> Any:
    return client.completions.create(model=model, prompt=PROMPT, temperature=0, max_tokens=16).choices[0].text


answer(
    chat=chat,
    streaming=streaming,
    structured=structured,
    tools=tools,
    logprobs=logprobs,
    embeddings=embeddings,
    responses=responses,
    completion=completion,
)
