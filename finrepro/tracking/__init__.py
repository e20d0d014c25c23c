"""MLflow's view of the results."""
