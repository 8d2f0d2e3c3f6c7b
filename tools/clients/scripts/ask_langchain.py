"""langchain-openai's ChatOpenAI and OpenAIEmbeddings."""

from typing import Any

import pydantic
from langchain_openai import ChatOpenAI, OpenAIEmbeddings

from asked import BASE_URL, KEY, MAX_TOKENS, QUESTION, TOOL, TOOL_NAME, answer


class Answer(pydantic.BaseModel):
    answer: str = pydantic.Field(max_length=20)
    reason: str = pydantic.Field(max_length=20)


def llm(model: str) -> Any:
    return ChatOpenAI(model=model, base_url=BASE_URL, api_key=KEY, temperature=0, max_tokens=MAX_TOKENS)


def chat(model: str) -> Any:
    return llm(model).invoke(QUESTION).content


def streaming(model: str) -> Any:
    return [chunk.content for chunk in llm(model).stream(QUESTION, stream_usage=True)]


def structured(model: str) -> Any:
    return llm(model).with_structured_output(Answer).invoke(QUESTION).model_dump()


def tools(model: str) -> Any:
    (call,) = llm(model).bind_tools([TOOL], tool_choice=TOOL_NAME).invoke(QUESTION).tool_calls
    return {call["name"]: call["args"]}


def logprobs(model: str) -> Any:
    told = llm(model).bind(logprobs=True, top_logprobs=2).invoke(QUESTION).response_metadata["logprobs"]
    return [token["logprob"] for token in told["content"]]


def embeddings(model: str) -> Any:
    # else it sends ids of another model's tokens
    embedder = OpenAIEmbeddings(model=model, base_url=BASE_URL, api_key=KEY, check_embedding_ctx_length=False)
    return embedder.embed_query(QUESTION)


def responses(model: str) -> Any:
    asking = ChatOpenAI(
        model=model, base_url=BASE_URL, api_key=KEY, temperature=0, max_tokens=MAX_TOKENS, use_responses_api=True
    )
    return asking.invoke(QUESTION).text


answer(
    chat=chat,
    streaming=streaming,
    structured=structured,
    tools=tools,
    logprobs=logprobs,
    embeddings=embeddings,
    responses=responses,
)
