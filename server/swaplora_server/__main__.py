"""`python -m swaplora_server` is `swaplora`."""

from swaplora_server.cli import main

main()
