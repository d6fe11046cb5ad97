"""Serving, over HTTP, against the engines that a user would otherwise run; see `__main__`."""
