"""Download files over HTTP."""
