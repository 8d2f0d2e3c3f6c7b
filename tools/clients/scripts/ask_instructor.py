"""instructor, which asks for objects: by a schema, or by a tool."""

from typing import Any

import instructor
import openai
import pydantic

from asked import BASE_URL, KEY, MAX_TOKENS, MESSAGES, answer

client = openai.OpenAI(base_url=BASE_URL, api_key=KEY)
FIELDS: dict[str, Any] = {"messages": MESSAGES, "temperature": 0, "max_tokens": MAX_TOKENS, "max_retries": 0}


class Answer(pydantic.BaseModel, extra="forbid"):
    answer: str = pydantic.Field(max_length=20)
    reason: str = pydantic.Field(max_length=20)


class Query(pydantic.BaseModel, extra="forbid"):
    query: str = pydantic.Field(max_length=20)


def create(mode: instructor.Mode, model: str, response_model: Any) -> Any:
    return instructor.from_openai(client, mode=mode).create(model=model, response_model=response_model, **FIELDS)


def structured(model: str) -> Any:
    return create(instructor.Mode.JSON_SCHEMA, model, Answer).model_dump()


def tools(model: str) -> Any:
    return {"Query": create(instructor.Mode.TOOLS, model, Query).model_dump()}


def streaming(model: str) -> Any:
    asking = instructor.from_openai(client, mode=instructor.Mode.JSON_SCHEMA)
    return [part.model_dump() for part in asking.create_partial(model=model, response_model=Answer, **FIELDS)]


AS_OPENAI = "as openai-python"
answer(
    chat=AS_OPENAI, streaming=AS_OPENAI, structured=structured, tools=tools, logprobs=AS_OPENAI, embeddings=AS_OPENAI
)
