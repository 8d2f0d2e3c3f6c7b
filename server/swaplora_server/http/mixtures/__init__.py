"""/v1/mixtures: several adapters under one name, of which each token takes those that are likest to it."""
