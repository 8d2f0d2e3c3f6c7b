"""Bases that read whole inputs and say nothing: loaded, proven, and what makes vectors of inputs."""
