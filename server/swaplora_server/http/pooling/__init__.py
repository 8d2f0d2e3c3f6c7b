"""Routes that answer with numbers made of whole inputs, as OpenAI and vLLM shape them."""
