"""llama-index's OpenAILikeEmbedding."""

from typing import Any

from llama_index.embeddings.openai_like import OpenAILikeEmbedding

from asked import BASE_URL, KEY, QUESTION, answer


def embeddings(model: str) -> Any:
    return OpenAILikeEmbedding(model_name=model, api_base=BASE_URL, api_key=KEY).get_query_embedding(QUESTION)


answer(embeddings=embeddings)
