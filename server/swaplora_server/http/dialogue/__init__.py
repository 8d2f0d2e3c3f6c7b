"""OpenAI's responses and Anthropic's messages: what is asked as turns, and one answer in blocks and named events."""
