"""Which versions are in memory: claims on it, who is admitted next, the threads that load, and what the host keeps."""
