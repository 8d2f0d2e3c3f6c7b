"""Commands that need no server: they read a base and adapters from disk, and write to it."""
