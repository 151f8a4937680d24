"""argv → one call → exit code; the only wing that prints."""
