"""The server. Its rooms from the top: cli, http, service, base, engine, kernels. Each imports from those below."""
