"""Training on one rank: DeepSpeed's engine, the loop, schedules and checks."""
