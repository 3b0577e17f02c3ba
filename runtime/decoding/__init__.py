"""Strategies over Session.forward, one per file."""
