"""What a route of our own may be asked with behind the question mark."""

from fastapi import Request

from swaplora_server.http.errors import ApiError


async def refuse_unknown_parameters(request: Request) -> None:
    """A dependency. Raises ApiError for a query parameter that the route does not take: a misspelt one changes much."""
    known = {param.alias for param in request.scope["route"].dependant.query_params}
    unknown = sorted(request.query_params.keys() - known)
    if unknown:
        raise ApiError("invalid_request", f"{unknown[0][:64]!r} is not a query parameter here", unknown[0][:64])
