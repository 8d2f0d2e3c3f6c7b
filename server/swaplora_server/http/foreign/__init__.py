"""What other servers call things: adapters in the fields of a body, and lists of them."""
