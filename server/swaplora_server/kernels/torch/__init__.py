"""The torch backend: the definition of every operation, on any device."""
