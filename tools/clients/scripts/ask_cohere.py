"""cohere's own ClientV2, which knows nothing of what OpenAI has."""

from typing import Any

import cohere

from asked import DOCUMENTS, KEY, QUESTION, URL, answer

client: Any = cohere.ClientV2(api_key=KEY, base_url=URL)


def rerank(model: str) -> Any:
    told = client.rerank(model=model, query=QUESTION, documents=DOCUMENTS)
    return [[one.index, one.relevance_score] for one in told.results]


answer(rerank=rerank)
