"""llama-index's OpenAILike, which completes texts unless told that the model chats."""

from typing import Any

import pydantic
from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike

from asked import BASE_URL, KEY, MAX_TOKENS, PROMPT, QUESTION, TOOL_DESCRIPTION, TOOL_NAME, answer

ASKED = [ChatMessage(role="user", content=QUESTION)]


class Answer(pydantic.BaseModel):
    answer: str = pydantic.Field(max_length=20)
    reason: str = pydantic.Field(max_length=20)


def llm(model: str, **settings: Any) -> Any:
    chosen = {"is_chat_model": True, "is_function_calling_model": True} | settings
    return OpenAILike(model=model, api_base=BASE_URL, api_key=KEY, temperature=0, max_tokens=MAX_TOKENS, **chosen)


def chat(model: str) -> Any:
    return llm(model).chat(ASKED).message.content


def completion(model: str) -> Any:
    return llm(model, is_chat_model=False).complete(PROMPT).text


def streaming(model: str) -> Any:
    return [piece.delta or "" for piece in llm(model).stream_chat(ASKED)]


def structured(model: str) -> Any:
    asking = llm(model, should_use_structured_outputs=True).as_structured_llm(Answer)
    return asking.chat(ASKED).raw.model_dump()


class Query(pydantic.BaseModel):
    query: str = pydantic.Field(max_length=20)


def look_up(query: str) -> str:
    return query


def tools(model: str) -> Any:
    asking = llm(model)
    tool = FunctionTool.from_defaults(look_up, name=TOOL_NAME, description=TOOL_DESCRIPTION, fn_schema=Query)
    said = asking.chat_with_tools([tool], QUESTION, tool_required=True)
    return {call.tool_name: call.tool_kwargs for call in asking.get_tool_calls_from_response(said)}


def logprobs(model: str) -> Any:
    told = llm(model, additional_kwargs={"logprobs": True, "top_logprobs": 2}).chat(ASKED).logprobs
    return [token[0].logprob for token in told]


answer(
    chat=chat,
    streaming=streaming,
    structured=structured,
    tools=tools,
    logprobs=logprobs,
    embeddings="a package of its own",
    rerank="a package of its own",
    completion=completion,
)
