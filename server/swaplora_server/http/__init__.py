"""HTTP and nothing else: parse, authorise, call `service`, write. What a client reads as JSON has its shape here.

Imports `service` and what lies below it. Everything runs on the event loop; what takes long is a call of `service`.
"""
