"""What an answer must keep to: JSON of a schema, a regular expression, a grammar. llguidance does the matching.

Grammars are compiled on threads of their own; a sequence's matcher belongs to the engine's thread.
"""
