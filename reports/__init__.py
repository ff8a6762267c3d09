"""Reports made of plans and runs."""
