"""The service's side of adapters: the registry as settings open it, what comes without an upload, what is derived."""
