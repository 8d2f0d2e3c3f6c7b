"""Names, versions, leases, and which weights are in memory: what a request asks, without a disk in its way.

What fetches from elsewhere is passed in. Imports `intake`, `store`, `weights` and below, never `sources`.
"""
