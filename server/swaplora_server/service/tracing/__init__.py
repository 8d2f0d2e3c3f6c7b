"""OpenTelemetry's traces: a span for each generation, below the one that FastAPI makes for its request."""
