"""From logits to the next token of each sequence that samples: all rows at once, each by its own logits and seed alone.

What a number depends on never includes the rows beside it: rows are only ever put together, and never summed together.
"""
