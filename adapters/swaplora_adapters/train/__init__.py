"""An adapter learnt from examples: the data, what of it is learnt, the recipe, the run and the card.

The command line's; a server imports nothing of it. `recipe` and `data` need no torch. `encode` says which tokens are
learnt, `batches` in which order, `base_model` makes what learns, `run` has transformers' Trainer do it and go on after
it was killed, `remarks` and `card` say what came of it. `train` is all of that in one call.
"""
