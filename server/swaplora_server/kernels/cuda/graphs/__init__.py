"""CUDA graphs: steps of decoding rows, recorded once at start, whose hundreds of launches become one.

A recorded launch reads and writes where it did when it was recorded. So all that changes from step to step lies in one
array of words, and what says how much of it counts lies there too.
"""
