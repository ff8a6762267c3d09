"""DeepSpeed's configuration and what DeepSpeed does not run."""
