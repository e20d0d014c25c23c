"""What a run leaves on disk: results, manifests, provenance."""
