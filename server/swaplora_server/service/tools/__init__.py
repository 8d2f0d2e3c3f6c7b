"""What a text has beside plain words: calls of tools, of which a model is told and which it may be held to; reasoning.

`call_format.py` has the ways in which bases write calls; `dialect.py` says which of them is a base's own, and how it
marks its reasoning.
"""
