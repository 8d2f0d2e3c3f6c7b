"""A client for a running server's adapters, aliases, mixtures and evaluations, which the command line uses as well.

Imports nothing of the server.
"""

from swaplora_server.client.client import Card, Client
from swaplora_server.client.connection import ClientError
from swaplora_server.client.conversation import Conversation

__all__ = ["Card", "Client", "ClientError", "Conversation"]
