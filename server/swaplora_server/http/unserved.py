"""Routes of OpenAI's and vLLM's APIs that are not served yet, which docs/api.md lists, and what one is told."""

UNSERVED = (
    *("/v1/embeddings", "/v1/responses", "/v1/messages", "/v1/moderations", "/v1/audio", "/v1/images", "/v1/videos"),
    *("/v1/files", "/v1/uploads", "/v1/batches", "/v1/fine_tuning", "/v1/vector_stores", "/v1/containers"),
    *("/v1/assistants", "/v1/threads", "/v1/conversations", "/v1/realtime", "/v1/evals", "/v1/engines", "/v1/edits"),
    *("/v1/chat/completions/", "/v1/organization", "/v1/score", "/v1/rerank", "/v2/rerank", "/rerank", "/score"),
    *("/tokenize", "/detokenize", "/pooling", "/classify", "/generate", "/inference/v1"),
)
_GENERATING = ("/v1/chat/completions", "/v1/completions", "/v1/models")
_SERVED = "POST /v1/chat/completions and /v1/completions generate, GET /v1/models lists who answers"


def what_is_there(path: str) -> str:
    """What a client is told who asked for a path that nothing answers to."""
    shown = repr(path[:128])
    if any(path == prefix or path.startswith(prefix.rstrip("/") + "/") for prefix in UNSERVED):
        return f"{shown} is not served yet; {_SERVED}"
    for served in _GENERATING:
        if path.rstrip("/").endswith(served.removeprefix("/v1")):
            return f"there is no route {shown}; you may mean {served}"
    return f"there is no route {shown}; {_SERVED}, and GET /openapi.json describes all routes"
