"""Checks and generators for developers; not part of the distribution."""
