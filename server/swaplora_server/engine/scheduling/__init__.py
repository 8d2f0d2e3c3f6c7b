"""Which sequences run, and what of them each step computes: decisions alone, without torch."""
