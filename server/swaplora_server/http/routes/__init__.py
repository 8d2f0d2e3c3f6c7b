"""A module for each group of routes: it reads a request, asks `service`, and writes the answer."""
