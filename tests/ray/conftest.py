"""Fixtures of `ray_fixtures.py`, once Ray will find what it reads in the environment when it is loaded."""

import os

# replicas' load is told every 10 s else, and Ray's proxy asks the ingress of its own node alone
os.environ["RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S"] = "0.5"
os.environ["RAY_SERVE_PROXY_PREFER_LOCAL_NODE_ROUTING"] = "0"

from ray_fixtures import config, folder, front, nodes, one

__all__ = ["config", "folder", "front", "nodes", "one"]
