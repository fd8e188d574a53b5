"""Adapters for code that exists: a module for each peer, which imports it only when asked to."""
