"""llama-index's JinaRerank, which reranks nodes."""

from typing import Any

from llama_index.core.schema import NodeWithScore, TextNode
from llama_index.postprocessor.jinaai_rerank import JinaRerank

from asked import BASE_URL, DOCUMENTS, KEY, QUESTION, answer


def rerank(model: str) -> Any:
    nodes = [NodeWithScore(node=TextNode(text=text, id_=str(number))) for number, text in enumerate(DOCUMENTS)]
    reranker = JinaRerank(model=model, base_url=BASE_URL, api_key=KEY, top_n=len(DOCUMENTS))
    return [[int(one.node.node_id), one.score] for one in reranker.postprocess_nodes(nodes, query_str=QUESTION)]


answer(rerank=rerank)
