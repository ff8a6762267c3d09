"""What DeepSpeed's engine allocates, stage by stage."""
