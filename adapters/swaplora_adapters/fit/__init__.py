"""Whether an adapter fits a base: its targets, and a slot for every tensor of its file. Imports `config` and below."""
