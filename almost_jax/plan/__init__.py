"""Ahead-of-time compilation for TPUs that aren't there: what fits, what travels, and floors of time."""
