"""Graph passes: one rewrite per file, listed in the pipeline one line each."""
