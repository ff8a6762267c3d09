"""The search for the best plan of a model on a cluster, its reasons and its advice."""
