"""Filter, screen, rank and deduplicate assets."""
