"""What a route of our own may be asked with behind the question mark."""

from fastapi import Request

from swaplora_server.service.errors import RequestError


async def refuse_unknown_parameters(request: Request) -> None:
    """A dependency. Raises RequestError for a query parameter that the route does not take, as a misspelt one is."""
    known = {param.alias for param in request.scope["route"].dependant.query_params}
    unknown = sorted(request.query_params.keys() - known)
    if unknown:
        raise RequestError("invalid_request", f"{unknown[0][:64]!r} is not a query parameter here", unknown[0][:64])
