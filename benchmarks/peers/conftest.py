"""Keeps doctest from importing what is not installed."""

import importlib.util

collect_ignore = [] if importlib.util.find_spec("torch") else ["torch_monarch.py"]
