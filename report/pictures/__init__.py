"""One module for each kind of picture: what it draws, the figures behind it, and one line that reads it."""
