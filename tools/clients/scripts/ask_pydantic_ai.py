"""pydantic-ai's agents."""

import asyncio
from typing import Any

import pydantic
from pydantic_ai import Agent, NativeOutput, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

from asked import BASE_URL, KEY, MAX_TOKENS, QUESTION, TOOL_DESCRIPTION, TOOL_NAME, answer

provider = OpenAIProvider(base_url=BASE_URL, api_key=KEY)
loop = asyncio.new_event_loop()  # one for all: the connections are the loop's


class Answer(pydantic.BaseModel):
    answer: str = pydantic.Field(max_length=20)
    reason: str = pydantic.Field(max_length=20)


class Query(pydantic.BaseModel):
    query: str = pydantic.Field(max_length=20)


def agent(model: str, output_type: Any = str, **settings: Any) -> Any:
    chosen = {"temperature": 0, "max_tokens": MAX_TOKENS} | settings
    return Agent(OpenAIChatModel(model, provider=provider), output_type=output_type, model_settings=chosen)


def run(asking: Any) -> Any:
    return loop.run_until_complete(asking.run(QUESTION))


def chat(model: str) -> Any:
    return run(agent(model)).output


def streaming(model: str) -> Any:
    async def pieces() -> list[str]:
        async with agent(model).run_stream(QUESTION) as stream:
            return [piece async for piece in stream.stream_text(delta=True, debounce_by=None)]

    return loop.run_until_complete(pieces())


def structured(model: str) -> Any:
    return run(agent(model, NativeOutput(Answer, name="Answer"))).output.model_dump()


def tools(model: str) -> Any:
    # a tool whose arguments are the answer: the model must call it
    tool = ToolOutput(Query, name=TOOL_NAME, description=TOOL_DESCRIPTION)
    return {TOOL_NAME: run(agent(model, tool)).output.model_dump()}


def logprobs(model: str) -> Any:
    told = run(agent(model, openai_logprobs=True, openai_top_logprobs=2)).response.provider_details["logprobs"]
    return [token["logprob"] for token in told]


def responses(model: str) -> Any:
    chosen: Any = {"temperature": 0, "max_tokens": MAX_TOKENS}
    return run(Agent(OpenAIResponsesModel(model, provider=provider), model_settings=chosen)).output


answer(
    chat=chat,
    streaming=streaming,
    structured=structured,
    tools=tools,
    logprobs=logprobs,
    embeddings="as openai-python",
    responses=responses,
)
