"""The C++ executor."""
