"""Small experiments that compare the operators: what they train and test, and how they run."""
