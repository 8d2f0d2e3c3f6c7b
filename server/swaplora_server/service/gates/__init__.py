"""Gates: what new versions of a name must show before it stands for them, and who sees to it."""
