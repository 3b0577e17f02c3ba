"""Plain torch references of every op."""
