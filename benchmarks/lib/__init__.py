"""What the scripts in benchmarks/ share."""
