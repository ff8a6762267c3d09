"""What a user specifies: the model, the training, ZeRO, the data set. Validated and frozen."""
