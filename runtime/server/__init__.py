"""An OpenAI-compatible HTTP server over one Session; needs gristmill[serve], which nothing else imports."""
