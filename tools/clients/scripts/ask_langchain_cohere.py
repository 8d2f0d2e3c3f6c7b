"""langchain-cohere's CohereRerank."""

from typing import Any

from langchain_cohere import CohereRerank

from asked import DOCUMENTS, KEY, QUESTION, URL, answer


def rerank(model: str) -> Any:
    reranker = CohereRerank(model=model, cohere_api_key=KEY, base_url=URL)
    return [[one["index"], one["relevance_score"]] for one in reranker.rerank(DOCUMENTS, QUESTION)]


answer(rerank=rerank)
