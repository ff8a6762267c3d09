"""DeepSpeed's configuration, and the combinations of settings that DeepSpeed does not run."""
