"""Measure a run and compare it with the prediction; rehearse one rank of a large plan."""
