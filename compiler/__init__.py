"""From a Hugging Face directory to an artifact."""
