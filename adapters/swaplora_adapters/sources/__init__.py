"""Where adapters come from without an upload: the hub, object stores, folders, and names that are looked up.

Brings them into the registry. Imports `registry` and below, never `derive`; clients' libraries at first use.
"""
