"""What a LoRA adapter is, where it lies and what it is called: files, configs, weights, a store and a registry.

Knows no server: no kernels, no steps, no routes. Each room imports from those below it alone:
train > sources, derive > registry > intake > store > weights > fit > config > files > errors, cancellation.
"""
