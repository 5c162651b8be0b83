"""A small process that stands over a site's worker, and starts it again when it dies."""
