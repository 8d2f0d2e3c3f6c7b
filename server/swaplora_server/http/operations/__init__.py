"""Routes for who runs the server: its health, its metrics, its keys."""
