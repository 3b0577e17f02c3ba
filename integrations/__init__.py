"""Adapters to other libraries, one file for each; every one needs its library and nothing else here does."""
