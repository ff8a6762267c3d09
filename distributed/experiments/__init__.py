"""Small experiments that compare the operators."""
