"""What an evaluation asks and what came of it: task files, metrics, intervals. Imports nothing of the server."""
