"""Anything at all, to what reads what others send. The short runs are tests; the long ones are started by hand."""
