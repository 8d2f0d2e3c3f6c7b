"""What a scrape reads: requests, the engine and adapters by this server's names, and by those that others look for."""
