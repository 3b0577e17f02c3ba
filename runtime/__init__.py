"""The artifact format and the executors; imports neither the compiler nor torch."""
