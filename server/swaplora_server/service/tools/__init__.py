"""Tools: how a model is told of them, what it may be held to, and how its calls are read out of its text.

Calls are written as Hermes has them: `<tool_call>`, an object with `name` and `arguments`, `</tool_call>`.
"""
