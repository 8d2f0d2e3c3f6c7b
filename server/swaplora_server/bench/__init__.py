"""The load generator behind `swaplora bench`: closed and open loops on any OpenAI-compatible server, seen from outside.

May import nothing of the server but `printable`. One thread, an event loop of its own, in the process of the command.
"""
