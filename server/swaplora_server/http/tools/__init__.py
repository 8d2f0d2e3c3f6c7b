"""Tools in chat completions: what a body says of them, and calls as OpenAI writes them."""
