"""Processes that train one model together, what they do, and how tests start and stop them."""
